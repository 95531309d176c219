"""Who is compared: psql by hand and this engine. The rivals are in rivals.py; see Contestant."""

from enum import StrEnum
from typing import Protocol

from psycopg import sql

from benchmarks.lab import Lab, Link, Usage, measured
from storage import connections

#: The source table; each contestant has its copy of the same name in a schema of its own.
TABLE = "events"
KEY = "id"
CURSOR = "updated_at"


class Target(StrEnum):
    """A copy of the source table, and how it is kept."""

    CHANGES = "changes"  # by the cursor
    WHOLE = "whole"  # everything is read each time, without a cursor


LINKS = {
    Target.CHANGES: f"{{mode: merge, key: [{KEY}], cursor: {CURSOR}}}",
    Target.WHOLE: f"{{mode: merge, key: [{KEY}]}}",
}


class Contestant(Protocol):
    """A way to bring the source table and its changes to the destination."""

    name: str

    def schema(self, target: Target) -> str:
        """Name the schema of a target at the destination."""
        ...

    def forget(self, target: Target) -> None:
        """Make the destination as if this target had never been loaded."""
        ...

    def load(self, target: Target, *, first: bool) -> Usage:
        """Bring the target up to date; `first` into a table that is not there."""
        ...


class Hand:
    """What a database engineer types: COPY into COPY, and ON CONFLICT where rows are there."""

    name = "psql"

    def __init__(self, made: Lab) -> None:
        self._made = made
        columns = made.one(
            made.source,
            "SELECT string_agg(quote_ident(attname) || ' ' || format_type(atttypid, atttypmod) || "
            "CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END, ', ' ORDER BY attnum), "
            "string_agg(format('%1$I = excluded.%1$I', attname), ', ') "
            f"FILTER (WHERE attname <> '{KEY}') FROM pg_attribute "
            f"WHERE attrelid = '{TABLE}'::regclass AND attnum > 0",
        )
        self._columns, self._assignments = map(str, columns)

    def schema(self, target: Target) -> str:
        return f"hand_{target}"

    def forget(self, target: Target) -> None:
        schema = self.schema(target)
        self._made.act(self._made.destination, f"DROP SCHEMA IF EXISTS {schema} CASCADE")

    def load(self, target: Target, *, first: bool) -> Usage:
        schema = self.schema(target)
        table = f"{schema}.{TABLE}"
        if first:  # the key is made afterwards, which is the faster order
            return self._made.by_hand(
                f"SELECT * FROM {TABLE}",
                before=[f"CREATE SCHEMA {schema}", f"CREATE TABLE {table} ({self._columns})"],
                into=table,
                after=[f"ALTER TABLE {table} ADD PRIMARY KEY ({KEY})"],
            )
        where, asked = "true", Usage()
        if target is Target.CHANGES:
            where, asked = self._news(table)
        merge = (
            f"INSERT INTO {table} SELECT * FROM staging ON CONFLICT ({KEY}) "
            f"DO UPDATE SET {self._assignments}"
        )
        usage = self._made.by_hand(
            f"SELECT * FROM {TABLE} WHERE {where}",
            before=[f"CREATE TEMP TABLE staging (LIKE {table})"],
            into="staging",
            after=[merge],
        )
        usage.seconds += asked.seconds
        usage.cpu_seconds += asked.cpu_seconds
        return usage

    def _news(self, table: str) -> tuple[str, Usage]:
        """Ask the destination how far it is, with a psql of its own."""
        answer = self._made.root / "newest"
        answer.unlink(missing_ok=True)
        usage = measured(
            self._made.destination.tool(
                "psql", "-X", "-q", "-A", "-t", "-c", f"SELECT max({CURSOR}) FROM {table}"
            ),
            log=answer,
        )
        return f"{CURSOR} > '{answer.read_text(encoding='utf-8').strip()}'", usage


class Ours:
    """This engine, asked as an operator asks; source and destination over TLS or not."""

    def __init__(self, made: Lab, *, tls: bool = False) -> None:
        self.name = "syncward_tls" if tls else "syncward"
        self._made = made
        self._tls = tls

    @staticmethod
    def link_of(target: Target, *, tls: bool) -> Link:
        """Return the connection that keeps a target."""
        return Link(f"{target}_tls" if tls else f"{target}", LINKS[target], TABLE, tls=tls)

    def link(self, target: Target) -> Link:
        return self.link_of(target, tls=self._tls)

    def schema(self, target: Target) -> str:
        return self.link(target).target

    def forget(self, target: Target) -> None:
        forget(self._made, self.link(target))

    def load(self, target: Target, *, first: bool) -> Usage:  # noqa: ARG002 - it finds out itself
        return self._made.run(self.link(target).name)[2]


def forget(made: Lab, link: Link) -> None:
    """Drop what a connection of ours has loaded, and what the destination remembers of it."""
    with made.cli.inside() as (tx, _, _name):
        found = connections.get(tx, link.name)
    remembers = (
        "SELECT table_name FROM information_schema.columns "
        "WHERE table_schema = '_syncward' AND column_name = 'connection_id'"
    )
    with made.session(made.destination) as db:
        db.execute(f"DROP SCHEMA IF EXISTS {link.target} CASCADE")
        for (table,) in db.execute(remembers).fetchall():
            statement = sql.SQL("DELETE FROM _syncward.{} WHERE connection_id = %s")
            db.execute(statement.format(sql.Identifier(table)), (found.connection_id,))
