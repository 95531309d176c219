"""Errors of keys and envelopes.

KeyringError      a keyring that must not be used; says which, why, and what to type
├── KmsDenied     the KMS refuses this host what it asked for
SelfTestError     the primitives or the keyring do not do what they must; the process must not run
KmsUnavailable    the KMS does not answer: runs wait, nothing falls back
CryptoError       what is wrong with one key of many
├── UnknownRoot   the key is wrapped by a root that this host has not got yet
└── UnsealError   it does not open. It says nothing about why, on purpose.
"""

from datetime import timedelta
from uuid import UUID

from schemas.errors import ConfigError, Deferral

#: How long a run waits for a KMS that does not answer, and for a keyring file to be brought here.
KMS_RETRY = timedelta(seconds=15)
ROOT_RETRY = timedelta(seconds=60)


class KeyringError(ConfigError):
    """A keyring that is missing, readable by others, or not one of ours."""

    code = "keyring"


class KmsDenied(KeyringError):  # noqa: N818 - reads best where it is raised
    """The KMS refuses what this host asked of it: a policy, a token, a key that is not there."""

    code = "kms_denied"


class KmsUnavailable(Deferral):
    """The KMS does not answer, is sealed, or answers an error of its own: come back later."""

    code = "kms_unavailable"

    def __init__(self, public: str) -> None:
        super().__init__(public, retry_after=KMS_RETRY)


class SelfTestError(ConfigError):
    """Known answers are wrong, or a wrong context opened: nothing may start."""

    code = "selftest"


class CryptoError(Exception):
    """What is wrong with one key of a batch, while others are right."""


class UnknownRoot(Deferral, CryptoError):  # noqa: N818 - reads best where it is raised
    """The key is wrapped by a root that this host does not know: its keyring is an older one."""

    code = "root_unknown"

    def __init__(self, root_id: UUID) -> None:
        super().__init__(
            f"the key is wrapped by root {root_id}, which this host's keyring does not have; "
            "copy the new keyring file here",
            retry_after=ROOT_RETRY,
        )
        self.root_id = root_id


class UnsealError(CryptoError):
    """The envelope does not open here."""

    def __init__(self) -> None:
        super().__init__("cannot be opened")
