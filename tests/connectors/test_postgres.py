"""Postgres to Postgres: exactness of rows, windows, fences and errors, on real servers."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from threading import Barrier
from uuid import uuid4

import psycopg
import pytest

from connectors import registry
from connectors.postgres.link import PostgresConfig, connect
from schemas.errors import (
    ConfigError,
    CredentialsError,
    GuardTripped,
    LeaseLost,
    SyncwardError,
    TransientError,
)
from schemas.records import LoadRequest, Purge
from schemas.streams import StreamSpec
from tests.world import LOOSE

pytestmark = pytest.mark.integration


class Engine:
    """Both ends of a pair, and the loop of a run without the run."""

    def __init__(self, pair) -> None:
        self.pair = pair
        self.connection_id = uuid4()
        self.fence = 0

    def open(self):
        source = registry.open_source(
            "postgres", self.pair.config("source"), self.pair.secret("source"), LOOSE
        )
        destination = registry.open_destination(
            "postgres", self.pair.config("destination"), self.pair.secret("destination"), LOOSE
        )
        return source, destination

    def request(self, spec: StreamSpec, **extra) -> LoadRequest:
        self.fence += 1
        made = LoadRequest(self.connection_id, uuid4(), 1, self.fence, spec, "acme")
        return replace(made, **extra)

    def sync(self, name: str, **spec):
        """Move one stream once; return (result, notes)."""
        stream = StreamSpec(name=f"public.{name}", **spec)
        source, destination = self.open()
        try:
            request = self.request(stream)
            known = destination.claim_stream(request)
            with source.extract(stream, known.cursor) as batches:
                (batch,) = batches
                return destination.load(request, batch), batch.notes
        finally:
            source.close()
            destination.close()


@pytest.fixture
def engine(pair):
    return Engine(pair)


EVERY_TYPE = """
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE DOMAIN posint AS int CHECK (value > 0);
CREATE TABLE every_type (
  id int PRIMARY KEY, a smallint, b bigint, c numeric, d numeric(12,2), e real, f double precision,
  g money, h text, i varchar(10), j char(5), k bytea, l timestamp, m timestamptz, n timestamp(3),
  o date, p time, q timetz, r interval, s boolean, t uuid, u json, v jsonb, w inet, x cidr,
  y macaddr, z macaddr8, aa bit(4), ab varbit, ac point, ad box, ae polygon, af circle, ag path,
  ah tsvector, ai tsquery, aj int4range, ak tstzmultirange, al int[], am text[][], an mood,
  ao posint, ap mood[], aq regclass, ar xid8, at oid, au "char", av name, aw lseg, ax line,
  ay numeric(5,2)[], az jsonb[], ba bit varying(7), bb interval day to second(3),
  gen int GENERATED ALWAYS AS (id * 2) STORED
)
"""
ROWS = """
INSERT INTO every_type VALUES
(1, -32768, 9223372036854775807, 'NaN', 1234567890.12, 'NaN', '-Infinity', '-12.34', E'a\\tb\\n',
 'x', 'y', '\\x00ff', '-infinity', 'infinity', '2026-01-02 03:04:05.678', '0044-03-15 BC', '24:00',
 '12:00+05:30', '1 year 2 mons -3 days 04:05:06.789', true, gen_random_uuid(),
 '{"b":1,  "a":2, "a":3}', '{"b":1,"a":2}', '192.168.0.1/24', '10.0.0.0/8', '08:00:2b:01:02:03',
 '08:00:2b:01:02:03:04:05', B'1010', B'101', '(1,2)', '((0,0),(1,1))', '((0,0),(1,1),(2,0))',
 '<(0,0),1>', '[(0,0),(1,1)]', 'fat:1A cat', 'fat & cat', '[1,5)', '{[2026-01-01,2026-02-01)}',
 '[5:7]={1,2,NULL}', '{{a,b},{c,NULL}}', 'happy', 7, '{sad,NULL,ok}', 'pg_class', '42', 7, 'c',
 'n', '[(0,0),(1,1)]', '{1,-1,0}', '{1.10,NULL}', array['{"x": [1]}'::jsonb], B'11',
 '3 days 04:05:06.789', DEFAULT),
(2, NULL, 0, 'Infinity', 0, 0, '-0', 0, '', '', '', '', NULL, NULL, NULL, 'infinity', '00:00', NULL,
 '-178000000 years', NULL, NULL, NULL, 'null', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
 NULL, NULL, '', NULL, 'empty', '{}', '{}', '{}', NULL, NULL, '{}', NULL, NULL, NULL, NULL, NULL,
 NULL, NULL, '{}', '{}', B'', NULL, DEFAULT)
"""


@pytest.mark.parametrize("spec", [
    {"mode": "merge", "key": ("id",), "cursor": "xmin"},
    {"mode": "replace"},
    {"mode": "append", "cursor": "xmin"},
])  # fmt: skip
def test_every_built_in_type_arrives_exactly_and_stays_unchanged(engine, spec):
    pair = engine.pair
    for statement in EVERY_TYPE.strip().split(";\n"):
        pair.source(statement)
    pair.source(ROWS)
    pair.session("destination").execute("CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy')")
    pair.session("destination").execute("CREATE DOMAIN posint AS int CHECK (value > 0)")

    first, _ = engine.sync("every_type", **spec)
    assert first.rows_inserted == 2
    assert pair.same("every_type")
    types = "SELECT array_agg(format_type(atttypid, atttypmod) ORDER BY attnum) FROM pg_attribute "
    where = "WHERE attrelid = '{}.every_type'::regclass AND attnum > 0 AND attname !~ '^_syncward'"
    ((here,),) = pair.rows("source", types + where.format("public"))
    ((there,),) = pair.rows("destination", types + where.format("acme"))
    assert there == ["text" if name == "regclass" else name for name in here]
    pair.source("UPDATE every_type SET h = 'changed' WHERE id = 1")
    second, _ = engine.sync("every_type", **spec)
    if spec["mode"] == "append":
        assert second.rows_inserted == 1
    else:
        assert (second.rows_updated, second.rows_inserted) == (1, 0)
        assert pair.same("every_type")


def test_names_that_need_quotes_are_names_and_nothing_else(engine):
    table = 'Sel"ect; DROP TABLE x--' + "é" * 18  # 63 bytes
    quoted = '"' + table.replace('"', '""') + '"'
    engine.pair.source(
        f'CREATE TABLE {quoted} ("user" int PRIMARY KEY, "a b""c" text)',
        f"INSERT INTO {quoted} VALUES (1, 'x')",
    )
    result, _ = engine.sync(table, mode="merge", key=("user",), cursor="xmin")
    assert result.rows_inserted == 1
    assert engine.pair.rows("destination", f"SELECT * FROM acme.{quoted}")[0][:2] == (1, "x")


def test_a_table_without_a_key_is_replaced_as_a_multiset(engine):
    engine.pair.source(
        "CREATE TABLE bag (a int, j json)",
        "INSERT INTO bag SELECT g % 3, '{}' FROM generate_series(1, 9) g",
    )
    assert engine.sync("bag", mode="replace")[0].rows_inserted == 9
    assert engine.sync("bag", mode="replace")[0].rows_unchanged == 9
    engine.pair.source("DELETE FROM bag WHERE ctid IN (SELECT ctid FROM bag WHERE a = 0 LIMIT 2)")
    engine.pair.source("INSERT INTO bag VALUES (7, NULL)")
    result, _ = engine.sync("bag", mode="replace")
    assert (result.rows_inserted, result.rows_deleted, result.rows_unchanged) == (1, 2, 7)
    assert engine.pair.same("bag")


def test_a_replaced_table_keeps_its_views_and_grants(engine):
    engine.pair.source("CREATE TABLE r (id int PRIMARY KEY)", "INSERT INTO r VALUES (1)")
    engine.sync("r", mode="replace")
    lake = engine.pair.session("destination")
    lake.execute("CREATE VIEW acme.v AS SELECT id FROM acme.r")
    engine.pair.source("DELETE FROM r", "INSERT INTO r VALUES (2)")
    engine.sync("r", mode="replace")
    assert lake.execute("SELECT * FROM acme.v").fetchall() == [(2,)]


def test_unchanged_rows_are_not_rewritten(engine):
    engine.pair.source(
        "CREATE TABLE m (id int PRIMARY KEY, n numeric)",
        "INSERT INTO m SELECT g, 1.0 FROM generate_series(1, 100) g",
    )
    engine.sync("m", mode="replace")
    before = dict(engine.pair.rows("destination", "SELECT id, ctid::text FROM acme.m"))
    engine.pair.source("UPDATE m SET n = 1.00 WHERE id = 5")
    result, _ = engine.sync("m", mode="replace")
    after = dict(engine.pair.rows("destination", "SELECT id, ctid::text FROM acme.m"))
    assert (result.rows_updated, result.rows_unchanged) == (1, 99)
    assert {i for i in before if before[i] != after[i]} == {5}


def test_savepoints_and_subtransactions_arrive_by_xmin(engine):
    engine.pair.source("CREATE TABLE s (v int)")
    engine.sync("s", mode="append", cursor="xmin")
    with engine.pair.connect("source", autocommit=False) as conn:
        conn.execute("INSERT INTO s VALUES (1)")
        with conn.transaction():
            conn.execute("INSERT INTO s VALUES (2)")
        engine.sync("s", mode="append", cursor="xmin")
        conn.commit()
    engine.sync("s", mode="append", cursor="xmin")
    engine.sync("s", mode="append", cursor="xmin")
    assert engine.pair.same("s")


def test_a_transaction_that_has_not_written_yet_holds_the_time_bound(engine):
    engine.pair.source("CREATE TABLE t (id int PRIMARY KEY, updated_at timestamptz)")
    engine.sync("t", mode="append", cursor="updated_at")
    with engine.pair.connect("source", autocommit=False) as slow:
        slow.execute("SELECT 1")
        time.sleep(0.2)
        engine.pair.source("INSERT INTO t VALUES (1, now())")
        time.sleep(0.2)
        engine.sync("t", mode="append", cursor="updated_at")
        slow.execute("INSERT INTO t VALUES (2, now())")  # older than row 1
        slow.commit()
    time.sleep(0.2)
    engine.sync("t", mode="append", cursor="updated_at")
    assert engine.pair.same("t")


def test_a_prepared_transaction_holds_the_bound_and_is_named(engine):
    engine.pair.source("CREATE TABLE p (id int PRIMARY KEY, updated_at timestamptz)")
    engine.sync("p", mode="append", cursor="updated_at")
    with engine.pair.connect("source", autocommit=True) as conn:
        conn.execute("BEGIN")
        conn.execute("INSERT INTO p VALUES (1, now())")
        conn.execute("PREPARE TRANSACTION 'half-done'")
    time.sleep(0.2)
    engine.pair.source("INSERT INTO p VALUES (2, now())")
    time.sleep(0.2)
    _, notes = engine.sync("p", mode="append", cursor="updated_at")
    assert any("half-done" in note for note in notes)
    engine.pair.session("source").execute("COMMIT PREPARED 'half-done'")
    for _ in range(2):
        time.sleep(0.2)
        engine.sync("p", mode="append", cursor="updated_at")
    assert engine.pair.same("p")


def test_overlap_reads_a_window_again_and_merge_makes_that_free(engine):
    engine.pair.source(
        "CREATE TABLE o (id int PRIMARY KEY, updated_at timestamptz NOT NULL)",
        "INSERT INTO o VALUES (1, now() - interval '1 min')",
    )
    spec = {"mode": "merge", "key": ("id",), "cursor": "updated_at", "overlap": "1h"}
    engine.sync("o", **spec)
    result, _ = engine.sync("o", **spec)
    assert (result.rows_extracted, result.rows_unchanged) == (1, 1)


def test_without_the_right_to_see_transactions_the_stream_is_inexact_and_says_so(engine, admin):
    engine.pair.source("CREATE TABLE i (id int PRIMARY KEY, updated_at timestamptz NOT NULL)")
    admin.execute("REVOKE pg_read_all_stats FROM reader")
    try:
        _, notes = engine.sync("i", mode="merge", key=("id",), cursor="updated_at")
    finally:
        admin.execute("GRANT pg_read_all_stats TO reader")
    assert any(note.startswith("inexact") for note in notes)


def test_a_zombie_cannot_write_and_leaves_nothing(engine):
    engine.pair.source("CREATE TABLE z (id int PRIMARY KEY)", "INSERT INTO z VALUES (1)")
    stream = StreamSpec(name="public.z", mode="merge", key=("id",), cursor="xmin")
    source, zombie = engine.open()
    old = engine.request(stream)
    cursor = zombie.claim_stream(old).cursor
    engine.sync("z", mode="merge", key=("id",), cursor="xmin")  # another run took over
    engine.pair.source("INSERT INTO z VALUES (2)")
    with source.extract(stream, cursor) as batches:
        (batch,) = batches
        with pytest.raises(LeaseLost):
            zombie.load(old, batch)
    assert engine.pair.rows("destination", "SELECT id FROM acme.z") == [(1,)]
    source.close()
    zombie.close()


def test_first_loads_into_one_new_schema_do_not_wait_for_each_other(engine):
    engine.pair.source("CREATE TABLE a (id int PRIMARY KEY)", "CREATE TABLE b (id int PRIMARY KEY)")
    ends = [engine.open() for _ in "ab"]
    streams = [StreamSpec(name=f"public.{t}", mode="merge", key=("id",)) for t in "ab"]
    requests = [engine.request(stream) for stream in streams]
    for (_, destination), request in zip(ends, requests, strict=True):
        destination.claim_stream(request)
    arrived = Barrier(2, timeout=20)

    def meet(chunks):
        arrived.wait()  # both are inside their transactions now
        yield from chunks

    def load(number: int) -> None:
        (source, destination), stream = ends[number], streams[number]
        with source.extract(stream, None) as batches:
            (batch,) = batches
            batch.chunks = meet(batch.chunks)
            destination.load(requests[number], batch)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(load, n) for n in range(2)]:
            done.result(timeout=60)
    for source, destination in ends:
        source.close()
        destination.close()


def test_a_destination_ahead_of_the_control_database_awaits_approval(engine):
    engine.pair.source("CREATE TABLE g (id int PRIMARY KEY)", "INSERT INTO g VALUES (1)")
    spec = {"mode": "merge", "key": ("id",), "cursor": "xmin"}
    engine.fence = 100
    engine.sync("g", **spec)
    engine.fence = 5  # what a restored control database would say
    with pytest.raises(GuardTripped) as caught:
        engine.sync("g", **spec)
    assert caught.value.code == "control_restored"


def test_a_result_committed_before_the_worker_died_is_found_again(engine):
    engine.pair.source("CREATE TABLE d (id int PRIMARY KEY)", "INSERT INTO d VALUES (1)")
    stream = StreamSpec(name="public.d", mode="merge", key=("id",), cursor="xmin")
    source, destination = engine.open()
    request = engine.request(stream)
    cursor = destination.claim_stream(request).cursor
    with source.extract(stream, cursor) as batches:
        result = destination.load(request, next(batches))
    again = engine.request(stream, run_id=request.run_id, attempt=2)
    assert destination.claim_stream(again).result == result
    assert destination.claim_stream(engine.request(stream)).result is None
    source.close()
    destination.close()


@pytest.mark.parametrize("end", ["source", "destination"])
def test_a_connection_cut_in_mid_copy_leaves_the_destination_as_it_was(engine, end):
    engine.pair.source(
        "CREATE TABLE c (id int PRIMARY KEY, pad text)",
        "INSERT INTO c SELECT g, repeat('x', 500) FROM generate_series(1, 20000) g",
    )
    stream = StreamSpec(name="public.c", mode="merge", key=("id",), cursor="xmin")
    source, destination = engine.open()
    request = engine.request(stream)
    cursor = destination.claim_stream(request).cursor
    with pytest.raises(TransientError):
        _load_with_a_cut(engine, (source, destination), request, cursor, end)
    source.close()
    destination.close()
    assert engine.pair.rows("destination", "SELECT to_regclass('acme.c')") == [(None,)]
    assert engine.sync("c", mode="merge", key=("id",), cursor="xmin")[0].rows_inserted == 20_000


def _load_with_a_cut(engine, ends, request, cursor, end):
    source, destination = ends
    with source.extract(request.stream, cursor) as batches:
        (batch,) = batches
        batch.chunks = _cut_after(batch.chunks, engine.pair, end)
        destination.load(request, batch)


def _cut_after(chunks, pair, end):
    yield next(chunks)
    pair.session(end).execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE application_name = 'syncward:{end}' AND datname = current_database()"
    )
    time.sleep(0.2)
    yield from chunks


def test_cancel_ends_a_copy_and_a_lock_wait_within_two_seconds(engine):
    engine.pair.source("CREATE TABLE w (id int PRIMARY KEY)", "INSERT INTO w VALUES (1)")
    stream = StreamSpec(name="public.w", mode="merge", key=("id",), cursor="xmin")
    engine.sync("w", mode="merge", key=("id",), cursor="xmin")
    engine.pair.source("UPDATE w SET id = 2")
    source, destination = engine.open()
    with engine.pair.connect("destination", autocommit=False) as blocker:
        blocker.execute("LOCK TABLE acme.w IN ACCESS EXCLUSIVE MODE")
        request = engine.request(stream)
        cursor = destination.claim_stream(request).cursor
        started = time.monotonic()
        threading.Timer(0.3, destination.cancel).start()
        with pytest.raises(SyncwardError), source.extract(stream, cursor) as batches:
            destination.load(request, next(batches))
        assert time.monotonic() - started < 2
    source.close()
    destination.close()


# ── errors: the thing, the reason, the next step; nothing else ───────────────────────────────


def refused(engine, error, match, **spec):
    with pytest.raises(error, match=match) as caught:
        engine.sync(**spec)
    text = str(caught.value) + repr(caught.value)
    assert all(secret not in text for secret in engine.pair.logins.values())


@pytest.fixture
def odd(engine):
    engine.pair.source(
        "CREATE TABLE odd (id int, j json, at timestamptz)", "INSERT INTO odd VALUES (1), (1), (2)"
    )
    return engine


MERGE = {"mode": "merge", "key": ("id",)}


def test_a_missing_table_is_named(odd):
    refused(odd, ConfigError, r"no table public\.nope .*discover", name="nope", mode="replace")


def test_a_missing_cursor_column_is_named_with_what_there_is(odd):
    refused(
        odd, ConfigError, "no cursor column nope; use at, xmin", name="odd", cursor="nope", **MERGE
    )


def test_a_cursor_that_has_no_order_is_refused(odd):
    refused(
        odd, ConfigError, "cursor j is a json, which has no order", name="odd", cursor="j", **MERGE
    )


def test_a_sequence_cursor_is_refused_for_append(odd):
    refused(odd, ConfigError, "use cursor: xmin", name="odd", mode="append", cursor="id")


def test_a_key_that_is_none_is_refused_and_nothing_is_kept(odd):
    refused(odd, GuardTripped, "1 values repeat", name="odd", cursor="xmin", **MERGE)
    assert odd.pair.rows("destination", "SELECT to_regclass('acme.odd')") == [(None,)]


def test_a_key_that_repeats_later_is_refused(engine):
    engine.pair.source("CREATE TABLE k (id int, v int)", "INSERT INTO k VALUES (1, 1)")
    engine.sync("k", cursor="xmin", **MERGE)
    engine.pair.source("INSERT INTO k VALUES (2, 1), (2, 2), (NULL, 3)")
    refused(
        engine, ConfigError, "1 values repeat, 1 rows have NULL", name="k", cursor="xmin", **MERGE
    )


def test_a_foreign_table_in_the_way_is_not_touched(odd):
    lake = odd.pair.session("destination")
    lake.execute("CREATE SCHEMA acme AUTHORIZATION writer")
    lake.execute("CREATE TABLE acme.odd (id int)")
    refused(odd, ConfigError, "was not made by Syncward", name="odd", mode="replace")


def test_a_new_column_or_another_type_is_named(engine):
    engine.pair.source("CREATE TABLE n (id int PRIMARY KEY)")
    engine.sync("n", mode="replace")
    engine.pair.source("ALTER TABLE n ADD COLUMN extra text")
    refused(
        engine, ConfigError, "column extra text is new", name="n", mode="replace", drift="freeze"
    )


def test_a_type_the_destination_lacks_is_named(engine):
    engine.pair.source("CREATE EXTENSION hstore", "CREATE TABLE y (c hstore)")
    refused(
        engine,
        ConfigError,
        r"type public\.hstore, of the extension hstore, which .* does not have",
        name="y",
        mode="replace",
    )


def test_a_view_has_no_xmin(engine):
    engine.pair.source("CREATE VIEW vw AS SELECT 1 AS id")
    refused(engine, ConfigError, "cursor xmin needs a table", name="vw", cursor="xmin", **MERGE)


def test_rows_that_another_connection_loaded_are_not_doubled(engine):
    engine.pair.source("CREATE TABLE a (v int)", "INSERT INTO a VALUES (1)")
    engine.sync("a", mode="append", cursor="xmin")
    engine.connection_id = uuid4()
    refused(engine, ConfigError, "append would double", name="a", mode="append", cursor="xmin")


def test_a_destination_without_rights_gets_the_grant_to_type(engine, admin):
    name = engine.pair.names["destination"]
    admin.execute(f'REVOKE CREATE ON DATABASE "{name}" FROM writer')
    engine.pair.source("CREATE TABLE q (v int)")
    refused(
        engine, ConfigError, f"GRANT CREATE ON DATABASE {name} TO writer", name="q", mode="replace"
    )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"user": "reader", "secret": "wrong-word"}, CredentialsError, "login reader was refused"),
        ({"host": "no-such-host.invalid"}, ConfigError, "no host of this name"),
        ({"port": 1}, TransientError, "nothing listens there"),
        ({"database": "nowhere"}, ConfigError, "no such database"),
        ({"sslmode": "require"}, ConfigError, "TLS failed under sslmode require"),
        ({"host": "/run"}, ConfigError, "host: write one host name"),
        ({"host": "a,b"}, ConfigError, "host: write one host name"),
    ],
)
def test_a_resource_that_cannot_be_reached_says_why(engine, change, error, match):
    secret = {"password": change.pop("secret", engine.pair.logins["reader"])}
    config = {**engine.pair.config("source"), **change}
    with pytest.raises(error, match=match) as caught:
        registry.open_source(
            "postgres", registry.validate_config("postgres", config, LOOSE), secret, LOOSE
        )
    assert "wrong-word" not in str(caught.value)
    assert engine.pair.logins["reader"] not in str(caught.value)


def test_the_environment_cannot_redirect_a_connection(engine, monkeypatch):
    monkeypatch.setenv("PGHOST", "192.0.2.1")
    monkeypatch.setenv("PGDATABASE", "elsewhere")
    monkeypatch.setenv("PGOPTIONS", "-c search_path=evil")
    source, destination = engine.open()
    report = source.test()
    assert report.login == "reader"
    source.close()
    destination.close()


def test_test_and_discover_answer_what_people_need(engine):
    engine.pair.source(
        "CREATE TABLE orders (id int PRIMARY KEY, updated_at timestamptz NOT NULL)",
        "CREATE TABLE log (at timestamptz, line text)",
    )
    source, destination = engine.open()
    assert source.test().missing == ()
    assert destination.test().missing == ()
    assert source.test().server_version.startswith("PostgreSQL 1")
    found = {s.name: s for s in source.discover()}
    assert found["public.orders"].suggestion == "{mode: merge, key: [id], cursor: updated_at}"
    assert found["public.log"].suggestion == "{mode: append, cursor: xmin}"
    assert found["public.orders"].cursors == ("updated_at", "xmin")
    source.close()
    destination.close()


def test_a_source_session_cannot_write(engine):
    source, destination = engine.open()
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        source._conn.execute("CREATE TABLE hack (id int)")
    source.close()
    destination.close()


def test_an_append_that_goes_elsewhere_leaves_the_rows_of_others(engine):
    """As a first load does: the table there would become what this stream reads."""
    engine.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1), (2)")
    stream = StreamSpec(name="public.t", mode="append", cursor="xmin")
    source, destination = engine.open()

    def load(schema: str, **more):
        request = replace(engine.request(stream), target_schema=schema, **more)
        known = destination.claim_stream(request)
        with source.extract(stream, known.cursor) as batches:
            return request, destination.load(request, next(batches))

    with closing(source), closing(destination):
        load("other", connection_id=uuid4())
        engine.pair.source("DELETE FROM t WHERE id = 1")
        load("acme")
        with pytest.raises(ConfigError, match="the stream went to acme until now"):
            load("other")
        request = replace(engine.request(stream), target_schema="other")
        destination.claim_stream(request)
        with pytest.raises(ConfigError, match="nothing to purge"):
            destination.purge(request, Purge.NOW)
        assert engine.pair.rows("destination", "SELECT id FROM other.t ORDER BY id") == [(1,), (2,)]
        load("third")
        engine.pair.source("INSERT INTO t VALUES (3)")
        load("third")
        assert engine.pair.rows("destination", "SELECT id FROM third.t ORDER BY id") == [(2,), (3,)]


@pytest.mark.parametrize("role", ["source", "destination"])
def test_the_session_of_a_host_that_is_gone_ends_within_a_minute(shared_pair, role):
    """It would keep the locks of its rows for the two hours of the server's own setting."""
    config = PostgresConfig.model_validate(shared_pair.config(role))
    secret = shared_pair.secret(role)
    with connect(config, secret, role=role, session={}, policy=LOOSE) as conn:
        told = conn.execute(
            "SELECT setting::int FROM pg_settings WHERE name LIKE 'tcp_keepalives_%' ORDER BY name"
        ).fetchall()
    (count,), (idle,), (interval,) = told
    assert 0 < idle + count * interval <= 60


def test_the_end_that_waits_for_the_other_one_is_not_taken_for_idle(engine):
    """The source looks for its bound for longer than the destination lets a session do nothing."""
    engine.pair.source(
        "CREATE TABLE kept (id int)",
        "INSERT INTO kept VALUES (1)",
        "CREATE VIEW t AS SELECT id FROM kept WHERE pg_sleep(0.8) IS NOT NULL",
    )
    names = engine.pair.names
    for role, login in (("source", "reader"), ("destination", "writer")):
        engine.pair.session(role).execute(
            f"ALTER ROLE {login} IN DATABASE {names[role]} SET idle_session_timeout = '300ms'"
        )
    result, _ = engine.sync("t", mode="merge", key=("id",), cursor="id")
    assert result.rows_inserted == 1


def test_a_session_that_ends_when_all_is_read_takes_nothing_back(engine):
    """A read-only transaction has nothing to commit, and its rows are at the destination."""
    engine.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    source, destination = engine.open()
    with closing(source), closing(destination):
        stream = StreamSpec(name="public.t", mode="merge", key=("id",))
        request = LoadRequest(uuid4(), uuid4(), 1, 1, stream, "acme")
        destination.claim_stream(request)
        with source.extract(stream, None) as batches:
            result = destination.load(request, next(batches))
            engine.pair.session("source").execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'syncward:source'"
            )
    assert result.rows_inserted == 1
