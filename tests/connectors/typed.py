"""Two databases whose sessions show values in one fixed way, and a stream for each type."""

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import sql

from connectors import registry
from schemas.records import LoadRequest, StreamResult, WireFormat
from schemas.streams import StreamSpec
from tests.connectors.type_cases import Case
from tests.world import LOOSE

#: Whatever a login has set: both ends are looked at with these.
_SIGHT = {
    "search_path": "pg_catalog",
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "extra_float_digits": "3",
    "xmloption": "content",
    "array_nulls": "on",
    "quote_all_identifiers": "off",
}
#: What the logins are set to: nothing of it may show in what arrives.
_HOSTILE = {
    "TimeZone": "Asia/Kathmandu",
    "DateStyle": "German, DMY",
    "IntervalStyle": "sql_standard",
    "bytea_output": "escape",
    "extra_float_digits": "-5",
    "xmloption": "document",
    "array_nulls": "off",
    "quote_all_identifiers": "on",
    "default_transaction_isolation": "serializable",
}


class Ends:
    """A source and a destination, each with a session of ours and one of the product's."""

    def __init__(self, sessions: dict[str, psycopg.Connection], configs, secrets) -> None:
        self.sessions = sessions
        for session in sessions.values():
            for name, value in _SIGHT.items():
                session.execute("SELECT set_config(%s, %s, false)", (name, value))
            for role in ("reader", "writer"):
                for name, value in _HOSTILE.items():
                    session.execute(
                        sql.SQL("ALTER ROLE {} IN DATABASE {} SET {} = {}").format(
                            sql.Identifier(role),
                            sql.Identifier(session.info.dbname),
                            sql.Identifier(name),
                            sql.Literal(value),
                        )
                    )
        self.connection_id, self.fence = uuid4(), 0
        self._source = registry.open_source("postgres", configs["source"], secrets["source"], LOOSE)
        self._destination = registry.open_destination(
            "postgres", configs["destination"], secrets["destination"], LOOSE
        )
        self.notes: tuple[str, ...] = ()
        self.versions = (0, 0)

    def close(self) -> None:
        self._source.close()
        self._destination.close()
        for session in self.sessions.values():
            session.close()

    def run(self, role: str, *statements: str | sql.Composed) -> None:
        for statement in statements:
            self.sessions[role].execute(statement)

    def rows(self, role: str, query: str | sql.Composed) -> list[tuple[Any, ...]]:
        return self.sessions[role].execute(query).fetchall()

    def sync(self, table: str, **spec) -> StreamResult:
        """Move one stream once, in the sessions that all others have used before."""
        stream = StreamSpec(name=f"public.{table}", **spec)
        self.fence += 1
        request = LoadRequest(self.connection_id, uuid4(), 1, self.fence, stream, "acme")
        known = self._destination.claim_stream(request)
        with self._source.extract(stream, known.cursor, WireFormat.PG_BINARY) as batches:
            (batch,) = batches
            self.notes = batch.notes
            return self._destination.load(request, batch)

    def discover(self):
        return self._source.discover()

    # ── a table for a type ───────────────────────────────────────────────────────────────────

    def make(self, case: Case, name: str) -> None:
        """A table with every value of a type by itself, and in arrays of every form."""
        values = [f"({value})" for value in case.values]
        arrays = [
            f"ARRAY[{', '.join([*values, 'NULL'])}]::{case.type}[]",
            f"'{{}}'::{case.type}[]",
            f"ARRAY[ARRAY[{values[0]}, NULL], ARRAY[{values[-1]}, {values[0]}]]::{case.type}[]",
            f"('[-1:0]=' || ARRAY[{values[0]}, {values[-1]}]::{case.type}[]::text)::{case.type}[]",
            "NULL",
        ]
        table = sql.Identifier("public", name)
        self.run(
            "source",
            sql.SQL("CREATE TABLE {} (id int PRIMARY KEY, v {}, a {})").format(
                table, sql.SQL(case.type), sql.SQL(f"{case.type}[]")
            ),
        )
        for n in range(max(len(values), len(arrays))):
            value = values[n] if n < len(values) else "NULL"
            array = arrays[n % len(arrays)]
            self.run(
                "source",
                sql.SQL("INSERT INTO {} VALUES ({}, {}, {})").format(
                    table, sql.Literal(n), sql.SQL(value), sql.SQL(array)
                ),
            )
        view = sql.Identifier("public", f"{name} bag")
        self.run("source", sql.SQL("CREATE VIEW {} AS SELECT v, a FROM {}").format(view, table))
        self.run("source", "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")

    def images(self, role: str, name: str, case: Case, columns: Sequence[str] = ("v", "a")):
        """Every value as text and, where numbers of types are the same everywhere, as its bytes."""
        schema = {"source": "public", "destination": "acme"}[role]
        shown = [sql.SQL("{}::text").format(sql.Identifier(c)) for c in columns]
        if not (case.own or case.otherwise or case.extension):
            row = sql.SQL(", ").join(map(sql.Identifier, columns))
            shown.append(sql.SQL("encode(record_send(ROW({})), 'hex')").format(row))
        query = sql.SQL("SELECT {} FROM {}").format(
            sql.SQL(", ").join(shown), sql.Identifier(schema, name)
        )
        return sorted(self.rows(role, query), key=repr)

    def type_of(self, name: str, column: str) -> str:
        """The exact type of a column at the destination."""
        ((found,),) = self.rows(
            "destination",
            sql.SQL(
                "SELECT format_type(atttypid, atttypmod) FROM pg_attribute "
                "WHERE attrelid = {}::regclass AND attname = {}"
            ).format(sql.Literal(sql.Identifier("acme", name).as_string()), sql.Literal(column)),
        )
        return found

    def check(self, case: Case, *, name: str = "", type_: str = "") -> None:
        """First load, re-read, update and insert; by key and without one; each exact."""
        name = name or case.name
        self.make(case, name)
        merge = {"mode": "merge", "key": ("id",)}
        first = self.sync(name, **merge)
        here = self.images("source", name, case)
        assert self.images("destination", name, case) == here
        assert first.rows_inserted == len(here)
        again = self.sync(name, **merge)
        assert (again.rows_unchanged, again.rows_updated) == (len(here), 0), "rewritten"
        table = sql.Identifier("public", name)
        self.run(
            "source",
            sql.SQL(
                "UPDATE {0} SET v = NULL, a = (SELECT a FROM {0} WHERE id = 2) WHERE id = 0"
            ).format(table),
            sql.SQL("UPDATE {0} SET v = (SELECT v FROM {0} WHERE id = 1) WHERE id = 4").format(
                table
            ),
            sql.SQL("INSERT INTO {0} SELECT 99, v, a FROM {0} WHERE id = 3").format(table),
        )
        here = self.images("source", name, case)
        changed = self.sync(name, **merge)
        assert self.images("destination", name, case) == here
        assert changed.rows_inserted == 1
        assert changed.rows_updated + changed.rows_unchanged == len(here) - 1
        assert changed.rows_updated in {1, 2}  # row 4 stays as it is where value 1 is NULL, too
        self._check_bag(case, f"{name} bag", here)
        if type_:
            assert self.type_of(name, "v") == type_

    def _check_bag(self, case: Case, name: str, here: list[tuple[Any, ...]]) -> None:
        """Without a key, in every way: new, unchanged, and a row more and a row less."""
        assert self.sync(name, mode="replace").rows_inserted == len(here)
        assert self.images("destination", name, case) == here
        assert self.sync(name, mode="replace").rows_unchanged == len(here)
        table = sql.Identifier("public", case.name if name == f"{case.name} bag" else name[:-4])
        self.run("source", sql.SQL("DELETE FROM {} WHERE id = 2").format(table))
        result = self.sync(name, mode="replace")
        assert (result.rows_deleted, result.rows_inserted) == (1, 0)
        assert self.images("destination", name, case) == self.images("source", name, case)
