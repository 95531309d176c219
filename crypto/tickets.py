"""One-time tickets: bytes that only this process can have given out, once, for a while.

For what leaves this process and comes back through somebody else's hands, as the `state` of an
authorisation, and for the proof that who began it ends it (PKCE, RFC 7636).
"""

import hmac
import os
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from enum import StrEnum
from hashlib import sha256
from time import time

_NONCE, _UNTIL, _MAC = 16, 8, 32


class Refusal(StrEnum):
    """Why a ticket is not taken."""

    FOREIGN = "was not given out here"
    EXPIRED = "has expired"
    USED = "was used before"


class Tickets:
    """Tickets of this process, under a key that nobody else has."""

    def __init__(self, *, life_s: float, clock: Callable[[], float] = time) -> None:
        self._key = os.urandom(32)
        self._life = life_s
        self._clock = clock
        self._used: set[bytes] = set()

    def issue(self, purpose: str) -> str:
        """Return a ticket that is good for this purpose only."""
        until = int(self._clock() + self._life)
        body = os.urandom(_NONCE) + until.to_bytes(_UNTIL, "big")
        return _text(body + self._mac(body, purpose))

    def redeem(self, ticket: str, purpose: str) -> Refusal | None:
        """Take a ticket; say why not, if not. It is not taken a second time."""
        try:
            raw = urlsafe_b64decode(ticket.encode("ascii") + b"=" * (-len(ticket) % 4))
        except ValueError:
            return Refusal.FOREIGN
        body, mac = raw[:-_MAC], raw[-_MAC:]
        if _text(raw) != ticket or not hmac.compare_digest(mac, self._mac(body, purpose)):
            return Refusal.FOREIGN
        if self._clock() >= int.from_bytes(body[_NONCE:], "big"):
            return Refusal.EXPIRED
        if body in self._used:
            return Refusal.USED
        self._used.add(body)
        return None

    def _mac(self, body: bytes, purpose: str) -> bytes:
        label = b"syncward/ticket/v1" + len(body).to_bytes(2, "big") + body
        return hmac.digest(self._key, label + purpose.encode(), "sha256")


def proof() -> tuple[str, str]:
    """Return a verifier and its S256 challenge."""
    verifier = secrets.token_urlsafe(48)
    return verifier, _text(sha256(verifier.encode()).digest())


def _text(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()
