"""Start-up self-test: known answers hold, wrong contexts fail, the keyring does its half."""

import os
from contextlib import suppress
from uuid import UUID

from crypto import known_answers
from crypto.envelope import Context
from crypto.errors import CryptoError, SelfTestError, UnsealError
from crypto.opening import open_envelope
from crypto.roots import PURPOSES, Keyring, Purpose, WrapContext
from crypto.seal import seal_with_salt
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
    """Raise SelfTestError unless the primitives and this keyring work; well under a second.

    A KMS that is away or refuses raises its own error: nothing starts without keys.
    """
    try:
        known_answers.check()
        _envelope()
    except SelfTestError:
        raise
    except Exception as error:  # noqa: BLE001 - a broken library may raise anything
        raise SelfTestError(
            f"self-test: the cryptography library fails ({type(error).__name__}); "
            "reinstall Syncward"
        ) from None
    able = {status.purpose for status in keyring.status() if status.can_wrap}
    for purpose in PURPOSES:
        if purpose in able:
            _round_trip(keyring, purpose, opens=keyring.can_unwrap(purpose))


def _envelope() -> None:
    envelope = seal_with_salt(_DEK, _DEK_ID, b"known answer", _CONTEXT, salt=_SALT)
    opened = open_envelope(_DEK, _DEK_ID, KNOWN_ENVELOPE, _CONTEXT)
    if envelope != KNOWN_ENVELOPE or opened != b"known answer":
        raise SelfTestError("self-test: the envelope's known answer is wrong; reinstall Syncward")
    wrong = Context(_CONTEXT.account_id, "resource", UUID(int=9), "password", 3)
    flipped = envelope[:-1] + bytes((envelope[-1] ^ 1,))
    for broken, context in ((envelope, wrong), (flipped, _CONTEXT)):
        with suppress(UnsealError):
            open_envelope(_DEK, _DEK_ID, broken, context)
            raise SelfTestError("self-test: a changed envelope was opened; reinstall Syncward")


def _round_trip(keyring: Keyring, purpose: Purpose, *, opens: bool) -> None:
    """Wrap a key and unwrap it in its own context, in another account's, and changed."""
    dek, context = os.urandom(32), WrapContext(new_id(), purpose, new_id())
    wrapped = keyring.wrap(purpose, dek, context)
    if not opens:
        return
    elsewhere = WrapContext(new_id(), purpose, context.dek_id)
    right, wrong = keyring.unwrap_many([(wrapped, context), (wrapped, elsewhere)])
    if right != dek:
        raise SelfTestError(f"self-test: the keyring does not open what it wrapped for {purpose}")
    if not isinstance(wrong, CryptoError):
        raise SelfTestError(f"self-test: the keyring opened a key of {purpose} elsewhere")
