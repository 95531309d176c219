"""What real servers say, in our words: who can act, the code, and never a server's own text."""

import os
import shutil
import subprocess
import threading
import time
from typing import Any

import pytest
from psycopg import errors as pg
from psycopg import sql

from connectors import registry
from connectors.postgres.errors import Role, answer
from connectors.postgres.link import PostgresConfig, translated
from schemas.errors import ConfigError, SyncwardError, TransientError
from schemas.runs import RunState
from storage import runs
from tests.tls_proxy import TlsProxy, certificate
from tests.world import LOOSE

pytestmark = pytest.mark.integration

SECRET = "hunter2-4111111111111111"  # noqa: S105 - what must never be seen
STATES = sorted(
    {
        str(getattr(c, "sqlstate", None))
        for c in vars(pg).values()
        if isinstance(c, type) and isinstance(getattr(c, "sqlstate", None), str)
    }
)
HOSTILE = f"""
DO $do$ BEGIN RAISE EXCEPTION USING ERRCODE = '{{}}', MESSAGE =
  'permission denied for table {SECRET} FATAL: password authentication failed',
  DETAIL = 'Key (id)=({SECRET})', HINT = '{SECRET}', COLUMN = '{SECRET}', CONSTRAINT = '{SECRET}',
  DATATYPE = '{SECRET}', TABLE = '{SECRET}', SCHEMA = '{SECRET}'; END $do$
"""


@pytest.fixture
def ends(pair):
    opened: dict[str, Any] = {
        "source": registry.open_source(
            "postgres", pair.config("source"), pair.secret("source"), LOOSE
        ),
        "destination": registry.open_destination(
            "postgres", pair.config("destination"), pair.secret("destination"), LOOSE
        ),
    }
    yield opened
    for end in opened.values():
        end.close()


def said(ends, pair, role: Role, *statements: str) -> SyncwardError:
    """Let a session run into something; return what people would read."""
    config = PostgresConfig.model_validate(pair.config(role))
    with pytest.raises(SyncwardError) as caught, translated(config, role):  # noqa: PT012
        for statement in statements:
            ends[role]._conn.execute(statement)
    assert SECRET not in caught.value.public
    return caught.value


@pytest.mark.parametrize("role", ["source", "destination"])
def test_every_state_raised_by_a_server_is_answered_without_its_words(ends, pair, role):
    seen = set()
    for state in STATES:
        found = said(ends, pair, role, HOSTILE.format(state))
        assert found.code == answer(state, role).code
        seen.add(found.code)
    assert len(seen) > 30


def test_a_state_that_somebody_made_up_is_a_refusal(ends, pair):
    assert said(ends, pair, "source", HOSTILE.format("QQ123")).code == "refused_there"


def shown(world, run_id) -> str:
    """A run's log without what the server said in its own words, which is there for debugging."""
    return "\n".join(x.message or "" for x in world.lines(run_id) if x.stored.level != "debug")


# ── what can be provoked, through a whole run ───────────────────────────────────────────────────

AT_SOURCE = [
    ("PERFORM * FROM nowhere", "failed", "missing"),
    ("PERFORM nothing(1)", "failed", "missing"),
    ("PERFORM 1 / 0", "failed", "a value cannot be read"),
    (f"PERFORM '{SECRET}'::int", "failed", "a value cannot be read"),
    (f"RAISE EXCEPTION '{SECRET}'", "failed", "raised an error"),
    ("CREATE TABLE y (i int)", "failed", "writes"),
    ("PERFORM pg_cancel_backend(pg_backend_pid()), pg_sleep(5)", "queued", "cancelled there"),
    (f"RAISE EXCEPTION '{SECRET}' USING ERRCODE = '57P01'", "queued", "shutting down"),
]


def test_a_failing_source_ends_the_run_as_the_table_says(world):
    make = (
        "CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $f$ BEGIN {}; RETURN 1; "
        "END $f$"
    )
    world.pair.source(make.format("NULL"), "CREATE VIEW t AS SELECT f() AS id")
    world.apply({"public.t": "{mode: replace}"})
    for statement, state, words in AT_SOURCE:
        world.pair.source(make.format(statement))
        run, streams = world.sync()
        assert (run.state, words in run.error) == (state, True), run.error
        if state == "failed":
            assert run.error_code == "streams"
            assert streams["t"].state == "failed"
        events = str(world.control.all("SELECT body FROM audit.event"))
        assert SECRET not in run.error + shown(world, run.run_id) + events
        with world.cli.inside() as (tx, _, _name):
            if state == "queued":
                runs.cancel(tx, run.run_id, world.cli.principal)


AT_DESTINATION = [
    (
        "ALTER TABLE acme.t ADD CONSTRAINT c CHECK (id < 3)",
        "ALTER TABLE acme.t DROP CONSTRAINT c",
        "failed",
        "acme.t (c) refuses",
    ),
    (
        "ALTER TABLE acme.t ALTER v SET NOT NULL",
        "ALTER TABLE acme.t ALTER v DROP NOT NULL",
        "failed",
        "acme.t.v would be NULL",
    ),
    (
        "ALTER TABLE acme.t ADD CONSTRAINT u UNIQUE (v)",
        "ALTER TABLE acme.t DROP CONSTRAINT u",
        "failed",
        "held twice acme.t (u)",
    ),
    (
        "REVOKE UPDATE ON acme.t FROM writer",
        "GRANT UPDATE ON acme.t TO writer",
        "failed",
        "permission denied for table t; GRANT it",
    ),
    (
        (
            "CREATE FUNCTION acme.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"RAISE EXCEPTION '{SECRET}' USING ERRCODE = '23505', TABLE = '{SECRET}', "
            "SCHEMA = 'acme'; END $$; CREATE TRIGGER no BEFORE INSERT ON acme.t "
            "FOR EACH ROW EXECUTE FUNCTION acme.no()"
        ),
        "DROP FUNCTION acme.no() CASCADE",
        "failed",
        "held twice; the key",
    ),
    (
        "ALTER ROLE writer SET default_transaction_read_only = on",
        "ALTER ROLE writer RESET ALL",
        "queued",
        "no writes",
    ),
]


def test_a_refusing_destination_ends_the_run_as_the_table_says(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text)", "INSERT INTO t VALUES (1, 'v'), (2, 'w')"
    )
    world.apply({"public.t": "{mode: merge, key: [id]}"})
    assert world.sync()[0].state is RunState.SUCCEEDED
    lake = world.pair.session("destination")
    lake.execute("ALTER TABLE acme.t OWNER TO postgres")
    lake.execute("GRANT ALL ON acme.t TO writer")
    world.pair.source("UPDATE t SET v = NULL WHERE id = 1", "INSERT INTO t VALUES (3, 'w')")
    for statement, undo, state, words in AT_DESTINATION:
        lake.execute(statement)
        try:
            run, _ = world.sync()
        finally:
            lake.execute(undo)
        assert (run.state, words in (run.error or "")) == (state, True), run.error
        assert SECRET not in run.error + shown(world, run.run_id)
        assert world.pair.rows("destination", "SELECT count(*) FROM acme.t") == [(2,)]


# ── sessions against each other ─────────────────────────────────────────────────────────────────


@pytest.fixture
def table(pair, ends):
    session = pair.session("destination")
    session.execute("CREATE TABLE k (id int PRIMARY KEY, v int)")
    session.execute("INSERT INTO k VALUES (1, 0), (2, 0)")
    session.execute("GRANT ALL ON k TO writer")
    ends["destination"]._conn.execute("SET search_path = public")
    return session


def test_a_held_lock_is_waited_for_and_then_said(ends, pair, table):
    with table.transaction():
        table.execute("LOCK TABLE k")
        found = said(ends, pair, "destination", "SET lock_timeout = '50ms'", "SELECT * FROM k")
    assert (found.code, isinstance(found, TransientError)) == ("lock_timeout", True)
    assert "pg_blocking_pids" in found.public


def test_a_serialization_failure_is_transient(ends, pair, table):
    ends["destination"]._conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    ends["destination"]._conn.execute("SELECT * FROM k")
    table.execute("UPDATE k SET v = 1")
    assert said(ends, pair, "destination", "UPDATE k SET v = 2").code == "serialization"


def test_a_deadlock_is_transient(ends, pair, table):
    table.execute("SET deadlock_timeout = '60s'")  # so that the other side is the one that loses
    conn = ends["destination"]._conn
    conn.execute("BEGIN")
    conn.execute("UPDATE k SET v = 1 WHERE id = 1")
    table.execute("BEGIN")
    table.execute("UPDATE k SET v = 1 WHERE id = 2")
    other = threading.Thread(target=table.execute, args=("UPDATE k SET v = 1 WHERE id = 1",))
    other.start()
    found = said(ends, pair, "destination", "UPDATE k SET v = 1 WHERE id = 2")
    conn.execute("ROLLBACK")
    other.join()
    assert (found.code, isinstance(found, TransientError)) == ("deadlock", True)


@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_session_that_is_ended_or_limited_is_transient(ends, pair, role):
    limited = said(ends, pair, role, "SET statement_timeout = 50", "SELECT pg_sleep(5)")
    assert (limited.code, isinstance(limited, TransientError)) == ("cancelled_there", True)
    killer = threading.Timer(
        0.2,
        pair.session(role).execute,
        ("SELECT pg_terminate_backend(%s)", (ends[role]._conn.info.backend_pid,)),
    )
    killer.start()
    ended = said(ends, pair, role, "SET statement_timeout = 0", "SELECT pg_sleep(10)")
    killer.join()
    assert (ended.code, isinstance(ended, TransientError)) == ("server_restarting", True)
    after = said(ends, pair, role, "SELECT 1")
    assert (after.code, isinstance(after, TransientError)) == ("connection_lost", True)


@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_server_notices_that_we_died_in_the_middle_of_a_statement(ends, pair, role):
    ends[role]._conn.execute("SET statement_timeout = 0")
    asking = threading.Thread(
        target=said, args=(ends, pair, role, "SELECT pg_sleep(600)"), daemon=True
    )
    asking.start()
    pid = ends[role]._conn.info.backend_pid
    alive = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}"
    time.sleep(0.3)
    ends[role].cut()  # to the server it looks like a process that was killed
    deadline = time.monotonic() + 20
    while pair.rows(role, alive) != [(0,)]:
        assert time.monotonic() < deadline, "the statement goes on for nobody"
        time.sleep(0.1)
    asking.join()


# ── reaching a server ───────────────────────────────────────────────────────────────────────────


def refused(config: dict[str, object], password: str) -> SyncwardError:
    with pytest.raises(SyncwardError) as caught:
        registry.open_source("postgres", config, {"password": password}, LOOSE)
    assert password not in caught.value.public
    return caught.value


@pytest.fixture
def outsider(admin, cluster):
    """A login of its own, taken away afterwards; yields (name, password)."""
    admin.execute("CREATE ROLE outsider LOGIN PASSWORD 'out-word'")
    hba = cluster._data / "pg_hba.conf"
    before = hba.read_text()
    yield "outsider", "out-word"
    hba.write_text(before)
    admin.execute("SELECT pg_reload_conf()")
    admin.execute("DROP ROLE outsider")


def test_a_login_without_connections_left_is_tried_again(pair, admin, outsider):
    user, password = outsider
    admin.execute("ALTER ROLE outsider CONNECTION LIMIT 0")
    found = refused({**pair.config("source"), "user": user}, password)
    assert (found.code, isinstance(found, TransientError)) == ("too_many_connections", True)
    admin.execute("ALTER ROLE outsider NOLOGIN")
    assert refused({**pair.config("source"), "user": user}, password).code == "credentials"


def test_a_server_that_wants_tls_says_so(pair, admin, cluster, outsider):
    user, password = outsider
    hba = cluster._data / "pg_hba.conf"
    hba.write_text(f"host all {user} all reject\n{hba.read_text()}")
    admin.execute("SELECT pg_reload_conf()")
    time.sleep(0.3)
    found = refused({**pair.config("source"), "user": user}, password)
    assert (found.code, isinstance(found, ConfigError)) == ("tls_required", True)


def test_a_server_that_asks_for_the_password_in_clear_does_not_get_it(
    pair, admin, cluster, outsider
):
    user, password = outsider
    hba = cluster._data / "pg_hba.conf"
    hba.write_text(f"host all {user} all password\n{hba.read_text()}")
    admin.execute("SELECT pg_reload_conf()")
    time.sleep(0.3)
    found = refused({**pair.config("source"), "user": user}, password)
    assert (found.code, isinstance(found, ConfigError)) == ("login_method", True)


@pytest.fixture
def tls(cluster, tmp_path):
    files = certificate(tmp_path, "localhost")
    with TlsProxy((cluster.host, cluster.port), files) as proxy:
        yield proxy, files[0]


def through(pair, proxy, mode: str, host: str, authority) -> dict[str, object]:
    return {
        **pair.config("source"),
        "host": host,
        "port": proxy.port,
        "sslmode": mode,
        "sslrootcert": str(authority),
        "channel_binding": "prefer",  # TLS ends at the proxy
    }


def test_a_certificate_of_another_authority_or_name_is_refused(pair, tls, tmp_path):
    proxy, authority = tls
    password = pair.logins["reader"]
    stranger, _ = certificate(tmp_path, "stranger")
    for config in (
        through(pair, proxy, "verify-ca", "127.0.0.1", stranger),
        through(pair, proxy, "verify-full", "127.0.0.1", authority),
    ):
        found = refused(config, password)
        assert (found.code, isinstance(found, ConfigError)) == ("tls_refused", True)


def test_a_tls_link_that_breaks_in_a_query_is_tried_again(pair, tls):
    proxy, authority = tls
    config = through(pair, proxy, "verify-full", "localhost", authority)
    source: Any = registry.open_source("postgres", config, pair.secret("source"), LOOSE)
    cut = threading.Timer(0.3, proxy.cut)
    cut.start()
    checked = PostgresConfig.model_validate(config)
    with pytest.raises(TransientError) as caught, translated(checked, "source"):
        source._conn.execute("SELECT pg_sleep(10)")
    cut.join()
    source.close()
    assert caught.value.code == "connection_lost"


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root")
def test_a_full_disk_is_tried_again_until_somebody_frees_space(pair, ends, admin, cluster):
    place = cluster.root / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], check=True)
    try:
        cluster._own(place)
        (place / "data").mkdir()
        cluster._own(place / "data")
        location = sql.Literal(str(place / "data"))
        admin.execute(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(location))
        admin.execute("GRANT CREATE ON TABLESPACE small TO writer")
        pair.session("destination").execute("GRANT CREATE ON SCHEMA public TO writer")
        found = said(
            ends,
            pair,
            "destination",
            "CREATE TABLE public.full_ (v text) TABLESPACE small",
            "INSERT INTO public.full_ SELECT repeat('x', 1000) FROM generate_series(1, 9000)",
        )
        ends["destination"]._conn.execute("DROP TABLE public.full_")
        admin.execute("DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    assert (found.code, isinstance(found, TransientError)) == ("disk_full", True)
