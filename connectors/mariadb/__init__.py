"""What the MariaDB source is made of. Start at window.py; tables.py needs no driver."""
