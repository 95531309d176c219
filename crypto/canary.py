"""A canary per root: something sealed by it that whoever holds the root must be able to open.

It is stored beside the root, so that "right database, wrong keyring" is noticed before work begins.
"""

from uuid import UUID

from crypto.envelope import Context, length_prefixed, take_apart
from crypto.errors import CryptoError, UnsealError
from crypto.opening import open_envelope
from crypto.roots import Keyring, Purpose, WrapContext, Wrapped
from crypto.seal import new_dek, seal

_NOBODY = UUID(int=0)
_TEXT = b"syncward canary"


def make_canary(keyring: Keyring, purpose: Purpose) -> bytes:
    """Return a canary of the purpose's active root. Needs the right to wrap only."""
    dek_id, dek = new_dek()
    wrapped = keyring.wrap(purpose, dek, WrapContext(_NOBODY, purpose, dek_id))
    envelope = seal(dek, dek_id, _TEXT, _context(wrapped.root_id))
    return length_prefixed(wrapped.blob) + envelope


def check_canary(keyring: Keyring, purpose: Purpose, root_id: UUID, canary: bytes) -> bool:
    """Say whether this keyring opens a root's canary; it must hold the root."""
    size = int.from_bytes(canary[:2], "big")
    blob, envelope = canary[2 : 2 + size], canary[2 + size :]
    try:
        dek_id = take_apart(envelope).dek_id
        context = WrapContext(_NOBODY, purpose, dek_id)
        found = keyring.unwrap_many([(Wrapped(root_id, blob), context)])[0]
        if isinstance(found, CryptoError):
            return False
        return open_envelope(found, dek_id, envelope, _context(root_id)) == _TEXT
    except UnsealError:
        return False


def _context(root_id: UUID) -> Context:
    return Context(_NOBODY, "root", root_id, "canary", 1)
