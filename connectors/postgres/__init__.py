"""What both roles of Postgres are made of. Start at link.py; a load begins in load.py."""
