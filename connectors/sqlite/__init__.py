"""What the SQLite source is made of. Start at file.py."""
