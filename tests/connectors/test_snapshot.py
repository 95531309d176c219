"""A snapshot holds the files of the table that it reads, and of all that belong to it."""

import psycopg
import pytest

from connectors import registry
from connectors.postgres.catalog import begin_at, describe
from connectors.postgres.link import PostgresConfig
from schemas.errors import ReadAgain
from schemas.records import WireFormat
from schemas.streams import StreamSpec
from tests.world import LOOSE

pytestmark = pytest.mark.integration

MADE = (
    "CREATE TABLE plain (id int PRIMARY KEY, v text)",
    "CREATE TABLE parted (id int PRIMARY KEY, v text) PARTITION BY RANGE (id)",
    "CREATE TABLE parted_low PARTITION OF parted FOR VALUES FROM (0) TO (10)",
    "CREATE TABLE parted_high PARTITION OF parted FOR VALUES FROM (10) TO (20)",
    "CREATE TABLE parent (id int PRIMARY KEY, v text)",
    "CREATE TABLE child () INHERITS (parent)",
    "CREATE TABLE grandchild () INHERITS (child)",
    "CREATE MATERIALIZED VIEW seen AS SELECT 1 AS id",
    "CREATE VIEW looked AS SELECT 1 AS id",
    "CREATE TABLE bare ()",
)
#: What is read, and what comes between the snapshot and the first look at it.
BETWEEN = (
    ("plain", "TRUNCATE plain"),
    ("parted", "TRUNCATE parted_high"),
    ("parent", "TRUNCATE ONLY parent"),
    ("parent", "TRUNCATE grandchild"),
    ("seen", "REFRESH MATERIALIZED VIEW seen"),
)


def test_what_is_written_anew_behind_the_snapshot_is_noticed(pair):
    pair.source(*MADE)
    config = PostgresConfig.model_validate(pair.config("source"))
    for table, statement in BETWEEN:
        spec = StreamSpec(name=f"public.{table}", mode="replace")
        with pair.connect("source") as conn, pair.connect("source") as other:
            relation = describe(conn, config, "public", table)
            begin_at(conn, spec, relation)
            conn.execute("ROLLBACK")
            conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            conn.execute("SELECT 1 FROM pg_class LIMIT 1")  # the snapshot is taken
            other.execute(statement)
            with pytest.raises(ReadAgain):
                begin_at(conn, spec, relation)


def test_nobody_truncates_what_a_snapshot_holds(pair):
    pair.source(*MADE)
    config = PostgresConfig.model_validate(pair.config("source"))
    for table, statement in BETWEEN:
        spec = StreamSpec(name=f"public.{table}", mode="replace")
        with pair.connect("source") as conn, pair.connect("source") as other:
            begin_at(conn, spec, describe(conn, config, "public", table))
            other.execute("SET lock_timeout = '50ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                other.execute(statement)


def test_keys_are_those_that_an_index_proves(pair):
    """In one question with the columns: included columns, parts and NULLs prove nothing."""
    pair.source(
        *MADE,
        "CREATE TABLE keyed (b int NOT NULL, gone int, a int NOT NULL, n int, PRIMARY KEY (a, b))",
        "ALTER TABLE keyed DROP COLUMN gone",
        "CREATE UNIQUE INDEX ON keyed (b) INCLUDE (n)",
        "CREATE UNIQUE INDEX ON keyed (n)",
        "CREATE UNIQUE INDEX ON keyed (a) WHERE a > 3",
        "CREATE UNIQUE INDEX ON keyed ((a + 1))",
    )
    config = PostgresConfig.model_validate(pair.config("source"))
    with pair.connect("source") as conn:
        assert describe(conn, config, "public", "keyed").keys == (("a", "b"), ("b",))
        assert describe(conn, config, "public", "parted").keys == (("id",),)
        assert describe(conn, config, "public", "parent").keys == ()  # says nothing of its children
        assert describe(conn, config, "public", "grandchild").keys == ()
        assert describe(conn, config, "public", "looked").keys == ()
        assert describe(conn, config, "public", "bare").shape.columns == ()


def test_a_view_is_read_without_files_to_hold(pair):
    pair.source(*MADE)
    source = registry.open_source("postgres", pair.config("source"), pair.secret("source"), LOOSE)
    try:
        spec = StreamSpec(name="public.looked", mode="replace")
        with source.extract(spec, None, WireFormat.PG_BINARY) as batches:
            (batch,) = batches
            assert b"".join(batch.chunks).startswith(b"PGCOPY")
            assert batch.rows() == 1
    finally:
        source.close()
