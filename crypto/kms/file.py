"""Keyring files, split so that whoever stores a credential cannot open it. Start at `init`.

`operator.json` holds the public half of `credentials` and the private half of `records`,
`worker.json` the other halves. A root wraps by HPKE (RFC 9180: X25519, HKDF-SHA-256, AES-256-GCM).
"""

from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import NoReturn
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke

from crypto.errors import CryptoError, KeyringError, UnknownRoot, UnsealError
from crypto.kms import document
from crypto.kms.document import Entry, Root
from crypto.kms.private import stamp
from crypto.roots import PURPOSES, Purpose, RootStatus, WrapContext, Wrapped

SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


class FileKeyring:
    """The roots of one keyring file (crypto/roots.py says what each method promises)."""

    scheme = "file"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reloading = Lock()
        self._stamp = stamp(path)
        self._roots = _by_id(path)
        self._preferred: dict[str, UUID] = {}  # by purpose

    def __repr__(self) -> str:
        return f"FileKeyring({len(self._roots)} roots)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Keyring cannot be pickled")

    def wrap(self, purpose: Purpose, dek: bytes, context: WrapContext) -> Wrapped:
        """Wrap a data key under the active root of a purpose. Needs the public half only."""
        if context.purpose != purpose:
            raise ValueError("a key is wrapped for the purpose of its context")
        root = self._active(purpose)
        return Wrapped(
            root.root_id, SUITE.encrypt(dek, root.public, info=context.info(root.root_id))
        )

    def wrap_many(
        self, purpose: Purpose, items: Sequence[tuple[bytes, WrapContext]]
    ) -> list[Wrapped]:
        """Wrap many data keys under the active root of a purpose."""
        return [self.wrap(purpose, dek, context) for dek, context in items]

    def unwrap_many(
        self, items: Sequence[tuple[Wrapped, WrapContext]]
    ) -> list[bytes | CryptoError]:
        """Unwrap data keys; an item that fails stands as its error in its place.

        A root that is not known may be in a file that was brought here a moment ago.
        """
        if any(wrapped.root_id not in self._roots for wrapped, _ in items):
            with suppress(KeyringError):  # then its roots are not known, and `doctor` says why
                self.reload()
        roots = self._roots
        return [_unwrap(roots, wrapped, context) for wrapped, context in items]

    def rewrap_many(
        self, items: Sequence[tuple[Wrapped, WrapContext]]
    ) -> list[Wrapped | CryptoError]:
        """Unwrap and wrap under the active roots: the keys exist in this process meanwhile."""
        return [
            dek if isinstance(dek, CryptoError) else self.wrap(_purpose(context), dek, context)
            for dek, (_, context) in zip(self.unwrap_many(items), items, strict=True)
        ]

    def active_root(self, purpose: Purpose) -> UUID:
        """Return the root that `wrap` uses; KeyringError if there is none."""
        return self._active(purpose).root_id

    def prefer(self, root_id: UUID) -> bool:
        """Wrap by this root from now on; False unless it is here as `next` or `active`."""
        root = self._roots.get(root_id)
        if root is None or root.state == "decrypt_only":
            return False
        self._preferred[root.purpose] = root_id
        return True

    def can_unwrap(self, purpose: Purpose) -> bool:
        """Say whether this host can open what was wrapped for a purpose."""
        return any(r.purpose == purpose and r.private for r in self._roots.values())

    def holds(self, root_id: UUID) -> bool:
        """Say whether the private half of a root is here."""
        root = self._roots.get(root_id)
        return root is not None and root.private is not None

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

    def reload(self) -> bool:
        """Read the file again if it is another one than before; every check is made again."""
        with self._reloading:
            now = stamp(self._path)
            if now == self._stamp:
                return False
            before = self.status()
            self._roots = _by_id(self._path)
            self._stamp = now
            return self.status() != before

    def close(self) -> None:
        """Nothing is open."""

    def _active(self, purpose: Purpose) -> Root:
        roots = self._roots
        preferred = roots.get(self._preferred.get(purpose, UUID(int=0)))
        if preferred is not None and preferred.state != "decrypt_only":
            return preferred
        for root in roots.values():
            if root.purpose == purpose and root.state == "active":
                return root
        raise KeyringError(
            f"keyring: it has no active root for {purpose}; use the file that `keys init` made"
        )


def path_of(uri: str) -> Path:
    """Return the path of `file:///path` or of a path."""
    return Path(uri.removeprefix("file://"))


def load(path: str) -> FileKeyring:
    """Open a keyring file; KeyringError says what to type otherwise."""
    return FileKeyring(Path(path))


def _by_id(path: Path) -> dict[UUID, Root]:
    return {root.root_id: root for root in document.read(path)[1]}


def _purpose(context: WrapContext) -> Purpose:
    return next(purpose for purpose in PURPOSES if purpose == context.purpose)


def _unwrap(roots: dict[UUID, Root], wrapped: Wrapped, context: WrapContext) -> bytes | CryptoError:
    root = roots.get(wrapped.root_id)
    if root is None:
        return UnknownRoot(wrapped.root_id)
    if root.private is None or root.purpose != context.purpose:
        return UnsealError()
    try:
        return SUITE.decrypt(wrapped.blob, root.private, info=context.info(root.root_id))
    except (InvalidTag, ValueError):
        return UnsealError()


def init(directory: Path) -> tuple[Path, Path]:
    """Make new roots and write `operator.json` and `worker.json`; refuse to overwrite.

    The files belong on different hosts: with `operator.json` no stored credential opens.
    """
    operator_file, worker_file = directory / "operator.json", directory / "worker.json"
    for path in (operator_file, worker_file):
        if path.exists():
            raise KeyringError(f"keyring {path}: exists already; keys are never overwritten")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    credentials, records = (document.new_pair(purpose, "active") for purpose in PURPOSES)
    document.create(operator_file, [credentials[0], records[1]])
    document.create(worker_file, [credentials[1], records[0]])
    return operator_file, worker_file


def add_root(operator_file: Path, worker_file: Path, purpose: Purpose) -> UUID:
    """Add a new root to both files as `next`: it unwraps, and wraps only after `activate`."""
    public, private = document.new_pair(purpose, "next")
    opens, seals = _by_half(operator_file, worker_file, purpose)
    document.read(seals)  # both are right, or neither is touched
    _append(opens, [private])  # first: a root must never wrap what nobody can open
    _append(seals, [public])
    return UUID(public["id"])


def carry(operator_file: Path, update_file: Path, purpose: Purpose) -> UUID:
    """As `add_root`, where worker.json is on other hosts: write its new entry to a file of its own.

    Carry that file to each of them and `merge` it there.
    """
    public, private = document.new_pair(purpose, "next")
    document.read(operator_file)
    document.create(update_file, [private if purpose == "credentials" else public])
    _append(operator_file, [public if purpose == "credentials" else private])
    return UUID(public["id"])


def merge(path: Path, update_path: Path) -> list[UUID]:
    """Add the roots of an update file that the keyring file has not got; return their ids."""
    update, _ = document.read(update_path)
    known = {entry["id"] for entry in document.read(path)[0]}
    fresh = [entry for entry in update if entry["id"] not in known]
    if fresh:
        _append(path, fresh)
    return [UUID(entry["id"]) for entry in fresh]


def activate(path: Path, root_id: UUID) -> None:
    """Make a root the one that wraps; the one before it stays able to unwrap."""
    with document.locked(path.parent):
        entries, roots = document.read(path)
        chosen = _find(path, roots, root_id)
        if chosen.state == "decrypt_only":
            raise KeyringError(
                f"keyring {path}: root {root_id} was retired and does not come back; "
                "make a new one with: syncward keys rotate"
            )
        for entry in entries:
            if entry["id"] == str(root_id):
                entry["state"] = "active"
            elif entry["purpose"] == chosen.purpose and entry["state"] == "active":
                entry["state"] = "decrypt_only"
        document.replace(path, entries)


def drop_root(path: Path, root_id: UUID) -> None:
    """Take a root out of a file for good: what it wrapped opens nowhere.

    An active one goes only if exactly one other of its purpose is `next`, which is active then: so
    it is on hosts that were only given the new root.
    """
    with document.locked(path.parent):
        entries, roots = document.read(path)
        gone = _find(path, roots, root_id)
        left = [entry for entry in entries if entry["id"] != str(root_id)]
        if gone.state == "active":
            heirs = [e for e in left if e["purpose"] == gone.purpose and e["state"] == "next"]
            if len(heirs) != 1:
                raise KeyringError(
                    f"keyring {path}: root {root_id} is the active one; activate another one first"
                )
            heirs[0]["state"] = "active"
        document.replace(path, left)


def _by_half(operator_file: Path, worker_file: Path, purpose: Purpose) -> tuple[Path, Path]:
    if purpose == "credentials":
        return worker_file, operator_file
    return operator_file, worker_file


def _append(path: Path, fresh: Sequence[Entry]) -> None:
    with document.locked(path.parent):
        entries, _ = document.read(path)
        document.replace(path, [*entries, *fresh])


def _find(path: Path, roots: Sequence[Root], root_id: UUID) -> Root:
    for root in roots:
        if root.root_id == root_id:
            return root
    raise KeyringError(f"keyring {path}: it has no root {root_id}; `syncward keys status` lists")
