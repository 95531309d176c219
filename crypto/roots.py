"""What every keyring is: two roots by purpose that wrap data keys. Start at `Keyring`.

`credentials`: the CLI, console and scheduler may wrap, only workers may unwrap.
`records` (log bodies, outputs): workers may wrap, only operators may unwrap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol, runtime_checkable
from uuid import UUID

from crypto.envelope import Context, length_prefixed
from crypto.errors import CryptoError

Purpose = Literal["credentials", "records"]
PURPOSES: tuple[Purpose, ...] = ("credentials", "records")

#: `next`: distributed and able to unwrap, not used to wrap yet.
RootState = Literal["next", "active", "decrypt_only"]


@dataclass(frozen=True, slots=True)
class WrapContext:
    """What a wrapped data key belongs to; a wrong one does not open it."""

    account_id: UUID
    purpose: str
    dek_id: UUID

    def info(self, root_id: UUID) -> bytes:
        """Return the bytes that HPKE binds to the wrapped key."""
        return self.bound() + length_prefixed(root_id.bytes)

    def bound(self) -> bytes:
        """Return the same without the root: what stays when a key is wrapped again."""
        parts = (self.account_id.bytes, self.purpose.encode(), self.dek_id.bytes)
        return b"syncward/wrap/v1" + b"".join(map(length_prefixed, parts))


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A data key that only the holder of a root's private half can use.

    `root_id` names one version of a root, whatever keyring it is in.
    """

    root_id: UUID
    blob: bytes


@dataclass(frozen=True, slots=True)
class Sealed:
    """An envelope as it was found, with the wrapped key that opens it."""

    wrapped: Wrapped
    wrap: WrapContext
    envelope: bytes
    context: Context


@dataclass(frozen=True, slots=True)
class RootStatus:
    """One root as `keys status` shows it."""

    purpose: str
    root_id: UUID
    created_at: datetime
    state: str
    can_wrap: bool
    can_unwrap: bool
    fingerprint: str


class Unwraps(Protocol):
    """Whatever unwraps data keys: a keyring, or the cache in front of one."""

    def unwrap_many(
        self, items: Sequence[tuple[Wrapped, WrapContext]]
    ) -> list[bytes | CryptoError]:
        """Unwrap data keys; an item that fails stands as its error in its place."""


class Keyring(Unwraps, Protocol):
    """The roots that one host may use. One per process; all methods may be called by any thread.

    Any of them raises KmsUnavailable while the KMS does not answer, KmsDenied if it refuses.
    """

    scheme: str  # "file" | "vault"

    def wrap(self, purpose: Purpose, dek: bytes, context: WrapContext) -> Wrapped:
        """Wrap a data key under the active root of a purpose."""

    def wrap_many(
        self, purpose: Purpose, items: Sequence[tuple[bytes, WrapContext]]
    ) -> list[Wrapped]:
        """Wrap many data keys of one purpose: all of them, or an error."""

    def rewrap_many(
        self, items: Sequence[tuple[Wrapped, WrapContext]]
    ) -> list[Wrapped | CryptoError]:
        """Wrap again under the active root of each item's purpose; a KMS does it at its side."""

    def active_root(self, purpose: Purpose) -> UUID:
        """Return the root that `wrap` uses; KeyringError if there is none."""

    def prefer(self, root_id: UUID) -> bool:
        """Wrap by this root from now on; False unless this host has it as `next` or `active`.

        The keystore says which root is active; a host that got the root beforehand follows.
        """

    def can_unwrap(self, purpose: Purpose) -> bool:
        """Say whether this host may open what was wrapped for a purpose."""

    def holds(self, root_id: UUID) -> bool:
        """Say whether this host can unwrap what that root wrapped."""

    def status(self) -> list[RootStatus]:
        """Describe the roots, without their keys."""

    def reload(self) -> bool:
        """Read the roots again; True if they changed. KeyringError leaves those of before."""

    def close(self) -> None:
        """Give back connections; the keyring is not used after it."""


@runtime_checkable
class Rotating(Protocol):
    """A keyring whose roots a KMS makes and rotates; every host has them at once."""

    def rotate(self, purpose: Purpose) -> UUID:
        """Make a new version of the purpose's key and return its root."""

    def retire_below(self, purpose: Purpose, root_id: UUID) -> None:
        """Have the KMS refuse every version older than this root's."""
