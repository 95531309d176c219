"""Start-up self-test: known answers hold, wrong contexts fail, the keyring does its half."""

import os
from contextlib import suppress
from uuid import UUID

from crypto.envelope import Context
from crypto.errors import SelfTestError, UnsealError
from crypto.keyring import PURPOSES, Keyring, WrapContext
from crypto.seal import seal_with_salt
from crypto.unseal import unseal, unwrap
from schemas.ids import new_id

_DEK = bytes(range(32))
_DEK_ID = UUID(int=0x0102030405060708090A0B0C0D0E0F10)
_SALT = bytes(range(24))
_CONTEXT = Context(UUID(int=1), "resource", UUID(int=2), "password", 3)
#: Envelope of b"known answer"; docs/envelope.md publishes it, an independent decoder agrees.
KNOWN_ENVELOPE = bytes.fromhex(
    "535901010102030405060708090a0b0c0d0e0f1001000102030405060708090a0b0c0d0e0f10111213141516"
    "174b257850cdf97342173786425531fa6398ef2398140d52c9f215bb79d65bb10f990f8f01b4d2ae9e974418"
    "f8b82ab9b8e8fb83113c26324326489098"
)


def selftest(keyring: Keyring) -> None:
    """Raise SelfTestError unless the primitives and this keyring work; takes milliseconds."""
    envelope = seal_with_salt(_DEK, _DEK_ID, b"known answer", _CONTEXT, salt=_SALT)
    if envelope != KNOWN_ENVELOPE or unseal(_DEK, _DEK_ID, envelope, _CONTEXT) != b"known answer":
        raise SelfTestError("self-test: the envelope's known answer is wrong; reinstall Syncward")
    wrong = Context(_CONTEXT.account_id, "resource", UUID(int=9), "password", 3)
    flipped = envelope[:-1] + bytes((envelope[-1] ^ 1,))
    for broken, context in ((envelope, wrong), (flipped, _CONTEXT)):
        with suppress(UnsealError):
            unseal(_DEK, _DEK_ID, broken, context)
            raise SelfTestError("self-test: a changed envelope was opened; reinstall Syncward")
    for purpose in PURPOSES:
        if keyring.can_unwrap(purpose):
            _round_trip(keyring, WrapContext(new_id(), purpose, new_id()))


def _round_trip(keyring: Keyring, context: WrapContext) -> None:
    dek = os.urandom(32)
    purpose = PURPOSES[0] if context.purpose == PURPOSES[0] else PURPOSES[1]
    wrapped = keyring.wrap(purpose, dek, context)
    if unwrap(keyring, wrapped, context) != dek:
        raise SelfTestError("self-test: the keyring does not open what it wrapped")
    with suppress(UnsealError):
        unwrap(keyring, wrapped, WrapContext(new_id(), context.purpose, context.dek_id))
        raise SelfTestError("self-test: the keyring opened a key for another account")
