"""The envelope: exact bytes, one context, no partial plaintext; a second decoder agrees."""

import hmac
import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from hypothesis import given
from hypothesis import strategies as st

from crypto import selftest
from crypto.envelope import CHUNK, Context
from crypto.errors import UnsealError
from crypto.opening import open_envelope as unseal
from crypto.seal import new_dek, seal

CONTEXT = Context(uuid4(), "resource", uuid4(), "password", 1)
SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]


def independent_open(dek: bytes, envelope: bytes, context: Context) -> bytes:
    """Written from docs/envelope.md with nothing but HMAC and the bare cipher."""
    parts = [context.account_id.bytes, context.kind.encode(), context.resource_id.bytes]
    parts += [context.field.encode(), str(context.version).encode()]
    encoded = b"".join(struct.pack(">H", len(p)) + p for p in parts)
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + envelope[21:45]
    info += envelope[:21] + encoded
    output, block = b"", b""
    for counter in (1, 2):
        block = hmac.digest(dek, block + info + bytes([counter]), "sha512")
        output += block
    key, nonce, commitment = output[:32], output[32:44], output[44:76]
    assert commitment == envelope[45:77]
    plaintext, body, number = b"", envelope[77:], 0
    while True:
        chunk, body = body[: CHUNK + 16], body[CHUNK + 16 :]
        iv = (int.from_bytes(nonce, "big") ^ number).to_bytes(12, "big")
        decryptor = Cipher(AES(key), GCM(iv, chunk[-16:])).decryptor()
        plaintext += decryptor.update(chunk[:-16]) + decryptor.finalize()
        number += 1
        if len(chunk) < CHUNK + 16:
            return plaintext


@pytest.mark.parametrize("size", SIZES)
def test_what_is_sealed_opens_at_every_chunk_border(size):
    dek_id, dek = new_dek()
    plaintext = os.urandom(size)
    envelope = seal(dek, dek_id, plaintext, CONTEXT)
    assert unseal(dek, dek_id, envelope, CONTEXT) == plaintext
    assert independent_open(dek, envelope, CONTEXT) == plaintext
    assert len(envelope) == 77 + size + 16 * (size // CHUNK + 1)


@given(st.binary(max_size=300), st.text(max_size=20), st.integers(1, 2**31))
def test_an_independent_decoder_agrees(plaintext, field, version):
    context = replace(CONTEXT, field=field, version=version)
    dek_id, dek = new_dek()
    envelope = seal(dek, dek_id, plaintext, context)
    assert independent_open(dek, envelope, context) == plaintext


def test_every_flipped_byte_is_refused():
    dek_id, dek = new_dek()
    envelope = seal(dek, dek_id, b"secret", CONTEXT)
    for place in range(len(envelope)):
        broken = bytearray(envelope)
        broken[place] ^= 1
        with pytest.raises(UnsealError):
            unseal(dek, dek_id, bytes(broken), CONTEXT)


@pytest.mark.parametrize(
    "change",
    [
        {"account_id": uuid4()}, {"kind": "records"}, {"resource_id": uuid4()},
        {"field": "passwor"}, {"version": 2},
    ],
)  # fmt: skip
def test_every_part_of_the_context_counts(change):
    dek_id, dek = new_dek()
    envelope = seal(dek, dek_id, b"secret", CONTEXT)
    with pytest.raises(UnsealError):
        unseal(dek, dek_id, envelope, replace(CONTEXT, **change))


def test_parts_of_the_context_cannot_be_shifted_into_each_other():
    dek_id, dek = new_dek()
    envelope = seal(dek, dek_id, b"x", replace(CONTEXT, kind="ab", field="c"))
    with pytest.raises(UnsealError):
        unseal(dek, dek_id, envelope, replace(CONTEXT, kind="a", field="bc"))


def test_cut_reordered_and_extended_envelopes_are_refused():
    dek_id, dek = new_dek()
    envelope = seal(dek, dek_id, os.urandom(2 * CHUNK + 5), CONTEXT)
    size = CHUNK + 16
    head, one, two, last = (
        envelope[:77],
        envelope[77 : 77 + size],
        envelope[77 + size : 77 + 2 * size],
        envelope[77 + 2 * size :],
    )
    for broken in (
        head + one + two, head + one, head, head + two + one + last, head + one + last,
        envelope + b"\0", envelope[:-1],
    ):  # fmt: skip
        with pytest.raises(UnsealError):
            unseal(dek, dek_id, broken, CONTEXT)


@pytest.mark.parametrize(
    "foreign", [b"", b"hunter2", b"gAAAAABh" + b"x" * 100, b"SY\x02\x01" + b"0" * 200, b"SY" * 60]
)
def test_foreign_formats_are_refused(foreign):
    dek_id, dek = new_dek()
    with pytest.raises(UnsealError):
        unseal(dek, dek_id, foreign, CONTEXT)


def test_another_key_is_refused_and_the_error_says_nothing():
    dek_id, dek = new_dek()
    envelope = seal(dek, dek_id, b"secret", CONTEXT)
    with pytest.raises(UnsealError) as caught:
        unseal(os.urandom(32), dek_id, envelope, CONTEXT)
    assert str(caught.value) == "cannot be opened"


def test_two_sealings_of_one_secret_differ():
    dek_id, dek = new_dek()
    assert seal(dek, dek_id, b"x", CONTEXT) != seal(dek, dek_id, b"x", CONTEXT)


def test_the_published_vector_is_what_the_self_test_checks():
    page = (Path(__file__).parents[3] / "docs" / "envelope.md").read_text()
    published = "".join(re.findall(r"^    ([0-9a-f]{20,})$", page, re.MULTILINE))
    assert published == selftest.KNOWN_ENVELOPE.hex()
    context = Context(UUID(int=1), "resource", UUID(int=2), "password", 3)
    assert independent_open(bytes(range(32)), bytes.fromhex(published), context) == b"known answer"
