"""Mask columns between a source and a destination: start at `masked`.

Masked columns come as text. COPY binary is walked by its lengths: masked fields are replaced,
everything else is passed on as the bytes it is. Memory holds one block, or one row if that is
longer.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from struct import Struct

from schemas.errors import SyncwardError
from schemas.records import Batch, Column, KeySweep, Row, RowGroup, WireFormat
from schemas.streams import StreamSpec

#: What redact leaves of every value.
REDACTED = b"[redacted]"

#: Makes the token of a value.
Token = Callable[[bytes], bytes]
Mask = Callable[[bytes], bytes]

_SIGNATURE = b"PGCOPY\n\xff\r\n\x00"
_HEADER = len(_SIGNATURE) + 8
_COUNT, _LENGTH = Struct(">h"), Struct(">i")
_UTF8_LONGEST = 4


def masked(batch: Batch, stream: StreamSpec, token: Token | None) -> Batch:
    """Return the batch with its masked columns masked; nothing of them is left in clear.

    `token` is needed where a column is masked with hmac.
    """
    if not stream.mask:
        return batch
    fields = _fields(batch.shape.columns, stream, token)
    batch.groups = _in_groups(batch.groups, fields)
    if batch.wire is WireFormat.PG_BINARY:
        batch.chunks = _walked(batch.chunks, fields)
    if batch.keys is not None:
        batch.keys = _masked_keys(batch.keys, batch.wire, stream, token)
    if batch.gone is not None:
        batch.gone = _masked_keys(batch.gone, batch.wire, stream, token)
    batch.masked = True
    return batch


def _masked_keys(
    keys: KeySweep, wire: WireFormat, stream: StreamSpec, token: Token | None
) -> KeySweep:
    fields = _fields(keys.columns, stream, token)
    if wire is WireFormat.PG_BINARY:
        return replace(keys, chunks=_walked(keys.chunks, fields))
    return replace(keys, groups=_in_groups(keys.groups, fields))


def mask_of(rule: str, token: Token | None) -> Mask:
    """Return what masks a value that is not NULL: its text in UTF-8, and so is the result."""
    if rule == "hmac":
        if token is None:
            raise RuntimeError("a stream with hmac comes with the account's key")
        return token
    if rule == "redact":
        return lambda _: REDACTED
    match = re.fullmatch(r"truncate\((\d+)\)", rule)
    if match is None:
        raise RuntimeError(f"{rule} was refused when the stream was written")
    return _truncate(int(match[1]))


def _truncate(characters: int) -> Mask:
    def cut(value: bytes) -> bytes:
        head = value[:characters]
        if head.isascii():
            return head
        # The last character may be cut in two here; it is behind those that are kept.
        text = value[: characters * _UTF8_LONGEST].decode("utf-8", "surrogateescape")
        return text[:characters].encode("utf-8", "surrogateescape")

    return cut


def _fields(
    columns: Sequence[Column], stream: StreamSpec, token: Token | None
) -> Mapping[int, Mask]:
    """Return the masks by their column's place; refuse what did not come as text."""
    found = {}
    for place, column in enumerate(columns):
        rule = stream.mask.get(column.name)
        if rule is None:
            continue
        if column.type != "text":
            raise SyncwardError(f"{stream.name}: masked column {column.name} did not come as text")
        found[place] = mask_of(rule, token)
    return found


def _in_groups(groups: Iterator[RowGroup], fields: Mapping[int, Mask]) -> Iterator[RowGroup]:
    """Yield groups of rows with some values replaced."""

    def row(values: Row) -> Row:
        new = list(values)
        for place, mask in fields.items():
            value = new[place]
            if value is not None:
                new[place] = mask(str(value).encode("utf-8", "surrogateescape")).decode()
        return tuple(new)

    for group in groups:
        yield RowGroup([row(values) for values in group.rows], group.size)


def _walked(chunks: Iterator[bytes], fields: Mapping[int, Mask]) -> Iterator[bytes]:
    """Yield COPY binary with some fields replaced. Ends with an error if it does not end whole."""
    if not fields:  # keys without a masked column
        yield from chunks
        return
    held, begun, ended = bytearray(), False, False
    for chunk in chunks:
        held += chunk
        if ended:
            continue
        out, position = bytearray(), 0
        if not begun:
            position = header_end(held)
            if not position:
                continue
            out += held[:position]
            begun = True
        block = bytes(held)
        position, ended = _rows(block, position, fields, out)
        del held[:position]
        if out:
            yield bytes(out)
    if not ended or held:
        raise SyncwardError("the source's rows are not whole; nothing was kept")


def header_end(held: bytearray) -> int:
    """Return where the first row begins; 0 if the header is not here yet."""
    if len(held) < _HEADER:
        return 0
    if not held.startswith(_SIGNATURE):
        raise SyncwardError("the source's rows are not in the format that was asked for")
    end = _HEADER + int(_LENGTH.unpack_from(held, _HEADER - 4)[0])
    return end if len(held) >= end else 0


def _rows(block: bytes, start: int, fields: Mapping[int, Mask], out: bytearray) -> tuple[int, bool]:
    """Mask the whole rows of a block into `out`; return where the rest begins, and if it ended."""
    size, length_at, count_at, pack = (
        len(block),
        _LENGTH.unpack_from,
        _COUNT.unpack_from,
        _LENGTH.pack,
    )
    row = start
    while row + 2 <= size:
        (count,) = count_at(block, row)
        if count < 0:  # the end of all rows
            out += block[row : row + 2]
            return row + 2, True
        at, copied = row + 2, row
        kept = len(out)
        for place in range(count):
            if at + 4 > size:
                break
            (length,) = length_at(block, at)
            end = at + 4 + max(0, length)
            if end > size:
                break
            if length >= 0 and (mask := fields.get(place)) is not None:
                value = mask(block[at + 4 : end])
                out += block[copied:at]
                out += pack(len(value))
                out += value
                copied = end
            at = end
        else:
            out += block[copied:at]
            row = at
            continue
        del out[kept:]  # the row goes on in the next block
        break
    return row, False
