"""Keyrings in the Transit engine of Vault or OpenBao: roots never leave it. Start at `load`.

`NAME-credentials` and `NAME-records` are derived keys: the derivation's context is what a data key
belongs to, so a key that is wrapped for one account does not unwrap for another, and a rewrap keeps
it so. (Their `associated_data` would be lost by a rewrap.) Who may wrap and who may unwrap is a
matter of two policies, which docs/keys.md shows.
"""

import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Lock
from typing import Any, NoReturn, TypeVar
from uuid import UUID, uuid5

from crypto.errors import CryptoError, KeyringError, KmsDenied, UnknownRoot, UnsealError
from crypto.kms.transit import Transit, parse
from crypto.roots import PURPOSES, Purpose, RootStatus, WrapContext, Wrapped

#: Items of one request, which takes the server about as long as a single one. OpenBao refuses a
#: request of more than 1,000 strings, and an item has up to six.
BATCH = 150

_NAMESPACE = UUID("6f1c7a52-5c0e-5f0c-9a52-0d1b7a0c3e55")
_CIPHERTEXT = re.compile(rb"vault:v([1-9][0-9]{0,8}):[A-Za-z0-9+/]+={0,2}")
_ALLOWS = {"update", "root"}

_Item = tuple[Wrapped, WrapContext]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Key:
    """What the server says about a Transit key."""

    latest: int
    minimum: int
    made: dict[int, datetime]


@dataclass(frozen=True, slots=True)
class _Rights:
    tokens: int  # of which token they are
    wraps: frozenset[Purpose]
    unwraps: frozenset[Purpose]


class VaultKeyring:
    """Two Transit keys (crypto/roots.py says what each method promises)."""

    scheme = "vault"

    def __init__(self, transit: Transit) -> None:
        self._transit = transit
        self._lock = Lock()
        self._keys: dict[Purpose, _Key] = {}
        self._rights: _Rights | None = None
        self._preferred: dict[Purpose, int] = {}  # versions

    def __repr__(self) -> str:
        return f"VaultKeyring({self._transit.address.host})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Keyring cannot be pickled")

    def wrap(self, purpose: Purpose, dek: bytes, context: WrapContext) -> Wrapped:
        """Wrap a data key under the version of a purpose's key that is in use."""
        return self.wrap_many(purpose, [(dek, context)])[0]

    def wrap_many(
        self, purpose: Purpose, items: Sequence[tuple[bytes, WrapContext]]
    ) -> list[Wrapped]:
        """Wrap many data keys of one purpose: all of them, or KmsDenied."""
        if any(context.purpose != purpose for _, context in items):
            raise ValueError("a key is wrapped for the purpose of its context")
        version = self._version(purpose)  # under a missing key it would make one, underived
        asked: list[dict[str, str | int]] = [
            {"plaintext": _text(d), "context": _text(c.bound()), "key_version": version}
            for d, c in items
        ]
        found = self._batches("encrypt", purpose, asked, self._wrapped)
        made = [one for one in found if isinstance(one, Wrapped)]
        if len(made) != len(items):
            raise KmsDenied(f"KMS {self._host}: does not encrypt with {self._name(purpose)}")
        return made

    def unwrap_many(self, items: Sequence[_Item]) -> list[bytes | CryptoError]:
        """Unwrap data keys; an item that fails stands as its error in its place."""
        return self._by_purpose("decrypt", items, _plaintext)

    def rewrap_many(self, items: Sequence[_Item]) -> list[Wrapped | CryptoError]:
        """Wrap again under the version in use, at the server: no data key comes here."""
        return self._by_purpose("rewrap", items, self._wrapped)

    def active_root(self, purpose: Purpose) -> UUID:
        """Return the root that `wrap` uses: the preferred version, else the newest."""
        return self._root_id(purpose, self._version(purpose))

    def can_unwrap(self, purpose: Purpose) -> bool:
        """Say whether this host's token may decrypt what was wrapped for a purpose."""
        return purpose in self._allowed().unwraps

    def holds(self, root_id: UUID) -> bool:
        """Say whether this host can unwrap what that version wrapped."""
        return any(
            root_id == self._root_id(purpose, version) and self.can_unwrap(purpose)
            for purpose in PURPOSES
            for version in self._live(purpose)
        )

    def status(self) -> list[RootStatus]:
        """Describe the versions that can still be unwrapped."""
        rights = self._allowed()
        return [
            RootStatus(
                purpose=purpose,
                root_id=self._root_id(purpose, version),
                created_at=self._key(purpose).made[version],
                state="active" if version == self._version(purpose) else "decrypt_only",
                can_wrap=version == self._version(purpose) and purpose in rights.wraps,
                can_unwrap=purpose in rights.unwraps,
                fingerprint=f"{self._name(purpose)} v{version}",
            )
            for purpose in PURPOSES
            for version in self._live(purpose)
        ]

    def reload(self) -> bool:
        """Ask for the versions and the token's rights again; True if the versions changed."""
        fresh = {purpose: self._read_key(purpose) for purpose in PURPOSES}
        with self._lock:
            before, self._keys, self._rights = self._keys, fresh, None
        return before != fresh

    def prefer(self, root_id: UUID) -> bool:
        """Wrap by this version from now on, also when somebody makes a newer one at the server."""
        for purpose in PURPOSES:
            for version in self._live(purpose):
                if self._root_id(purpose, version) == root_id:
                    self._preferred[purpose] = version
                    return True
        return False

    def close(self) -> None:
        """Close the connections."""
        self._transit.close()

    def rotate(self, purpose: Purpose) -> UUID:
        """Make a new version of a purpose's key and return its root; needs an admin's token.

        It wraps when it is preferred. What earlier versions wrapped still unwraps.
        """
        self._key(purpose)
        self._admin(f"{self._path('keys', purpose)}/rotate", {})
        self.reload()
        return self._root_id(purpose, self._key(purpose).latest)

    def retire_below(self, purpose: Purpose, root_id: UUID) -> None:
        """Unwrap nothing any more that is older than this root; needs an admin's token."""
        self.reload()
        for version in self._live(purpose):
            if self._root_id(purpose, version) == root_id:
                self._admin(
                    f"{self._path('keys', purpose)}/config", {"min_decryption_version": version}
                )
                self.reload()
                return
        raise KeyringError(
            f"KMS {self._host}: {self._name(purpose)} has no live version that is root {root_id}; "
            "`syncward keys status` lists them"
        )

    # ── one batch ────────────────────────────────────────────────────────────────────────────

    def _by_purpose(
        self, verb: str, items: Sequence[_Item], read: Callable[[Purpose, dict[str, Any]], T | None]
    ) -> list[T | CryptoError]:
        """Ask for each purpose's items together; what cannot be ours is not sent at all."""
        found: dict[int, T | CryptoError] = {}
        for number, item in enumerate(items):
            wrong = self._misplaced(*item)
            if wrong is not None:
                found[number] = wrong
        for purpose in PURPOSES:
            numbers = [
                number
                for number, (_, context) in enumerate(items)
                if number not in found and context.purpose == purpose
            ]
            by: dict[str, str | int] = {}
            if verb == "rewrap" and numbers:
                by["key_version"] = self._version(purpose)
            asked = [
                {"ciphertext": wrapped.blob.decode(), "context": _text(context.bound()), **by}
                for wrapped, context in (items[number] for number in numbers)
            ]
            answers = self._batches(verb, purpose, asked, read)
            found.update(zip(numbers, answers, strict=True))
        return [found[number] for number in range(len(items))]

    def _batches(
        self,
        verb: str,
        purpose: Purpose,
        asked: Sequence[Mapping[str, str | int]],
        read: Callable[[Purpose, dict[str, Any]], T | None],
    ) -> list[T | CryptoError]:
        """Return an answer for each item; if some failed it is a 400 with the others in it."""
        found: list[T | CryptoError] = []
        for batch in (asked[start : start + BATCH] for start in range(0, len(asked), BATCH)):
            answer = self._transit.call("POST", self._path(verb, purpose), {"batch_input": batch})
            results = answer.data.get("batch_results")
            if not isinstance(results, list) or len(results) != len(batch):
                raise KmsDenied(
                    f"KMS {self._host}: refuses to {verb} with {self._name(purpose)}; it must be "
                    "a derived key, made as docs/keys.md shows"
                )
            for result in results:
                good = isinstance(result, dict) and not result.get("error")
                one = read(purpose, result) if good else None
                found.append(UnsealError() if one is None else one)
        return found

    def _wrapped(self, purpose: Purpose, result: dict[str, Any]) -> Wrapped | None:
        blob = str(result.get("ciphertext")).encode()
        version = _version(blob)
        if version is None:
            return None
        if version > self._key(purpose).latest:  # somebody rotated it
            self.reload()
        return Wrapped(self._root_id(purpose, version), blob)

    def _misplaced(self, wrapped: Wrapped, context: WrapContext) -> CryptoError | None:
        """Say why a wrapped key cannot be one of this purpose's key at this server, if so."""
        version = _version(wrapped.blob)
        for purpose in PURPOSES:
            if purpose == context.purpose and version is not None:
                if self._root_id(purpose, version) != wrapped.root_id:
                    break
                if version > self._key(purpose).latest:
                    self.reload()
                    if version > self._key(purpose).latest:  # restored from an older backup?
                        return UnknownRoot(wrapped.root_id)
                return None
        return UnsealError() if self._is_ours(wrapped.root_id) else UnknownRoot(wrapped.root_id)

    def _is_ours(self, root_id: UUID) -> bool:
        return any(
            root_id == self._root_id(purpose, version)
            for purpose in PURPOSES
            for version in range(1, self._key(purpose).latest + 1)
        )

    # ── what the server says about the keys ──────────────────────────────────────────────────

    def _version(self, purpose: Purpose) -> int:
        """Return the version that wraps: the preferred one while it lives, else the newest."""
        key = self._key(purpose)
        preferred = self._preferred.get(purpose)
        return preferred if preferred in key.made else key.latest

    def _key(self, purpose: Purpose) -> _Key:
        with self._lock:
            known = self._keys.get(purpose)
        if known is None:
            known = self._read_key(purpose)
            with self._lock:
                self._keys[purpose] = known
        return known

    def _read_key(self, purpose: Purpose) -> _Key:
        data = self._transit.call("GET", self._path("keys", purpose)).data
        if data.get("derived") is not True or data.get("exportable") is not False:
            raise KeyringError(
                f"KMS {self._host}: {self._name(purpose)} is not derived, or can be exported; "
                "make another one as docs/keys.md shows"
            )
        try:
            made = {int(v): datetime.fromtimestamp(int(at), UTC) for v, at in data["keys"].items()}
            latest, minimum = int(data["latest_version"]), int(data["min_decryption_version"])
        except (KeyError, TypeError, ValueError, AttributeError):
            made, latest, minimum = {}, 0, 0
        if latest not in made:
            raise KeyringError(
                f"KMS {self._host}: does not say which versions {self._name(purpose)} has; "
                "it must be an AES key, made as docs/keys.md shows"
            )
        return _Key(latest, minimum, made)

    def _live(self, purpose: Purpose) -> Iterator[int]:
        key = self._key(purpose)
        return (version for version in sorted(key.made) if version >= key.minimum)

    def _allowed(self) -> _Rights:
        with self._lock:
            rights = self._rights
        if rights is not None and rights.tokens == self._transit.tokens:
            return rights
        paths = {(v, p): self._path(v, p) for v in ("encrypt", "decrypt") for p in PURPOSES}
        answer = self._transit.call(
            "POST", "sys/capabilities-self", {"paths": list(paths.values())}
        )
        may = {
            (verb, purpose)
            for (verb, purpose), path in paths.items()
            if _ALLOWS & set(answer.data.get(path) or ())
        }
        rights = _Rights(
            self._transit.tokens,
            frozenset(p for p in PURPOSES if ("encrypt", p) in may),
            frozenset(p for p in PURPOSES if ("decrypt", p) in may),
        )
        with self._lock:
            self._rights = rights
        return rights

    def _admin(self, path: str, body: dict[str, object]) -> None:
        if self._transit.call("POST", path, body).status == 400:  # noqa: PLR2004 - refused
            raise KmsDenied(f"KMS {self._host}: refuses {path}; see its log")

    @property
    def _host(self) -> str:
        return self._transit.address.host

    def _name(self, purpose: Purpose) -> str:
        return f"{self._transit.address.name}-{purpose}"

    def _path(self, verb: str, purpose: Purpose) -> str:
        return f"{self._transit.address.mount}/{verb}/{self._name(purpose)}"

    def _root_id(self, purpose: Purpose, version: int) -> UUID:
        """Name a version of a key as other keyrings name a root."""
        return uuid5(_NAMESPACE, f"{self._host}/{self._path('keys', purpose)}/v{version}")


def load(uri: str) -> VaultKeyring:
    """Open a keyring by `vault://…`; what it needs of the server is asked when it is needed."""
    return VaultKeyring(Transit(parse(uri)))


def _plaintext(_: Purpose, result: dict[str, Any]) -> bytes | None:
    try:
        return b64decode(result["plaintext"], validate=True) or None
    except (KeyError, TypeError, ValueError):
        return None


def _version(blob: bytes) -> int | None:
    match = _CIPHERTEXT.fullmatch(blob)
    return int(match[1]) if match else None


def _text(raw: bytes) -> str:
    return b64encode(raw).decode()
