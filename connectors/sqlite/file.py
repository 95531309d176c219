"""A SQLite file opened for reading only: settings, session, errors in our words, what a table is.

The file is not ours and may be hostile: nothing is attached, no extension is loaded, views cannot
call functions with effects, and a value has a largest size.
"""

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from connectors.local_files import PathBelow
from connectors.portable import travels_as
from connectors.sqlite.values import Convert, converter, read_text, sql_type
from schemas.errors import ConfigError, SyncwardError, TransientError
from schemas.records import Column

#: The one database of a file, in the place of a schema.
SCHEMA = "main"
#: Bytes of the largest value; a row of several of them must still fit into a worker.
VALUE_MAX = 256 * 2**20
#: Seconds to wait for a writer; more would outlast a request to cancel.
BUSY_S = 1.0
#: pragma_table_list came with it.
_OLDEST = (3, 37, 0)


class SqliteConfig(BaseModel):
    """Clear settings of a SQLite resource."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    path: PathBelow


_ALLOWED = frozenset(
    {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_RECURSIVE,
        sqlite3.SQLITE_TRANSACTION,
    }
)
_PRAGMAS = frozenset(
    {"table_list", "table_xinfo", "index_list", "index_info", "journal_mode", "schema_version"}
)


def _authorize(action: int, first: str | None, second: str | None, *_rest: str | None) -> int:
    """Allow reading; the statement that asks for anything else is not even prepared."""
    allowed = (
        action in _ALLOWED
        or (action == sqlite3.SQLITE_FUNCTION and second != "load_extension")
        or (action == sqlite3.SQLITE_PRAGMA and first in _PRAGMAS)
        # what SQLite asks itself when a pragma is first read as a table; the file is read-only
        or (action == sqlite3.SQLITE_UPDATE and first == "sqlite_master")
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def connect(file: Path, path: str) -> sqlite3.Connection:
    """Open the file; other threads may interrupt the session."""
    if sqlite3.sqlite_version_info < _OLDEST:
        raise ConfigError(
            f"{path}: this worker's SQLite is {sqlite3.sqlite_version}; it must be 3.37 or later"
        )
    with translated(path):
        conn = sqlite3.connect(
            f"file:{quote(str(file))}?mode=ro",
            uri=True,
            timeout=BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
        conn.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_MAX)
        conn.execute("PRAGMA trusted_schema = OFF")
        conn.execute("PRAGMA query_only = ON")
        conn.execute("PRAGMA cell_size_check = ON")
        conn.text_factory = read_text
        conn.set_authorizer(_authorize)
    return conn


_CONFIG = {
    "SQLITE_NOTADB": ("is no SQLite database, or an encrypted one", "config"),
    "SQLITE_CORRUPT": (
        "is damaged; restore it (PRAGMA integrity_check says how much)",
        "corrupted",
    ),
    "SQLITE_CANTOPEN": (
        "cannot be opened; WAL mode also needs the -wal and -shm files, for the worker's login",
        "permission",
    ),
    "SQLITE_PERM": ("the worker's login has no right to it", "permission"),
    "SQLITE_AUTH": ("a view does more than reading; choose another stream", "permission"),
    "SQLITE_TOOBIG": (
        f"holds a value of more than {VALUE_MAX >> 20} MiB; read a view that leaves it out",
        "data_refused",
    ),
}
_TRANSIENT = {
    "SQLITE_BUSY": ("another process is writing to it", "lock_timeout"),
    "SQLITE_LOCKED": ("another process is writing to it", "lock_timeout"),
    "SQLITE_READONLY": ("its last writer died; let one open it and close it again", "transient"),
    "SQLITE_INTERRUPT": ("the read was cancelled", "cancelled_there"),
    "SQLITE_IOERR": ("the worker's disk fails", "server_io"),
    "SQLITE_NOMEM": ("the worker has no memory for it", "out_of_memory"),
}


@contextmanager
def translated(path: str) -> Iterator[None]:
    """Turn SQLite's errors into ours; their text may quote rows, ours never does."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.DatabaseError) as error:
        if isinstance(error, sqlite3.ProgrammingError):  # our bug, shown to nobody as such
            raise
        raise explain(error, path) from error


def explain(error: sqlite3.Error, path: str) -> SyncwardError:
    """Say in our words who can act; extended codes begin with the primary one."""
    name = str(getattr(error, "sqlite_errorname", None))
    for table, kind in ((_CONFIG, ConfigError), (_TRANSIENT, TransientError)):
        for code, (says, ours) in table.items():
            if name == code or name.startswith(f"{code}_"):
                return kind(f"{path}: {says}", code=ours)
    return ConfigError(
        f"{path}: SQLite refused the query; does the view still work there, and does the table use "
        "nothing but what SQLite itself has?",
        code="refused_there",
    )


def quoted(name: str) -> str:
    """Return a name as SQL; always behind `t.`, as a name alone may be read as a text."""
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True, slots=True)
class Table:
    """A table or view of the file: its shape, and how its values are read."""

    name: str
    columns: tuple[Column, ...]
    converters: tuple[Convert, ...]
    key: tuple[str, ...]
    keys: tuple[tuple[str, ...], ...]  # every proven key
    rowid: str | None  # what to select for a row's place; None for views and WITHOUT ROWID
    alias: str | None  # the INTEGER PRIMARY KEY
    ever_new: bool  # AUTOINCREMENT: a number is never used again

    def is_key(self, columns: tuple[str, ...]) -> bool:
        """Say whether a constraint proves that these columns are a key."""
        return any(set(key) <= set(columns) for key in self.keys)

    def only(self, names: Sequence[str]) -> "Table":
        """Return the same table with these columns and no others."""
        places = [[c.name for c in self.columns].index(name) for name in names]
        return replace(
            self,
            columns=tuple(self.columns[i] for i in places),
            converters=tuple(self.converters[i] for i in places),
        )

    def column(self, name: str) -> Column | None:
        """Return a column by its name."""
        return next((c for c in self.columns if c.name == name), None)


def names(conn: sqlite3.Connection) -> list[tuple[str, str]]:
    """List (name, type) of the tables and views that can be read."""
    found = conn.execute(
        "SELECT name, type FROM pragma_table_list WHERE schema = 'main' "
        "AND type IN ('table', 'view', 'virtual') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' "
        "ORDER BY name"
    )
    return [(name, type_) for name, type_ in found]


def describe(conn: sqlite3.Connection, name: str) -> Table | None:
    """Describe a table or view by its exact name; None if there is none."""
    row = conn.execute(
        "SELECT type, wr FROM pragma_table_list WHERE schema = 'main' AND name = ? "
        "AND type IN ('table', 'view', 'virtual')",
        (name,),
    ).fetchone()
    if row is None:
        return None
    type_, without_rowid = row
    info = conn.execute(
        'SELECT name, type, "notnull", pk FROM pragma_table_xinfo(?) WHERE hidden <> 1 '
        "ORDER BY cid",
        (name,),
    ).fetchall()
    indexes = conn.execute(
        'SELECT name, origin FROM pragma_index_list(?) WHERE "unique" = 1 AND partial = 0', (name,)
    ).fetchall()
    key = tuple(n for n, _, _, _ in sorted((i for i in info if i[3]), key=lambda i: i[3]))
    alias = _alias(info, key, indexes) if type_ == "table" and not without_rowid else None
    never_null = {
        n for n, _, notnull, pk in info if notnull or n == alias or (pk and without_rowid)
    }
    proven = [key] if key else []
    proven += [_index_columns(conn, index) for index, _ in indexes]
    columns = tuple(_column(n, declared, n in never_null) for n, declared, _, _ in info)
    return Table(
        name=name,
        columns=columns,
        converters=tuple(converter(c.type, travels_as(c), as_text=c.as_text) for c in columns),
        key=key,
        keys=tuple(k for k in proven if k and set(k) <= never_null),
        rowid=None if type_ != "table" or without_rowid else _rowid({n.lower() for n, *_ in info}),
        alias=alias,
        ever_new=alias is not None and _autoincrement(conn, name),
    )


def _column(name: str, declared: str, never_null: bool) -> Column:  # noqa: FBT001 - one call
    type_, as_text = sql_type(declared)
    return Column(name, type_, nullable=not never_null, as_text=as_text)


def _alias(
    info: list[tuple[str, str, int, int]], key: tuple[str, ...], indexes: list[tuple[str, str]]
) -> str | None:
    """Name the column that is the rowid itself: its primary key needs no index."""
    if len(key) != 1 or any(origin == "pk" for _, origin in indexes):
        return None
    return next((n for n, declared, _, pk in info if pk and declared.upper() == "INTEGER"), None)


def _index_columns(conn: sqlite3.Connection, index: str) -> tuple[str, ...]:
    """Return the columns of a unique index; () if it is over an expression."""
    found = [n for (n,) in conn.execute("SELECT name FROM pragma_index_info(?)", (index,))]
    return () if None in found else tuple(found)


def _rowid(taken: set[str]) -> str | None:
    return next((name for name in ("rowid", "_rowid_", "oid") if name not in taken), None)


def _autoincrement(conn: sqlite3.Connection, name: str) -> bool:
    row = conn.execute(
        "SELECT sql FROM sqlite_schema WHERE type = 'table' AND name = ?", (name,)
    ).fetchone()
    return row is not None and bool(re.search(r"\bAUTOINCREMENT\b", str(row[0]), re.IGNORECASE))
