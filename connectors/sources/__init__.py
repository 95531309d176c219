"""Systems we read from, one file each."""
