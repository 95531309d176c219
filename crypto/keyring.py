"""Keyrings: two roots by purpose, split so that whoever stores a credential cannot open it.

`credentials`: the CLI, console and scheduler hold the public half, workers the private one.
`records` (log bodies, outputs): workers hold the public half, operators the private one.
A root wraps data keys by HPKE (RFC 9180: X25519, HKDF-SHA-256, AES-256-GCM).
"""

import json
import os
import stat
from base64 import b64decode, b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NoReturn
from uuid import UUID

from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from crypto.envelope import length_prefixed
from crypto.errors import KeyringError
from schemas.ids import new_id

Purpose = Literal["credentials", "records"]
PURPOSES: tuple[Purpose, ...] = ("credentials", "records")

SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)

_FORMAT = "syncward-keyring/1"


@dataclass(frozen=True, slots=True)
class WrapContext:
    """What a wrapped data key belongs to; a wrong one does not open it."""

    account_id: UUID
    purpose: str
    dek_id: UUID

    def info(self, root_id: UUID) -> bytes:
        """Return the bytes that HPKE binds to the wrapped key."""
        parts = (
            self.account_id.bytes,
            self.purpose.encode(),
            self.dek_id.bytes,
            root_id.bytes,
        )
        return b"syncward/wrap/v1" + b"".join(map(length_prefixed, parts))


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A data key that only the holder of a root's private half can use."""

    root_id: UUID
    blob: bytes


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


@dataclass(frozen=True, slots=True, repr=False)
class Root:
    """One key pair, or its public half. Its private half is for crypto/unseal.py only."""

    root_id: UUID
    purpose: str
    state: str  # active | decrypt_only
    created_at: datetime
    public: X25519PublicKey
    private: X25519PrivateKey | None

    def __repr__(self) -> str:
        return f"Root({self.root_id}, {self.purpose}, {self.state})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Root cannot be pickled")


class Keyring:
    """The roots that one host holds."""

    def __init__(self, roots: tuple[Root, ...]) -> None:
        self._roots = {root.root_id: root for root in roots}

    def __repr__(self) -> str:
        return f"Keyring({len(self._roots)} roots)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Keyring cannot be pickled")

    def root(self, root_id: UUID) -> Root | None:
        """Return a root by id; None if this host does not hold it."""
        return self._roots.get(root_id)

    def wrap(self, purpose: Purpose, dek: bytes, context: WrapContext) -> Wrapped:
        """Wrap a data key under the active root of a purpose. Needs the public half only."""
        for root in self._roots.values():
            if root.purpose == purpose and root.state == "active":
                blob = SUITE.encrypt(dek, root.public, info=context.info(root.root_id))
                return Wrapped(root.root_id, blob)
        raise KeyringError(
            f"keyring: it has no active root for {purpose}; use the file that `keys init` made"
        )

    def can_unwrap(self, purpose: Purpose) -> bool:
        """Say whether this host can open what was wrapped for a purpose."""
        return any(r.purpose == purpose and r.private for r in self._roots.values())

    def status(self) -> list[RootStatus]:
        """Describe the roots, without their keys."""
        return [
            RootStatus(
                purpose=root.purpose,
                root_id=root.root_id,
                created_at=root.created_at,
                state=root.state,
                can_wrap=root.state == "active",
                can_unwrap=root.private is not None,
                fingerprint=sha256(root.public.public_bytes_raw()).hexdigest()[:16],
            )
            for root in self._roots.values()
        ]


def init(directory: Path) -> tuple[Path, Path]:
    """Make new roots and write `operator.json` and `worker.json`; refuse to overwrite.

    The files belong on different hosts: with `operator.json` no stored credential opens.
    """
    operator_file, worker_file = directory / "operator.json", directory / "worker.json"
    for path in (operator_file, worker_file):
        if path.exists():
            raise KeyringError(f"keyring {path}: exists already; keys are never overwritten")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    now = datetime.now(UTC)
    credentials, records = (
        _Pair(new_id(), purpose, now, X25519PrivateKey.generate()) for purpose in PURPOSES
    )
    _write(operator_file, [credentials.entry(private=False), records.entry(private=True)])
    _write(worker_file, [credentials.entry(private=True), records.entry(private=False)])
    return operator_file, worker_file


@dataclass(frozen=True, slots=True, repr=False)
class _Pair:
    root_id: UUID
    purpose: str
    created_at: datetime
    key: X25519PrivateKey

    def entry(self, *, private: bool) -> dict[str, str]:
        half = (
            {"private": b64encode(self.key.private_bytes_raw()).decode()}
            if private
            else {"public": b64encode(self.key.public_key().public_bytes_raw()).decode()}
        )
        return {
            "id": str(self.root_id),
            "purpose": self.purpose,
            "state": "active",
            "created_at": self.created_at.isoformat(),
            **half,
        }


def _write(path: Path, roots: list[dict[str, str]]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"format": _FORMAT, "roots": roots}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def load(uri: str) -> Keyring:
    """Open a keyring by `file:///path` or path; KeyringError says what to type otherwise."""
    scheme, separator, rest = uri.partition("://")
    if separator and scheme != "file":
        raise KeyringError(f"keyring {scheme}://…: only file:// keyrings are available; see docs")
    path = Path(rest if separator else uri)
    content = _read_private(path)
    try:
        document = json.loads(content)
        if document["format"] != _FORMAT:
            raise KeyringError(
                f"keyring {path}: unknown format; it needs another version of Syncward"
            )
        return Keyring(tuple(_root(entry) for entry in document["roots"]))
    except (ValueError, KeyError, TypeError):
        raise KeyringError(
            f"keyring {path}: not a keyring file; restore it from its backup"
        ) from None


def _read_private(path: Path) -> bytes:
    """Read a file that nobody else can read; checks the opened file, not the name."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise KeyringError(
            f"keyring {path}: no such file; make one with: syncward keys init {path.parent}"
        ) from None
    except OSError:
        raise KeyringError(
            f"keyring {path}: cannot be opened (a symbolic link, or no permission); "
            "give the file itself, owned by this user"
        ) from None
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        raise KeyringError(f"keyring {path}: not a regular file; give the file itself")
    with os.fdopen(descriptor, "rb") as file:
        if about.st_uid != os.geteuid():
            raise KeyringError(
                f"keyring {path}: belongs to another user; run: chown {os.geteuid()} {path}"
            )
        if about.st_mode & 0o077:
            raise KeyringError(
                f"keyring {path}: others can read it; run: chmod 600 {path} "
                "(and make new keys if somebody may have)"
            )
        return file.read()


def _root(entry: dict[str, Any]) -> Root:
    private = public = None
    if "private" in entry:
        private = X25519PrivateKey.from_private_bytes(b64decode(entry["private"], validate=True))
        public = private.public_key()
    else:
        public = X25519PublicKey.from_public_bytes(b64decode(entry["public"], validate=True))
    if entry["purpose"] not in PURPOSES or entry["state"] not in {"active", "decrypt_only"}:
        raise ValueError
    return Root(
        root_id=UUID(entry["id"]),
        purpose=entry["purpose"],
        state=entry["state"],
        created_at=datetime.fromisoformat(entry["created_at"]),
        public=public,
        private=private,
    )
