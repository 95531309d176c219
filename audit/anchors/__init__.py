"""Places outside the database that hold what was signed: one module a kind. Start at loading.py."""
