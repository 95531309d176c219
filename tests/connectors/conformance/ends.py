"""What the suite must know of each connector: how to fill a source, how to look into a destination.

A new connector is one file in connectors/ and one class here, listed in SOURCES or DESTINATIONS.
Nothing here uses the connectors' own code to read or write: files are read as their readers would.
"""

import functools
import json
import re
import secrets
import sqlite3
from base64 import b64decode
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from threading import Event
from typing import Any, cast
from uuid import UUID, uuid4

from psycopg import sql
from pyarrow import parquet

from connectors.child.installed import Kind
from schemas.children import ChildPolicy
from schemas.egress import LinkPolicy
from tests.children.installing import install, policy_of
from tests.rest_api import Api, Asked, Reply

#: Column name and the SQL type that arrives: what every source here can make.
Columns = Sequence[tuple[str, str]]


def image(value: object) -> str | None:  # noqa: PLR0911 - one return per type
    """A value as text that is the same whichever system it comes from, and no other value's."""
    match value:
        case None:
            return None
        case bool():
            return str(value).lower()
        case Decimal():
            return format(value, "f")
        case datetime() if value.tzinfo is not None:
            return value.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"
        case date() | time():  # datetime, too
            return value.isoformat()
        case bytes():
            return value.hex()
        case memoryview():
            return bytes(value).hex()
        case float() | int():
            return repr(value)
        case _:
            return str(value)


def images(rows: Iterable[Sequence[object]]) -> list[tuple[str | None, ...]]:
    return sorted((tuple(image(v) for v in row) for row in rows), key=repr)


def of_postgres(pair, role: str, schema: str, table: str) -> list[tuple[str | None, ...]]:
    """The rows of a table without our own column; JSON as its text."""
    names = pair.rows(
        role,
        "SELECT attname, atttypid IN ('json'::regtype, 'jsonb'::regtype) FROM pg_attribute "
        f"WHERE attrelid = '{schema}.\"{table}\"'::regclass AND attnum > 0 "
        "AND NOT attisdropped AND attname !~ '^_syncward' ORDER BY attnum",
    )
    columns = sql.SQL(", ").join(
        sql.SQL("{}::text" if cast else "{}").format(sql.Identifier(name)) for name, cast in names
    )
    query = sql.SQL("SELECT {} FROM {}").format(columns, sql.Identifier(schema, table))
    return images(pair.rows(role, query))


# ── sources ──────────────────────────────────────────────────────────────────────────────────


class PostgresSource:
    kind = "postgres"
    schema = "public"
    #: how a stream reads what is new, and what has changed
    append_cursor = "xmin"
    merge_cursor = "xmin"
    endless = "SELECT generate_series(1, 1000000000000) AS id"
    silent = "SELECT 1 AS id FROM pg_sleep(3600)"

    def __init__(self, pair, root: Path) -> None:
        del root
        self.pair = pair
        self.config = pair.config("source")
        self.secrets = pair.secret("source")

    def _act(self, statement: str, values: Sequence[object] = ()) -> None:
        self.pair.session("source").execute(statement, values)

    def create(self, table: str, columns: Columns, key: str | None = "id") -> None:
        parts = [f'"{n}" {t}{" PRIMARY KEY" if n == key else ""}' for n, t in columns]
        self.pair.source(f'CREATE TABLE "{table}" ({", ".join(parts)})')

    def insert(self, table: str, rows: Iterable[Sequence[object]]) -> None:
        for row in rows:
            self._act(f'INSERT INTO "{table}" VALUES ({", ".join(["%s"] * len(row))})', row)

    def update(self, table: str, row_id: int, name: str, value: object) -> None:
        self._act(f'UPDATE "{table}" SET "{name}" = %s WHERE id = %s', (value, row_id))

    def delete(self, table: str, row_id: int) -> None:
        self._act(f'DELETE FROM "{table}" WHERE id = %s', (row_id,))

    def alter(self, statement: str) -> None:
        self.pair.source(statement)

    def view(self, name: str, query: str) -> None:
        self.pair.source(f"CREATE VIEW {name} AS {query}")

    def wide(self, table: str, rows: int, size: int) -> None:
        """Rows with a text that no compression makes small."""
        self.pair.source(
            f"CREATE TABLE {table} (id bigint PRIMARY KEY, pad text)",
            f"INSERT INTO {table} SELECT g, (SELECT string_agg(md5((g * 1000 + i)::text), '') "
            f"FROM generate_series(1, {size // 32}) i) FROM generate_series(1, {rows}) g",
        )

    def rows(self, table: str) -> list[tuple[str | None, ...]]:
        return of_postgres(self.pair, "source", "public", table)


_DECLARED = {
    "boolean": "BOOLEAN", "bigint": "INTEGER", "double precision": "DOUBLE", "bytea": "BLOB",
    "numeric(12,2)": "DECIMAL(12, 2)", "numeric": "NUMERIC", "date": "DATE", "text": "TEXT",
    "time without time zone": "TIME", "timestamp without time zone": "DATETIME",
    "timestamp with time zone": "TIMESTAMPTZ", "uuid": "UUID", "json": "JSON",
}  # fmt: skip


def stored(value: object) -> object:
    """A value as an application stores it in SQLite."""
    match value:
        case Decimal() | UUID():
            return str(value)
        case datetime():
            return value.isoformat(" ")
        case date() | time():
            return value.isoformat()
        case _:
            return value


class SqliteSource:
    kind = "sqlite"
    schema = "main"
    append_cursor = "id"
    merge_cursor = "changed"
    endless = (
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x AS id FROM c"
    )
    silent = f"SELECT id FROM ({endless}) WHERE id < 0"

    def __init__(self, pair, root: Path) -> None:
        del pair
        self.file = root / "shop" / "orders.db"
        self.file.parent.mkdir(parents=True)
        self.config = {"path": "shop/orders.db"}
        self.secrets: dict[str, str] = {}
        self._types: dict[str, list[str]] = {}
        self.alter("PRAGMA journal_mode = WAL")

    def _act(
        self, statement: str, rows: Iterable[Sequence[object]] = ((),)
    ) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.file)) as db, db:
            return [r for row in rows for r in db.execute(statement, [stored(v) for v in row])]

    def create(self, table: str, columns: Columns, key: str | None = "id") -> None:
        own = " PRIMARY KEY AUTOINCREMENT"
        parts = [f'"{n}" {_DECLARED[t]}{own if n == key else ""}' for n, t in columns]
        self._types[table] = [t for _, t in columns]
        self._act(f'CREATE TABLE "{table}" ({", ".join(parts)})')

    def insert(self, table: str, rows: Iterable[Sequence[object]]) -> None:
        rows = list(rows)
        self._act(f'INSERT INTO "{table}" VALUES ({", ".join("?" * len(rows[0]))})', rows)

    def update(self, table: str, row_id: int, name: str, value: object) -> None:
        self._act(
            f'UPDATE "{table}" SET "{name}" = ?, changed = ? WHERE id = ?',
            [(value, datetime.now(UTC), row_id)],
        )

    def delete(self, table: str, row_id: int) -> None:
        self._act(f'DELETE FROM "{table}" WHERE id = ?', [(row_id,)])

    def alter(self, statement: str) -> None:
        self._act(statement)

    def view(self, name: str, query: str) -> None:
        self._act(f"CREATE VIEW {name} AS {query}")

    def wide(self, table: str, rows: int, size: int) -> None:
        self._act(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, pad TEXT)")
        self._act(
            f"WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < {rows}) "
            f"INSERT INTO {table} SELECT x, hex(randomblob({size // 2})) FROM c"
        )
        self._types[table] = ["bigint", "text"]

    def rows(self, table: str) -> list[tuple[str | None, ...]]:
        found = self._act(f'SELECT * FROM "{table}"')
        types = self._types[table]
        return images(tuple(meant(v, t) for v, t in zip(r, types, strict=True)) for r in found)


def meant(value: object, type_: str) -> object:
    """What a stored value of SQLite means under its declared type."""
    if value is None:
        return None
    readers: dict[str, Callable[[Any], object]] = {
        "boolean": bool,
        "numeric": lambda v: Decimal(repr(v) if isinstance(v, float) else v),
        "numeric(12,2)": lambda v: Decimal(repr(v)).quantize(Decimal("0.01")),
        "date": date.fromisoformat, "time without time zone": time.fromisoformat,
        "timestamp without time zone": datetime.fromisoformat,
        "timestamp with time zone": datetime.fromisoformat,
    }  # fmt: skip
    return readers.get(type_, lambda v: v)(value)


_DECLARED_THERE = {
    "boolean": "BOOLEAN", "bigint": "BIGINT", "double precision": "DOUBLE", "bytea": "LONGBLOB",
    "numeric(12,2)": "DECIMAL(12, 2)", "numeric": "DECIMAL(65, 20)", "date": "DATE",
    "text": "LONGTEXT", "time without time zone": "TIME(6)", "uuid": "UUID", "json": "JSON",
    "timestamp without time zone": "DATETIME(6)", "timestamp with time zone": "TIMESTAMP(6)",
}  # fmt: skip
#: A TIMESTAMP of MariaDB 10.11 holds nothing else.
_FIRST, _LAST = datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), datetime(2038, 1, 19, tzinfo=UTC)


class MariadbSource:
    """Needs Debian's packages, so it is marked `full`; its server starts with the first test."""

    kind = "mariadb"
    append_cursor = "id"
    merge_cursor = "changed"
    endless = "SELECT seq AS id FROM seq_1_to_1000000000000"
    silent = "SELECT SLEEP(3600) + seq AS id FROM seq_1_to_2"

    def __init__(self, pair, root: Path) -> None:
        from tests.mariadb import server

        del pair, root
        self._server = server()
        self.schema, self.config, self.secrets = self._server.database()
        self._types: dict[str, list[str]] = {}

    def _act(
        self, statement: str, rows: Iterable[Sequence[object]] = ((),)
    ) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        with self._server.connect(self.schema) as session, session.cursor() as cursor:
            for row in rows:
                cursor.execute(statement, [self._stored(v) for v in row] or None)
                found += cursor.fetchall()
        return found

    @staticmethod
    def _stored(value: object) -> object:
        match value:
            case datetime() if value.tzinfo is not None:
                return min(max(value, _FIRST), _LAST).astimezone(UTC).replace(tzinfo=None)
            case UUID():
                return str(value)
            case _:
                return value

    def create(self, table: str, columns: Columns, key: str | None = "id") -> None:
        own = " AUTO_INCREMENT PRIMARY KEY"
        parts = [f'"{n}" {_DECLARED_THERE[t]}{own if n == key else " NULL"}' for n, t in columns]
        self._types[table] = [t for _, t in columns]
        self._act(f'CREATE TABLE "{table}" ({", ".join(parts)})')

    def insert(self, table: str, rows: Iterable[Sequence[object]]) -> None:
        rows = list(rows)
        marks = ", ".join(["%s"] * len(rows[0]))
        self._act(f'INSERT INTO "{table}" VALUES ({marks})', rows)

    def update(self, table: str, row_id: int, name: str, value: object) -> None:
        self._act(
            f'UPDATE "{table}" SET "{name}" = %s, changed = NOW(6) WHERE id = %s',
            [(value, row_id)],
        )

    def delete(self, table: str, row_id: int) -> None:
        self._act(f'DELETE FROM "{table}" WHERE id = %s', [(row_id,)])

    def alter(self, statement: str) -> None:
        self._act(statement)

    def view(self, name: str, query: str) -> None:
        self._act(f"CREATE VIEW {name} AS {query}")

    def wide(self, table: str, rows: int, size: int) -> None:
        self._act(f"CREATE TABLE {table} (id BIGINT AUTO_INCREMENT PRIMARY KEY, pad LONGTEXT)")
        self._act(f"INSERT INTO {table} SELECT seq, HEX(RANDOM_BYTES(1024)) FROM seq_1_to_{rows}")
        pieces = ", ".join(["pad"] * (size // 2_048))
        self._act(f"UPDATE {table} SET pad = CONCAT({pieces})")
        self._types[table] = ["bigint", "text"]

    def rows(self, table: str) -> list[tuple[str | None, ...]]:
        return images(
            tuple(self._meant(v, t) for v, t in zip(r, self._types[table], strict=False))
            for r in self._act(f'SELECT * FROM "{table}"')
        )

    @staticmethod
    def _meant(value: object, type_: str) -> object:
        match type_, value:
            case "boolean", int():
                return bool(value)
            case "time without time zone", timedelta():
                return (datetime.min.replace(tzinfo=UTC) + value).time()
            case "timestamp with time zone", datetime():
                return value.replace(tzinfo=UTC)
            case _:
                return value


#: What SQL types of the suite are in JSON, as a manifest's schema names it; all others are texts.
_IN_JSON = {
    "boolean": "boolean", "bigint": "integer", "double precision": "number", "numeric": "number",
    "numeric(12,2)": "number", "date": "date", "timestamp with time zone": "timestamp",
}  # fmt: skip


def sent(value: object) -> str:
    """A value as an API writes it, digit for digit."""
    match value:
        case Decimal():
            return format(value, "f")
        case float():
            return repr(value)
        case None | bool() | int() | str():
            return json.dumps(value)
        case _:
            return json.dumps(image(value))


def altered(
    statement: str, columns: dict[str, list[tuple[str, str]]], rows: dict[str, list[list[object]]]
) -> None:
    """Do to tables in memory what a statement says: rows set, a column added or dropped."""
    changed = re.fullmatch(r"UPDATE (\w+) SET (\w+) = '(\w+)' WHERE id IN \((.*)\)", statement)
    if changed is not None:
        place = [n for n, _ in columns[changed[1]]].index(changed[2])
        for row in rows[changed[1]]:
            if str(row[0]) in changed[4].split(", "):
                row[place] = changed[3]
        return
    found = re.fullmatch(r'ALTER TABLE "(\w+)" (ADD|DROP) COLUMN (\w+) ?(.*)', statement)
    assert found is not None
    table, name, some = found[1], found[3], columns[found[1]]
    if found[2] == "ADD":
        some.append((name, found[4]))
        rows[table] = [[*row, None] for row in rows[table]]
        return
    place = [n for n, _ in some].index(name)
    del some[place]
    for row in rows[table]:
        del row[place]


@functools.cache
def shared_api() -> Api:
    return Api()


class RestSource:
    """Tables behind an API that gives pages with a cursor and what has changed since a time."""

    kind = "rest"
    schema = "shop"
    append_cursor = None  # by time only, and none of these rows is of the time it comes at
    merge_cursor = "changed"
    endless = "endless"
    silent = "silent"
    page = 500
    step = ""  # of windows, each with a commit of its own

    def __init__(self, pair, root: Path) -> None:
        del pair
        self.api = shared_api()
        self.prefix = f"/{uuid4().hex}"
        self.file = root.parent / "shop.yaml"
        self.config = {
            "manifest": str(self.file), "parameters": {"url": f"{self.api.url}{self.prefix}"},
        }  # fmt: skip
        self.secrets = {"token": "tok-of-the-suite"}
        self._columns: dict[str, list[tuple[str, str]]] = {}
        self._keys: dict[str, str | None] = {}
        self._rows: dict[str, list[list[object]]] = {}

    def _write(self) -> None:
        streams = {name: self._stream(name, columns) for name, columns in self._columns.items()}
        manifest = {
            "version": "1", "name": "shop", "url_base": "{{ config.url }}",
            "parameters": {"url": {}}, "authenticator": {"type": "BearerAuthenticator"},
            "check": {"stream_names": [next(iter(streams))]}, "streams": streams,
        }  # fmt: skip
        self.file.write_text(json.dumps(manifest))

    def _stream(self, name: str, columns: list[tuple[str, str]]) -> dict[str, Any]:
        key = self._keys[name]
        stream: dict[str, Any] = {
            "path": f"/{name}", "raw": False, "primary_key": [key] if key else [],
            "schema": {n: _IN_JSON.get(t, "string") for n, t in columns},
            "record_selector": {"field_path": "rows"},
            "paginator": {
                "type": "CursorPagination", "cursor_value": "next",
                "page_token_option": {"field_name": "after"},
            },
        }  # fmt: skip
        if ("changed", "timestamp with time zone") in columns:
            stream["incremental_sync"] = {
                "cursor_field": "changed", "start_datetime": "2000-01-01",
                "start_time_option": {"field_name": "since"},
            }  # fmt: skip
            if self.step:
                end = {"end_time_option": {"field_name": "until"}, "step": self.step}
                stream["incremental_sync"] |= end
        return stream

    def _answer(self, table: str, asked: Asked) -> Reply:
        if asked.headers.get("authorization") != "Bearer tok-of-the-suite":
            return Reply(401)
        rows, start = self._rows[table], int(asked.query.get("after", 0))
        if "since" in asked.query:
            since = datetime.fromisoformat(asked.query["since"])
            until = datetime.fromisoformat(asked.query.get("until", "9999-12-31T00:00:00Z"))
            place = [n for n, _ in self._columns[table]].index("changed")
            rows = [row for row in rows if since <= cast("datetime", row[place]) <= until]
        names = [json.dumps(n) for n, _ in self._columns[table]]
        some = ",".join(
            "{" + ",".join(f"{n}:{sent(v)}" for n, v in zip(names, row, strict=False)) + "}"
            for row in rows[start : start + self.page]
        )
        end = start + self.page
        return Reply(
            200, f'{{"rows":[{some}],"next":{end if end < len(rows) else "null"}}}'.encode()
        )

    def create(self, table: str, columns: Columns, key: str | None = "id") -> None:
        self._columns[table], self._keys[table] = list(columns), key
        self._rows[table] = []
        self.api.routes[f"{self.prefix}/{table}"] = lambda asked: self._answer(table, asked)
        self._write()

    def insert(self, table: str, rows: Iterable[Sequence[object]]) -> None:
        self._rows[table] += [list(row) for row in rows]

    def update(self, table: str, row_id: int, name: str, value: object) -> None:
        names = [n for n, _ in self._columns[table]]
        (row,) = [r for r in self._rows[table] if r[0] == row_id]
        row[names.index(name)], row[names.index("changed")] = value, datetime.now(UTC)

    def delete(self, table: str, row_id: int) -> None:
        self._rows[table] = [r for r in self._rows[table] if r[0] != row_id]

    def alter(self, statement: str) -> None:
        altered(statement, self._columns, self._rows)
        self._write()

    def view(self, name: str, query: str) -> None:
        self.create(name, [("id", "bigint")])
        self.api.routes[f"{self.prefix}/{name}"] = (
            self._endless if query == "endless" else self._silent
        )

    def _endless(self, asked: Asked) -> Reply:
        start = int(asked.query.get("after", 0))
        rows = [{"id": n} for n in range(start, start + self.page)]
        return Reply(200, {"rows": rows, "next": start + self.page})

    def _silent(self, _asked: Asked) -> Reply:
        Event().wait(60)
        return Reply(503)

    def wide(self, table: str, rows: int, size: int) -> None:
        self.create(table, [("id", "bigint"), ("pad", "text")])
        texts = [f'{{"id":{n},"pad":"{secrets.token_hex(size // 2)}"}}' for n in range(rows)]

        def answer(asked: Asked) -> Reply:
            start = int(asked.query.get("after", 0))
            end = start + self.page
            some, after = ",".join(texts[start:end]), end if end < rows else "null"
            return Reply(200, f'{{"rows":[{some}],"next":{after}}}'.encode())

        self.api.routes[f"{self.prefix}/{table}"] = answer

    def rows(self, table: str) -> list[tuple[str | None, ...]]:
        types = [t for _, t in self._columns[table]]
        return images(
            tuple(arrives(v, t) for v, t in zip(row, types, strict=True))
            for row in self._rows[table]
        )


def arrives(value: object, type_: str) -> object:
    """What a value of the suite is behind JSON: every number a decimal, what has no type a text."""
    if isinstance(value, float):
        return Decimal(repr(value))
    return value if type_ in _IN_JSON else image(value)


class ChildSource:
    """Tables behind a connector of others, which runs as a child: a fake of our own."""

    kind: Kind
    append_cursor = "id"
    merge_cursor = "changed"
    endless = "endless"
    silent = "silent"

    def __init__(self, pair, root: Path) -> None:
        del pair
        self.data = root / "child"
        self.data.mkdir()
        connector = install(children_of(root), self.kind)
        self.schema = connector.partition("==")[0]
        self.config = {
            "connector": connector, "raw": False, "settings": {"directory": str(self.data)},
        }  # fmt: skip
        self.secrets = {"config": '{"login": "the-login-of-the-suite"}'}
        self._columns: dict[str, list[tuple[str, str]]] = {}
        self._keys: dict[str, str | None] = {}
        self._rows: dict[str, list[list[object]]] = {}

    def _write(self, table: str, **more: object) -> None:
        columns, key = self._columns[table], self._keys[table]
        names = [n for n, _ in columns]
        described = {
            "properties": {n: _schema_of(t) for n, t in columns}, "key": [key] if key else [],
            "cursors": [n for n in ("changed", "id") if n in names], **more,
        }  # fmt: skip
        (self.data / f"{table}.json").write_text(json.dumps(described))
        shown = [json.dumps(n) for n in names]
        at = names.index("changed") if "changed" in names else None
        lines = []
        for row in self._rows[table]:
            text = ",".join(f"{n}:{sent(v)}" for n, v in zip(shown, row, strict=False))
            changed = image(row[at]) if at is not None else None
            lines.append(f"{row[0]}\t{changed or ''}\t{{{text}}}\n")
        (self.data / f"{table}.rows").write_text("".join(lines))

    def create(self, table: str, columns: Columns, key: str | None = "id") -> None:
        self._columns[table], self._keys[table] = list(columns), key
        self._rows[table] = []
        self._write(table)

    def insert(self, table: str, rows: Iterable[Sequence[object]]) -> None:
        self._rows[table] += [list(row) for row in rows]
        self._write(table)

    def update(self, table: str, row_id: int, name: str, value: object) -> None:
        names = [n for n, _ in self._columns[table]]
        (row,) = [r for r in self._rows[table] if r[0] == row_id]
        row[names.index(name)], row[names.index("changed")] = value, datetime.now(UTC)
        self._write(table)

    def delete(self, table: str, row_id: int) -> None:
        self._rows[table] = [r for r in self._rows[table] if r[0] != row_id]
        self._write(table)

    def alter(self, statement: str) -> None:
        altered(statement, self._columns, self._rows)
        for table in self._columns:
            self._write(table)

    def view(self, name: str, query: str) -> None:
        self._columns[name], self._keys[name], self._rows[name] = [("id", "bigint")], "id", []
        self._write(name, **{query: True})

    def wide(self, table: str, rows: int, size: int) -> None:
        self.create(table, [("id", "bigint"), ("pad", "text")])
        with (self.data / f"{table}.rows").open("w") as file:
            for n in range(rows):
                file.write(f'{n}\t\t{{"id":{n},"pad":"{secrets.token_hex(size // 2)}"}}\n')

    def rows(self, table: str) -> list[tuple[str | None, ...]]:
        types = [t for _, t in self._columns[table]]
        return images(
            tuple(arrives(v, t) for v, t in zip(row, types, strict=True))
            for row in self._rows[table]
        )


class SingerSource(ChildSource):
    kind: Kind = "singer"


class AirbyteSource(ChildSource):
    kind: Kind = "airbyte"


def _schema_of(type_: str) -> dict[str, Any]:
    match _IN_JSON.get(type_, "string"):
        case "timestamp":
            return {"type": ["null", "string"], "format": "date-time"}
        case "date":
            return {"type": ["null", "string"], "format": "date"}
        case named:
            return {"type": ["null", named]}


def children_of(root: Path) -> Path:
    """Where connectors of others are installed, beside a directory of files."""
    return root.parent / "connectors"


# ── destinations ─────────────────────────────────────────────────────────────────────────────


class PostgresDestination:
    kind = "postgres"
    name = "postgres"

    def __init__(self, pair, root: Path) -> None:
        del root
        self.pair = pair
        self.config = pair.config("destination")
        self.secrets = pair.secret("destination")

    def rows(self, table: str) -> list[tuple[str | None, ...]] | None:
        """The rows without our own column; None if nothing was loaded yet."""
        if self.pair.rows("destination", f"SELECT to_regclass('acme.\"{table}\"')") == [(None,)]:
            return None
        return of_postgres(self.pair, "destination", "acme", table)

    def left_over(self) -> list[str]:
        return []


class FilesDestination:
    kind = "files"
    format = ""

    def __init__(self, pair, root: Path) -> None:
        del pair
        self.root = root / "lake"
        self.config = {"path": "lake", "format": self.format, "grace": "0s"}
        self.secrets: dict[str, str] = {}

    @property
    def name(self) -> str:
        return f"files-{self.format}"

    def manifest(self, table: str) -> dict[str, Any] | None:
        path = self.root / "acme" / table / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else None

    def rows(self, table: str) -> list[tuple[str | None, ...]] | None:
        manifest = self.manifest(table)
        if manifest is None or not manifest["generation"]:
            return None
        columns = [c for c in manifest["columns"] if not c["name"].startswith("_syncward")]
        found = []
        for part in manifest["files"]:
            some = self.read(self.root / "acme" / table / part["name"], columns)
            assert len(some) == part["rows"]
            found += some
        return images(found)

    def read(self, path: Path, columns: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        raise NotImplementedError

    def left_over(self) -> list[str]:
        """Files that no manifest names."""
        found = []
        for path in self.root.glob("acme/*/*"):
            manifest = self.manifest(path.parent.name)
            known = {p["name"] for p in (manifest or {"files": []})["files"]}
            if path.name not in known | {"manifest.json", ".lock"}:
                found.append(path.name)
        return found


class ParquetDestination(FilesDestination):
    format = "parquet"

    def read(self, path: Path, columns: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        table = parquet.read_table(path)
        values = table.to_pylist()
        return [tuple(row.get(c["name"]) for c in columns) for row in values]


class JsonDestination(FilesDestination):
    format = "jsonl"

    def read(self, path: Path, columns: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        return [
            tuple(self._meant(line.get(c["name"]), c["type"]) for c in columns) for line in lines
        ]

    @staticmethod
    def _meant(value: object, type_: str) -> object:
        if value is None:
            return None
        if type_ == "bytea":
            return b64decode(str(value))
        if type_ in {"real", "double precision"}:
            return float(value)  # type: ignore[arg-type]  # a number, or the name of one
        if type_.startswith("timestamp"):
            return datetime.fromisoformat(str(value))
        return value


_SOURCES = (
    PostgresSource, SqliteSource, MariadbSource, RestSource, SingerSource, AirbyteSource,
)  # fmt: skip
SOURCES: dict[str, Any] = {cls.kind: cls for cls in _SOURCES}
#: What `make test` leaves out.
FULL_ONLY = {"mariadb"}
DESTINATIONS: dict[str, Any] = {
    "postgres": PostgresDestination,
    "files-parquet": ParquetDestination,
    "files-jsonl": JsonDestination,
}


def policy(root: Path | None) -> LinkPolicy:
    return LinkPolicy(
        loopback=True, tls_required=False, superuser_refused=False, files_root=root,
        children=ChildPolicy() if root is None else policy_of(children_of(root)),
    )  # fmt: skip
