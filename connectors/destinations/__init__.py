"""Systems we write to, one file each."""
