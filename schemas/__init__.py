"""The nouns: frozen types that cross a folder or process boundary. Start at runs.py."""
