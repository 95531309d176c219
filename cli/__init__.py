"""The operator's command line, one file per noun. Start at main.py."""
