"""Errors of keys and envelopes.

CryptoError
├── KeyringError   a keyring file that must not be used; says which, why, and what to type
├── SelfTestError  the primitives or the keyring do not do what they must; the process must not run
└── UnsealError    an envelope that does not open. It says nothing about why, on purpose.
"""

from schemas.errors import ConfigError


class KeyringError(ConfigError):
    """A keyring that is missing, readable by others, or not one of ours."""

    code = "keyring"


class SelfTestError(ConfigError):
    """Known answers are wrong, or a wrong context opened: nothing may start."""

    code = "selftest"


class UnsealError(Exception):
    """The envelope does not open here."""

    def __init__(self) -> None:
        super().__init__("cannot be opened")
