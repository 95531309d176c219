"""Salted fingerprints of secrets: see that one has not changed without being able to open it."""

import hmac
import os
from hashlib import scrypt

_VERSION = b"\x01"
_SALT = 16
# About 60 ms and 16 MiB: dear enough for an attacker with the table, cheap for an apply.
_COST = {"n": 2**14, "r": 8, "p": 1, "maxmem": 64 * 1024 * 1024, "dklen": 32}


def fingerprint(secret: bytes) -> bytes:
    """Return version, random salt and scrypt (RFC 7914) of a secret."""
    salt = os.urandom(_SALT)
    return _VERSION + salt + scrypt(secret, salt=salt, **_COST)


def matches(secret: bytes, stored: bytes) -> bool:
    """Say whether a secret is the one fingerprinted; an unknown version never matches."""
    if stored[:1] != _VERSION or len(stored) != 1 + _SALT + 32:
        return False
    salt = stored[1 : 1 + _SALT]
    return hmac.compare_digest(scrypt(secret, salt=salt, **_COST), stored[1 + _SALT :])
