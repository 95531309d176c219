"""Questions about a Postgres server: what is there, and what is missing."""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from connectors.discovery import change_times
from connectors.postgres.link import Connection, PostgresConfig
from schemas.records import DiscoveredColumn, DiscoveredStream, ServerReport

_SERVER = """
SELECT split_part(version(), ' ', 1) || ' ' || split_part(version(), ' ', 2),
       coalesce((SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl), 'none'),
       current_user, pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'),
       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user),
       has_database_privilege(current_database(), 'CREATE'),
       has_database_privilege(current_database(), 'TEMP')
"""

_STREAMS = """
SELECT n.nspname, c.relname, c.relkind::text, coalesce((
         SELECT sum(CASE WHEN p.reltuples >= 0 THEN p.reltuples
           ELSE 50 * pg_relation_size(p.oid) / current_setting('block_size')::float8 END)
         FROM (SELECT c.oid UNION SELECT t.relid::oid FROM pg_partition_tree(c.oid) AS t) AS own
         JOIN pg_class p ON p.oid = own.oid AND p.relkind IN ('r', 'm')), 0)::bigint,
       array_agg(a.attname ORDER BY a.attnum), array_agg(format_type(a.atttypid, a.atttypmod)
         ORDER BY a.attnum), array_agg(NOT a.attnotnull ORDER BY a.attnum),
       (SELECT array_agg(k.attname ORDER BY p.position) FROM pg_index i
        CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS p (attnum, position)
        JOIN pg_attribute k ON k.attrelid = i.indrelid AND k.attnum = p.attnum
        WHERE i.indrelid = c.oid AND i.indisprimary)
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT c.relispartition
  AND n.nspname NOT IN ('pg_catalog', 'information_schema', '_syncward')
  AND n.nspname NOT LIKE 'pg\\_%' AND has_schema_privilege(n.oid, 'USAGE')
  AND has_table_privilege(c.oid, 'SELECT')
GROUP BY n.nspname, c.relname, c.relkind, c.reltuples, c.oid
ORDER BY n.nspname, c.relname
"""


def report_source(conn: Connection, config: PostgresConfig) -> ServerReport:
    """Report what a login lacks for exact, unprivileged reading."""
    server = _server(conn)
    missing = []
    if not server.sees_all:
        missing.append(
            "time cursors are inexact until: "
            + _statement("GRANT pg_read_all_stats TO {}", config.user)
        )
    if server.is_superuser:
        missing.append(f"login {config.user} is a superuser; give a login that can only read")
    if not streams(conn):
        missing.append(
            "no readable table; GRANT USAGE ON SCHEMA … and "
            + _statement("GRANT SELECT ON ALL TABLES IN SCHEMA … TO {}", config.user)
        )
    return server.report(missing)


def report_destination(conn: Connection, config: PostgresConfig) -> ServerReport:
    """Report what a login lacks for writing."""
    server = _server(conn)
    missing = []
    if not server.may_create:
        missing.append(
            _statement("GRANT CREATE ON DATABASE {} TO {}", config.database, config.user)
        )
    if not server.may_temp:
        missing.append(_statement("GRANT TEMP ON DATABASE {} TO {}", config.database, config.user))
    return server.report(missing)


@dataclass(frozen=True, slots=True)
class _Server:
    """What a server says of itself and of the login; in the order of the query."""

    version: str
    tls: str
    login: str
    sees_all: bool
    is_superuser: bool
    may_create: bool
    may_temp: bool

    def report(self, missing: Sequence[str]) -> ServerReport:
        return ServerReport(
            server_version=self.version, tls=self.tls, login=self.login, missing=tuple(missing)
        )


def _server(conn: Connection) -> _Server:
    row = conn.execute(_SERVER).fetchone()
    if row is None:
        raise RuntimeError("one row is selected without a FROM")
    return _Server(*row)


def _statement(text: str, *names: str) -> str:
    """Return a statement for a person to type, its names quoted where they need it."""
    quoted = (sql.Identifier(name).as_string() for name in names)
    return text.format(*(q.strip('"') if q.strip('"').isidentifier() else q for q in quoted))


def streams(conn: Connection) -> Sequence[DiscoveredStream]:
    """List what the login can read, with a suggestion for each."""
    return [_stream(*row) for row in conn.execute(_STREAMS).fetchall()]


def _stream(  # noqa: PLR0917 - one parameter per column of the query
    schema: str,
    table: str,
    kind: str,
    rows: int,
    names: list[str],
    types: list[str],
    nullable: list[bool],
    key: list[str] | None,
) -> DiscoveredStream:
    has_xmin = kind in {"r", "p"}
    columns = tuple(
        DiscoveredColumn(name=n, type=t, nullable=o)
        for n, t, o in zip(names, types, nullable, strict=True)
    )
    cursors = change_times(columns) + (("xmin",) if has_xmin else ())
    return DiscoveredStream(
        name=f"{schema}.{table}",
        columns=columns,
        key=tuple(key or ()),
        cursors=cursors,
        rows_estimated=rows,
        suggestion=_suggestion(tuple(key or ()), cursors, has_xmin=has_xmin),
    )


def _suggestion(key: tuple[str, ...], cursors: tuple[str, ...], *, has_xmin: bool) -> str:
    if key and cursors:
        return f"{{mode: merge, key: [{', '.join(key)}], cursor: {cursors[0]}}}"
    return "{mode: append, cursor: xmin}" if has_xmin and not key else "{mode: replace}"
