"""Files of rows: JSON lines by the standard of the house, Parquet through pyarrow.

Both directions, because a merge reads what earlier runs wrote. What a reader of the files sees per
kind is in docs/files.md.
"""

import hashlib
import math
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from io import BufferedWriter
from itertools import chain
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import orjson

from connectors.portable import Kind, digits_of, travels_as
from schemas.errors import ConfigError
from schemas.records import Column, Row, RowGroup, Value

#: Rows and bytes of a row group of Parquet; less makes large files slow to read.
_GROUP_ROWS = 50_000
_GROUP_BYTES = 8 * 2**20
#: Rows decoded at once when a file is read again.
_READ_ROWS = 1_000
#: Digits of Arrow's two widths of decimals.
_DECIMAL128, _DECIMAL256 = 38, 76

Json = Any


class Writer(Protocol):
    """Writes one file; `close` completes it, and does not close what lies below."""

    def write(self, group: RowGroup) -> None: ...
    def close(self) -> None: ...


class Hashed:
    """A file that is written once from front to back, with its digest and length."""

    def __init__(self, file: BufferedWriter) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        """Write all of it."""
        self._file.write(data)
        self._sha256.update(data)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def tell(self) -> int:
        """Return the length so far."""
        return self.size

    def flush(self) -> None:
        """Leave it to the end."""

    def close(self) -> None:
        """Leave it to whoever opened the file: it must reach the disk first."""

    def readable(self) -> bool:
        """Say no."""
        return False

    def writable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say no."""
        return False

    @property
    def digest(self) -> str:
        return self._sha256.hexdigest()


def writer(format_: str, file: Hashed, columns: Sequence[Column], stream: str) -> Writer:
    """Return what writes rows of these columns in a format."""
    if format_ == "parquet":
        return _ParquetWriter(file, columns, stream)
    return JsonWriter(file, columns)


def read(format_: str, path: Path, columns: Sequence[Column]) -> Iterator[Row]:
    """Yield the rows of a file that `writer` made, as they went in."""
    if format_ == "parquet":
        return _read_parquet(path, columns)
    return read_json(path, columns)


# ── values as JSON ───────────────────────────────────────────────────────────────────────────


def _float_out(value: Any) -> Json:  # noqa: ANN401 - one of Value, which its column knows
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


_OUT: dict[Kind, Callable[[Any], Json]] = {
    Kind.FLOAT: _float_out,
    Kind.DECIMAL: lambda value: format(value, "f"),
    Kind.BYTES: lambda value: b64encode(value).decode(),
    Kind.DATE: date.isoformat,
    Kind.TIME: time.isoformat,
    Kind.TIMESTAMP: datetime.isoformat,
    Kind.TIMESTAMPTZ: datetime.isoformat,
    Kind.UUID: str,
}
_IN: dict[Kind, Callable[[Any], Value]] = {
    Kind.FLOAT: float,
    Kind.DECIMAL: Decimal,
    Kind.BYTES: b64decode,
    Kind.DATE: date.fromisoformat,
    Kind.TIME: time.fromisoformat,
    Kind.TIMESTAMP: datetime.fromisoformat,
    Kind.TIMESTAMPTZ: datetime.fromisoformat,
    Kind.UUID: UUID,
}

Change = tuple[int, Callable[[Any], Any]]


def _changes(columns: Sequence[Column], by: dict[Kind, Callable[[Any], Any]]) -> list[Change]:
    """Return which columns are not the same on both sides, and what makes them so."""
    kinds = [travels_as(column) for column in columns]
    return [(i, by[kind]) for i, kind in enumerate(kinds) if kind in by]


def _changed(row: Sequence[Any], changes: Sequence[Change]) -> list[Any]:
    values = list(row)
    for i, change in changes:
        if values[i] is not None:
            values[i] = change(values[i])
    return values


def to_json(row: Sequence[Value], columns: Sequence[Column]) -> list[Json]:
    """Return values as JSON holds them exactly."""
    return _changed(row, _changes(columns, _OUT))


def from_json(values: Sequence[Json], columns: Sequence[Column]) -> Row:
    """Return the values that `to_json` was given."""
    return tuple(_changed(values, _changes(columns, _IN)))


class JsonWriter:
    """One object a line, every column of the table in each."""

    def __init__(self, file: Hashed, columns: Sequence[Column]) -> None:
        self._file = file
        self._names = [column.name for column in columns]
        self._changes = _changes(columns, _OUT)

    def write(self, group: RowGroup) -> None:
        """Write the rows."""
        names, changes = self._names, self._changes
        for row in group.rows:
            line = dict(zip(names, _changed(row, changes), strict=True))
            self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        """End the file; there is no footer."""


def read_json(path: Path, columns: Sequence[Column]) -> Iterator[Row]:
    """Yield the rows of a file that JsonWriter made."""
    names, changes = [column.name for column in columns], _changes(columns, _IN)
    with path.open("rb") as file:
        for line in file:
            found = orjson.loads(line)
            yield tuple(_changed([found[name] for name in names], changes))


# ── Parquet ──────────────────────────────────────────────────────────────────────────────────


def _is_text_in_parquet(column: Column) -> bool:
    """Say whether a number has no bounds that Parquet could have, and so is kept as its digits."""
    if travels_as(column) is not Kind.DECIMAL:
        return False
    digits = digits_of(column.type)
    return digits is None or not 0 <= digits.scale <= digits.precision <= _DECIMAL256


def _arrow_type(column: Column) -> Any:  # noqa: ANN401 - pyarrow is imported when it is used
    import pyarrow as pa  # noqa: PLC0415 - as above

    kind, digits = travels_as(column), digits_of(column.type)
    if kind is Kind.INT:
        return {"smallint": pa.int16(), "integer": pa.int32()}.get(column.type, pa.int64())
    if kind is Kind.FLOAT:
        return pa.float32() if column.type == "real" else pa.float64()
    if kind is Kind.DECIMAL and digits is not None and not _is_text_in_parquet(column):
        wide = digits.precision > _DECIMAL128
        return (pa.decimal256 if wide else pa.decimal128)(digits.precision, digits.scale)
    others = {
        Kind.BOOL: pa.bool_(),
        Kind.BYTES: pa.binary(),
        Kind.DATE: pa.date32(),
        Kind.TIME: pa.time64("us"),
        Kind.TIMESTAMP: pa.timestamp("us"),
        Kind.TIMESTAMPTZ: pa.timestamp("us", tz="UTC"),
    }
    return others.get(kind, pa.string())


class _ParquetWriter:
    """Parquet with zstd; rows wait in Arrow's compact form until a row group is full."""

    def __init__(self, file: Hashed, columns: Sequence[Column], stream: str) -> None:
        import pyarrow as pa  # noqa: PLC0415 - imported when it is used
        from pyarrow import parquet  # noqa: PLC0415 - as above

        self._columns = columns
        self._stream = stream
        self._schema = pa.schema(
            [pa.field(c.name, _arrow_type(c), nullable=c.nullable) for c in columns]
        )
        self._pool = pa.system_memory_pool()  # Arrow's own keeps what was freed
        self._writer = parquet.ParquetWriter(
            file, self._schema, compression="zstd", memory_pool=self._pool
        )
        self._waiting: list[Any] = []
        self._rows = self._bytes = 0

    def write(self, group: RowGroup) -> None:
        """Take rows; ConfigError names the column whose value Parquet cannot hold."""
        import pyarrow as pa  # noqa: PLC0415 - as above

        values = zip(*group.rows, strict=True)
        arrays = [self._array(c, v) for c, v in zip(self._columns, values, strict=True)]
        self._waiting.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._rows += len(group.rows)
        self._bytes += group.size
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    def _array(self, column: Column, values: Sequence[Any]) -> Any:  # noqa: ANN401 - as above
        import pyarrow as pa  # noqa: PLC0415 - as above

        if travels_as(column) is Kind.UUID:
            values = [None if v is None else str(v) for v in values]
        elif _is_text_in_parquet(column):
            values = [None if v is None else format(v, "f") for v in values]
        try:
            return pa.array(values, type=_arrow_type(column), memory_pool=self._pool)
        except (pa.ArrowException, ValueError, OverflowError):  # their text quotes the value
            raise ConfigError(
                f"{self._stream}: column {column.name} holds what a {column.type} of Parquet "
                "cannot hold, e.g. NaN; read a view that maps it, or use format: jsonl",
                code="data_refused",
            ) from None

    def _flush(self) -> None:
        import pyarrow as pa  # noqa: PLC0415 - as above

        if self._waiting:
            table = pa.Table.from_batches(self._waiting, schema=self._schema)
            self._writer.write_table(table, row_group_size=max(self._rows, 1))
        self._waiting, self._rows, self._bytes = [], 0, 0

    def close(self) -> None:
        """Write what waits, and the footer."""
        self._flush()
        self._writer.close()


def _read_parquet(path: Path, columns: Sequence[Column]) -> Iterator[Row]:
    from pyarrow import parquet  # noqa: PLC0415 - imported when it is used

    by = {i: Decimal for i, column in enumerate(columns) if _is_text_in_parquet(column)}
    uuids = {i: UUID for i, column in enumerate(columns) if travels_as(column) is Kind.UUID}
    changes = list(chain(by.items(), uuids.items()))
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_READ_ROWS, use_threads=False):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield tuple(_changed(row, changes)) if changes else row
