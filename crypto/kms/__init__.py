"""Where the roots are: one module for each kind of keyring behind crypto/roots.py."""
