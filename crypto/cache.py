"""Unwrapped data keys, kept for minutes in the memory of one process. Start at `KeyCache`.

A KMS call costs milliseconds and a run opens two credentials at least. A key that has expired is
never used because the KMS does not answer: then runs wait.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from threading import Event, Lock
from time import monotonic
from typing import NoReturn
from uuid import UUID

from crypto.errors import CryptoError
from crypto.roots import Keyring, Purpose, RootStatus, WrapContext, Wrapped

KEYS_MAX = 1_000
TTL_S = 300.0
USES_MAX = 2**20

_Id = tuple[WrapContext, UUID, bytes]
_Item = tuple[Wrapped, WrapContext]


@dataclass(slots=True, repr=False)
class _Key:
    dek: bytes
    until: float
    uses: int


@dataclass(slots=True, repr=False)
class _Flight:
    """An unwrapping that somebody has begun; others wait for its answer."""

    landed: Event
    found: bytes | CryptoError | None = None
    failed: Exception | None = None


class KeyCache:
    """A keyring that remembers what it unwrapped. Any thread may call it.

    A key is remembered for exactly the wrapped bytes, root and context with which it was unwrapped:
    whoever comes with others asks the keyring. Two who want one key make one call.
    """

    def __init__(self, keyring: Keyring, clock: Callable[[], float] = monotonic) -> None:
        self.scheme = keyring.scheme
        self._keyring = keyring
        self._clock = clock
        self._lock = Lock()
        self._keys: OrderedDict[_Id, _Key] = OrderedDict()
        self._flights: dict[_Id, _Flight] = {}
        self._epoch = 0

    def __repr__(self) -> str:
        return f"KeyCache({len(self._keys)} keys)"

    def __len__(self) -> int:
        return len(self._keys)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a KeyCache cannot be pickled")

    def unwrap_many(self, items: Sequence[_Item]) -> list[bytes | CryptoError]:
        """Unwrap data keys, with one call of the keyring for all that are not remembered."""
        ids = [_identity(item) for item in items]
        found: dict[_Id, bytes | CryptoError] = {}
        mine: dict[_Id, _Item] = {}
        others: dict[_Id, _Flight] = {}
        with self._lock:
            epoch = self._epoch
            for identity, item in zip(ids, items, strict=True):
                dek = self._remembered(identity)
                if dek is not None:
                    found[identity] = dek
                elif identity in mine or identity in others:
                    continue
                elif identity in self._flights:
                    others[identity] = self._flights[identity]
                else:
                    mine[identity] = item
                    self._flights[identity] = _Flight(Event())
        if mine:
            found |= self._fly(mine, epoch)
        for identity, flight in others.items():
            flight.landed.wait()
            if flight.failed is not None:
                raise flight.failed
            assert flight.found is not None  # noqa: S101 - landed without a failure
            found[identity] = flight.found
        return [found[identity] for identity in ids]

    def flush(self) -> None:
        """Forget all keys; what is being unwrapped at this moment is not remembered either."""
        with self._lock:
            self._keys.clear()
            self._epoch += 1

    def reload(self) -> bool:
        """Read the roots again; if they changed, no key of before is used any more."""
        changed = self._keyring.reload()
        if changed:
            self.flush()
        return changed

    def wrap(self, purpose: Purpose, dek: bytes, context: WrapContext) -> Wrapped:
        """Wrap a data key; not remembered: whoever seals is not who opens."""
        return self._keyring.wrap(purpose, dek, context)

    def wrap_many(
        self, purpose: Purpose, items: Sequence[tuple[bytes, WrapContext]]
    ) -> list[Wrapped]:
        """Wrap many data keys of one purpose."""
        return self._keyring.wrap_many(purpose, items)

    def rewrap_many(self, items: Sequence[_Item]) -> list[Wrapped | CryptoError]:
        """Wrap again under the active roots, past the cache."""
        return self._keyring.rewrap_many(items)

    def active_root(self, purpose: Purpose) -> UUID:
        """Return the root that `wrap` uses."""
        return self._keyring.active_root(purpose)

    def prefer(self, root_id: UUID) -> bool:
        """Wrap by this root from now on, if this host may."""
        return self._keyring.prefer(root_id)

    def can_unwrap(self, purpose: Purpose) -> bool:
        """Say whether this host may open what was wrapped for a purpose."""
        return self._keyring.can_unwrap(purpose)

    def holds(self, root_id: UUID) -> bool:
        """Say whether this host can unwrap what that root wrapped."""
        return self._keyring.holds(root_id)

    def status(self) -> list[RootStatus]:
        """Describe the roots, without their keys."""
        return self._keyring.status()

    def close(self) -> None:
        """Forget everything and close the keyring."""
        self.flush()
        self._keyring.close()

    def _remembered(self, identity: _Id) -> bytes | None:
        key = self._keys.get(identity)
        if key is None:
            return None
        if self._clock() >= key.until or key.uses >= USES_MAX:
            del self._keys[identity]
            return None
        key.uses += 1
        self._keys.move_to_end(identity)
        return key.dek

    def _fly(self, mine: dict[_Id, _Item], epoch: int) -> dict[_Id, bytes | CryptoError]:
        failed: Exception | None = None
        answers: dict[_Id, bytes | CryptoError] = {}
        try:
            answers = dict(zip(mine, self._keyring.unwrap_many(list(mine.values())), strict=True))
        except Exception as error:
            failed = error
            raise
        finally:
            with self._lock:
                until = self._clock() + TTL_S
                for identity in mine:
                    flight = self._flights.pop(identity)
                    flight.found = answers.get(identity)
                    flight.failed = failed
                    if flight.found is None and failed is None:  # the thread itself is ending
                        flight.failed = RuntimeError("unwrapping was interrupted")
                    if isinstance(flight.found, bytes) and epoch == self._epoch:
                        self._keys[identity] = _Key(flight.found, until, 1)
                    flight.landed.set()
                while len(self._keys) > KEYS_MAX:
                    self._keys.popitem(last=False)
        return answers


def _identity(item: _Item) -> _Id:
    wrapped, context = item
    return (context, wrapped.root_id, sha256(wrapped.blob).digest())
