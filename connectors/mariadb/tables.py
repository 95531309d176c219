"""MariaDB without its driver: settings, what a table is, names as SQL.

The driver is in link.py, which only a worker that reads MariaDB imports.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from connectors import authority
from connectors.authority import AuthorityFile
from connectors.mariadb.values import Convert, Declared, reader
from connectors.net import Host
from schemas.records import Column

SECRET_FIELDS = ("password",)
#: Settings that say where the password is sent.
AIMED_BY = ("host", "port")

#: Engines whose tables are read as of one moment.
_WITH_SNAPSHOT = frozenset({"InnoDB"})
_READABLE = ("BASE TABLE", "VIEW", "SYSTEM VERSIONED")


class MariadbConfig(BaseModel):
    """Clear settings of a MariaDB resource. There is no way around TLS."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    host: Host
    port: int = Field(3306, ge=1, le=65535)
    database: str = Field(min_length=1, max_length=64, pattern=r"^[^\x00.]+$")
    user: str = Field(min_length=1, max_length=128, pattern=r"^[^\x00]+$")
    sslrootcert: AuthorityFile = authority.SYSTEM

    @property
    def where(self) -> str:
        """Name the server and database for people."""
        return f"{self.host}:{self.port}/{self.database}"


class Asking(Protocol):
    """A session as far as small questions go."""

    def all(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return all rows of a small answer, each value as the server writes it."""
        ...


def quoted(name: str) -> str:
    """Return a name as SQL; a per cent sign is doubled for the driver."""
    return "`" + name.replace("`", "``").replace("%", "%%") + "`"


@dataclass(frozen=True, slots=True)
class TableColumn:
    """A column: what it is here, what is selected for it, and how its values are read."""

    column: Column
    declared: Declared
    select: str
    convert: Convert | None  # None: no type of Postgres is like it
    generated: str  # auto_increment, or ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table or view: its shape, and how its values are read."""

    schema: str
    name: str
    fields: tuple[TableColumn, ...]
    key: tuple[str, ...]
    keys: tuple[tuple[str, ...], ...]  # every proven key
    snapshot: bool  # False: its engine knows none
    rows: int  # about
    #: which rows a stream takes, with the values of the condition
    rows_where: str = "1"
    rows_values: tuple[str | int, ...] = ()

    @property
    def sql(self) -> str:
        return f"{quoted(self.schema)}.{quoted(self.name)}"

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(field.column for field in self.fields)

    def is_key(self, columns: Sequence[str]) -> bool:
        """Say whether a constraint proves that these columns are a key."""
        return any(set(key) <= set(columns) for key in self.keys)

    def field(self, name: str) -> TableColumn | None:
        """Return a column by its exact name."""
        return next((f for f in self.fields if f.column.name == name), None)

    def only(self, names: Sequence[str]) -> "Table":
        """Return the same table with these columns and no others."""
        known = {field.column.name: field for field in self.fields}
        return replace(self, fields=tuple(known[name] for name in names))

    @property
    def automatic(self) -> str | None:
        """Name the column that the server numbers."""
        return next((f.column.name for f in self.fields if f.generated), None)


def names(session: Asking, schema: str) -> list[str]:
    """List the tables and views that the login may read."""
    found = session.all(
        "SELECT table_name, table_type FROM information_schema.tables WHERE table_schema = %s "
        "ORDER BY table_name",
        schema,
    )
    return [name for name, type_ in found if type_ in _READABLE]


_COLUMNS = """
SELECT c.column_name, c.data_type, c.column_type, c.is_nullable, c.numeric_precision,
       c.numeric_scale, c.datetime_precision, c.character_maximum_length, c.extra
FROM information_schema.columns AS c
WHERE c.table_schema = %s AND c.table_name = %s ORDER BY c.ordinal_position
"""


def describe(session: Asking, schema: str, name: str) -> Table | None:
    """Describe a table or view by its exact name; None if there is none that can be read."""
    found = session.all(
        "SELECT table_name, table_type, engine, table_rows FROM information_schema.tables "
        "WHERE table_schema = %s AND table_name = %s",
        schema,
        name,
    )
    row = next((r for r in found if r[0] == name and r[1] in _READABLE), None)
    if row is None:
        return None
    _, type_, engine, rows = row
    documents = _documents(session, schema, name)
    fields = [_field(r, documents) for r in session.all(_COLUMNS, schema, name)]
    keys = _keys(session, schema, name)
    return Table(
        schema=schema,
        name=name,
        fields=tuple(fields),
        key=keys.get("PRIMARY", ()),
        keys=tuple(keys.values()),
        snapshot=type_ == "VIEW" or engine in _WITH_SNAPSHOT,
        rows=int(rows or 0),
    )


def _documents(session: Asking, schema: str, name: str) -> set[str]:
    """Return the columns of JSON: long texts with a check of their own, as MariaDB makes them."""
    checks = session.all(
        "SELECT constraint_name, check_clause FROM information_schema.check_constraints "
        "WHERE constraint_schema = %s AND table_name = %s AND level = 'Column'",
        schema,
        name,
    )
    return {
        column
        for column, clause in checks
        if clause in {f"json_valid({quoted(column).replace('%%', '%')})", f'json_valid("{column}")'}
    }


def _field(row: tuple[Any, ...], documents: set[str]) -> TableColumn:
    name, data_type, column_type, nullable, precision, scale, fraction, length, extra = row
    declared = Declared(
        data_type="json" if name in documents else data_type,
        column_type=column_type,
        precision=_number(precision),
        scale=_number(scale),
        fraction=_number(fraction),
        length=_number(length),
    )
    means, text = quoted(name), reader(declared)
    select = f"t.{means}"
    if data_type == "float":  # its text has six digits; as a double it has all of them
        select = f"CAST({select} AS DOUBLE)"
    elif data_type == "bit":
        select = f"{select} + 0"
    return TableColumn(
        column=Column(name, text.type, nullable=nullable == "YES", as_text=text.as_text),
        declared=declared,
        select=select,
        convert=text.convert,
        generated="auto_increment" if "auto_increment" in extra else "",
    )


def _number(value: str | None) -> int | None:
    return None if value is None else int(value)


def _keys(session: Asking, schema: str, name: str) -> dict[str, tuple[str, ...]]:
    """Return unique indexes over whole columns that are never NULL, by name."""
    parts = session.all(
        "SELECT index_name, column_name, sub_part, nullable FROM information_schema.statistics "
        "WHERE table_schema = %s AND table_name = %s AND non_unique = 0 "
        "ORDER BY index_name, seq_in_index",
        schema,
        name,
    )
    found: dict[str, tuple[str, ...]] = {}
    partial = {i for i, column, sub, nullable in parts if not column or sub or nullable == "YES"}
    for index, column, _, _ in parts:
        if index not in partial:
            found[index] = (*found.get(index, ()), column)
    return found
