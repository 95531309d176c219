"""Bytes in, bytes out: envelope, keyring, self-test. Start at seal.py."""
