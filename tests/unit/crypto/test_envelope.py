"""The envelope: exact bytes, one context, no partial plaintext; a second decoder agrees."""

import hashlib
import itertools
import os
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto import selftest
from crypto.envelope import CHUNK, Context
from crypto.errors import UnsealError
from crypto.opening import open_envelope as unseal
from crypto.seal import new_dek, seal, seal_with_salt
from crypto.streams import open_stream, seal_stream, seal_stream_with_salt
from tests import independent

CONTEXT = Context(uuid4(), "resource", uuid4(), "password", 1)
SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]


def place(context: Context) -> independent.Place:
    return (
        context.account_id, context.kind, context.resource_id, context.field, context.version
    )  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_what_is_sealed_opens_at_every_chunk_border(size):
    dek_id, dek = new_dek()
    plaintext = os.urandom(size)
    envelope = seal(dek, dek_id, plaintext, CONTEXT)
    assert unseal(dek, dek_id, envelope, CONTEXT) == plaintext
    assert independent.opened(dek, envelope, place(CONTEXT)) == plaintext
    assert len(envelope) == 77 + size + 16 * (size // CHUNK + 1)


@given(st.binary(max_size=300), st.text(max_size=20), st.integers(1, 2**31))
def test_an_independent_decoder_agrees(plaintext, field, version):
    context = replace(CONTEXT, field=field, version=version)
    dek_id, dek = new_dek()
    envelope = seal(dek, dek_id, plaintext, context)
    assert independent.opened(dek, envelope, place(context)) == plaintext


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


def published():
    page = (Path(__file__).parents[3] / "docs" / "envelope.md").read_text(encoding="utf-8")
    for line in page.split("| Plaintext |")[1].splitlines()[2:]:
        yield [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("row", list(published()), ids=lambda row: f"{row[0]}-{row[3]}")
def test_both_implementations_make_and_open_the_published_vectors(row):
    text, dek_hex, salt_hex, where, shown = row
    kind, field = where.split(", ")
    size = re.fullmatch(r"(\d+) bytes", text)
    plaintext = bytes(i % 251 for i in range(int(size[1]))) if size else text.encode()
    dek, salt = bytes.fromhex(dek_hex), bytes.fromhex(salt_hex)
    dek_id = UUID("01020304-0506-0708-090a-0b0c0d0e0f10")
    context = Context(UUID(int=1), kind, UUID(int=2), field, 3)
    ours = seal_with_salt(dek, dek_id, plaintext, context, salt=salt)
    assert ours == independent.seal(dek, dek_id, salt, place(context), plaintext)
    length, _, digest = shown.partition(" bytes, ")
    if digest:
        assert (len(ours), hashlib.sha256(ours).hexdigest()) == (int(length), digest)
    else:
        assert ours.hex() == shown
    assert unseal(dek, dek_id, ours, context) == plaintext
    assert independent.opened(dek, ours, place(context)) == plaintext
    streamed = b"".join(
        seal_stream_with_salt(dek, dek_id, [plaintext[:7], plaintext[7:]], context, salt=salt)
    )
    assert streamed == ours


def test_the_self_test_checks_the_first_published_vector():
    first = next(iter(published()))
    assert first[4] == selftest.KNOWN_ENVELOPE.hex()
    assert len(list(published())) >= 8


# ── streams ──────────────────────────────────────────────────────────────────────────────────


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Cut data into pieces of these sizes, over and over."""
    pieces, start = [], 0
    for size in itertools.cycle(sizes):
        pieces.append(data[start : start + size])
        start += size
        if start >= len(data):
            return pieces
    raise AssertionError


@pytest.mark.parametrize("size", [*SIZES, 5 * CHUNK - 1])
@pytest.mark.parametrize("sizes", [[1000], [CHUNK], [CHUNK + 16], [3, 0, 70_000], [10**6]])
def test_a_stream_of_any_pieces_is_the_same_envelope(size, sizes):
    dek_id, dek = new_dek()
    plaintext = os.urandom(size)
    envelope = b"".join(seal_stream(dek, dek_id, cut(plaintext, sizes), CONTEXT))
    assert unseal(dek, dek_id, envelope, CONTEXT) == plaintext
    found = b"".join(open_stream(dek, dek_id, cut(envelope, sizes), CONTEXT))
    assert found == plaintext


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 3 * CHUNK), st.lists(st.integers(1, 2 * CHUNK), min_size=1, max_size=5))
def test_streams_and_fields_are_one_format(size, sizes):
    dek_id, dek = new_dek()
    plaintext = bytes(size)
    envelope = seal(dek, dek_id, plaintext, CONTEXT)
    assert b"".join(open_stream(dek, dek_id, cut(envelope, sizes), CONTEXT)) == plaintext


def test_a_stream_is_opened_in_constant_memory():
    dek_id, dek = new_dek()
    block = bytes(CHUNK)
    pieces = seal_stream(dek, dek_id, itertools.repeat(block, 2_000), CONTEXT)  # 32 MB
    tracemalloc.start()
    try:
        total = sum(len(piece) for piece in open_stream(dek, dek_id, pieces, CONTEXT))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 2_000 * CHUNK
    assert peak < 1024 * 1024
