"""Envelopes that do not fit into memory: the same bytes as seal.py makes, piece by piece."""

import os
from collections.abc import Iterable, Iterator
from uuid import UUID

from crypto.envelope import (
    BODY,
    CHUNK,
    SALT,
    SHORTEST,
    TAG,
    Context,
    MessageKeys,
    derive,
    header,
    take_apart,
)
from crypto.errors import UnsealError
from crypto.opening import SEALED_CHUNK, check_commitment, open_chunk


def seal_stream(
    dek: bytes, dek_id: UUID, chunks: Iterable[bytes], context: Context
) -> Iterator[bytes]:
    """Yield the envelope of what the chunks make together, whatever their sizes are."""
    return seal_stream_with_salt(dek, dek_id, chunks, context, salt=os.urandom(SALT))


def seal_stream_with_salt(
    dek: bytes, dek_id: UUID, chunks: Iterable[bytes], context: Context, *, salt: bytes
) -> Iterator[bytes]:
    """Seal with a given salt: only for known answers. A repeated salt breaks the encryption."""
    keys = derive(dek, dek_id, salt, context)
    yield header(dek_id) + salt + keys.commitment
    number, held = 0, bytearray()
    for piece in _small(chunks):
        held += piece
        while len(held) >= CHUNK:
            yield keys.cipher.encrypt(keys.nonce(number), bytes(held[:CHUNK]), None)
            number += 1
            del held[:CHUNK]
    yield keys.cipher.encrypt(keys.nonce(number), bytes(held), None)


def open_stream(
    dek: bytes, dek_id: UUID, chunks: Iterable[bytes], context: Context
) -> Iterator[bytes]:
    """Yield the plaintext of an envelope that comes in pieces of any size.

    What was yielded is genuine and in its place, but only the end of the iteration says that it is
    all: UnsealError at the end means that something was cut off. Throw away what came before it.
    """
    keys: MessageKeys | None = None
    number, held = 0, bytearray()
    for piece in _small(chunks):
        held += piece
        if keys is None and len(held) >= SHORTEST:
            keys = _begin(dek, dek_id, bytes(held[:SHORTEST]), context)
            del held[:BODY]
        while keys is not None and len(held) >= SEALED_CHUNK:
            yield open_chunk(keys, number, bytes(held[:SEALED_CHUNK]))
            number += 1
            del held[:SEALED_CHUNK]
    # A full chunk is never the last one: what was cut at a border ends here.
    if keys is None or len(held) < TAG:
        raise UnsealError
    last = open_chunk(keys, number, bytes(held))
    if last:
        yield last


def _begin(dek: bytes, dek_id: UUID, beginning: bytes, context: Context) -> MessageKeys:
    parts = take_apart(beginning)
    if parts.dek_id != dek_id:
        raise UnsealError
    keys = derive(dek, dek_id, parts.salt, context)
    check_commitment(keys, parts.commitment)
    return keys


def _small(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut large pieces: what is held stays small whatever comes."""
    for piece in chunks:
        for start in range(0, len(piece), CHUNK):
            yield piece[start : start + CHUNK]
