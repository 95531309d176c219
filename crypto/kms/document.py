"""A keyring file's bytes: read privately, checked whole, replaced atomically."""

import fcntl
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from crypto.errors import KeyringError
from crypto.kms import private
from crypto.roots import PURPOSES, RootState
from schemas.ids import new_id

_FORMAT = "syncward-keyring/1"
#: Private keys that everybody knows: RFC 7748 section 6.1, RFC 9180 appendix A.1.
_PUBLISHED = (
    "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
    "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
    "4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8",
)


@dataclass(frozen=True, slots=True, repr=False)
class Root:
    """One key pair, or its public half. Never leaves crypto/kms/."""

    root_id: UUID
    purpose: str
    state: str
    created_at: datetime
    public: X25519PublicKey
    private: X25519PrivateKey | None

    def __repr__(self) -> str:
        return f"Root({self.root_id}, {self.purpose}, {self.state})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Root cannot be pickled")


Entry = dict[str, Any]


def new_pair(purpose: str, state: RootState) -> tuple[Entry, Entry]:
    """Return a new root as two entries: with its public half, and with its private half."""
    key = X25519PrivateKey.generate()
    about = {
        "id": str(new_id()),
        "purpose": purpose,
        "state": state,
        "created_at": datetime.now(UTC).isoformat(),
    }
    public = b64encode(key.public_key().public_bytes_raw()).decode()
    return (
        {**about, "public": public},
        {**about, "private": b64encode(key.private_bytes_raw()).decode()},
    )


def read(path: Path) -> tuple[list[Entry], tuple[Root, ...]]:
    """Read a keyring file that only its owner can read; KeyringError says what is wrong."""
    missing = f"make one with: syncward keys init {path.parent}"
    content = private.read(path, "keyring", missing)
    try:
        document = json.loads(content)
        if document["format"] != _FORMAT:
            raise KeyringError(
                f"keyring {path}: unknown format; it needs another version of Syncward"
            )
        entries = document["roots"]
        roots = tuple(_root(entry) for entry in entries)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise KeyringError(
            f"keyring {path}: not a keyring file; restore it from its backup"
        ) from None
    _check(path, roots)
    return entries, roots


def create(path: Path, entries: Sequence[Entry]) -> None:
    """Write a new keyring file; KeyringError if there is one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise KeyringError(f"keyring {path}: exists already; keys are never overwritten") from None
    except OSError as error:
        raise KeyringError(f"keyring {path}: cannot be written: {error.strerror}") from None
    _fill(descriptor, entries)
    _sync_directory(path.parent)


def replace(path: Path, entries: Sequence[Entry]) -> None:
    """Replace a keyring file at once: whoever reads it sees the old roots or the new ones."""
    fresh = path.with_name(f".{path.name}.{new_id().hex}")
    create(fresh, entries)
    try:
        read(fresh)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep two commands from changing files of one directory at once: a root would get lost."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fill(descriptor: int, entries: Sequence[Entry]) -> None:
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, 0o600)  # whatever the umask is
        json.dump({"format": _FORMAT, "roots": list(entries)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _root(entry: Entry) -> Root:
    half = None
    if "private" in entry:
        raw = b64decode(entry["private"], validate=True)
        _refuse_sample(entry, raw)
        half = X25519PrivateKey.from_private_bytes(raw)
        public = half.public_key()
    else:
        public = X25519PublicKey.from_public_bytes(b64decode(entry["public"], validate=True))
    if public.public_bytes_raw() in _known_publics() or _is_low(public):
        raise KeyringError(_sample(entry))
    if entry["purpose"] not in PURPOSES or entry["state"] not in get_args(RootState):
        raise ValueError
    return Root(
        root_id=UUID(entry["id"]),
        purpose=entry["purpose"],
        state=entry["state"],
        created_at=datetime.fromisoformat(entry["created_at"]),
        public=public,
        private=half,
    )


def _refuse_sample(entry: Entry, raw: bytes) -> None:
    """Refuse keys that were typed rather than made: one byte repeated, or counted up or down."""
    steps = {(b - a) % 256 for a, b in pairwise(raw)}
    if steps <= {0} or steps in ({1}, {255}):
        raise KeyringError(_sample(entry))


def _sample(entry: Entry) -> str:
    return (
        f"keyring: root {entry.get('id')} is a sample key that everybody knows; "
        "make real ones with: syncward keys init DIRECTORY"
    )


@cache
def _known_publics() -> frozenset[bytes]:
    counted = [bytes(range(first, first + 32)) for first in (0, 1)]
    repeated = [bytes((byte,)) * 32 for byte in range(256)]
    privates = [*(bytes.fromhex(key) for key in _PUBLISHED), *counted, *repeated]
    return frozenset(
        X25519PrivateKey.from_private_bytes(p).public_key().public_bytes_raw() for p in privates
    )


def _is_low(public: X25519PublicKey) -> bool:
    """Say whether a public half makes the same secret with every partner (RFC 7748, 6.1)."""
    try:
        X25519PrivateKey.generate().exchange(public)
    except ValueError:
        return True
    return False


def _check(path: Path, roots: Sequence[Root]) -> None:
    if len({root.root_id for root in roots}) != len(roots):
        raise KeyringError(
            f"keyring {path}: two roots have the same id; restore the file from its backup"
        )
    active = [root.purpose for root in roots if root.state == "active"]
    for purpose in PURPOSES:
        if active.count(purpose) > 1:
            raise KeyringError(
                f"keyring {path}: two roots for {purpose} are active; "
                "restore the file from its backup"
            )
