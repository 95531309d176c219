"""Directories of files as a destination. Start at manifest.py, which is its transaction."""
