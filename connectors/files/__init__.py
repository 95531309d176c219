"""Directories of files as a destination. Start at manifest.py, its transaction; load.py writes."""
