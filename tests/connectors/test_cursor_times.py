"""Cursors of times under fire: who is open, what is rounded, clocks that go back, zones."""

from datetime import UTC, datetime, timedelta

import pytest
from psycopg import sql

from connectors.postgres.catalog import find
from connectors.postgres.window import TimeBound, time_window
from schemas.records import Cursor
from schemas.streams import StreamSpec
from tests.connectors.followed import Loaded, followed

pytestmark = pytest.mark.integration

MERGE = {"mode": "merge", "key": ("id",), "cursor": "at"}
APPEND = {"mode": "append", "cursor": "at"}


@pytest.fixture
def table(pair):
    pair.source("CREATE TABLE t (id int PRIMARY KEY, at timestamptz DEFAULT now())")
    return pair


def insert(pair, *ids: int) -> None:
    for one in ids:
        pair.source(f"INSERT INTO t (id) VALUES ({one})")


def wait_past(pair) -> None:
    """Wait until what is committed lies behind the margin."""
    wait = "SELECT max(at) < clock_timestamp() - interval '110 ms' FROM t"
    while pair.rows("source", wait) != [(True,)]:
        pass


# ── transactions ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("writes", ["at once", "at its end"])
def test_a_transaction_held_over_several_runs_loses_nothing_and_doubles_nothing(table, writes):
    stream = followed(table, "t", **APPEND)
    insert(table, 1)
    stream.until({1})
    with table.connect("source", autocommit=False) as slow:
        slow.execute("INSERT INTO t (id) VALUES (2)" if writes == "at once" else "SELECT 1")
        for quick in (3, 4, 5):
            insert(table, quick)
            assert stream.read() == []
        since = f"SELECT xact_start FROM pg_stat_activity WHERE pid = {slow.info.backend_pid}"
        assert table.rows("source", f"SELECT ({since}) > '{stream.upper}'") == [(True,)]
        if writes == "at its end":
            slow.execute("INSERT INTO t (id) VALUES (2)")
        slow.commit()
    insert(table, 6)
    stream.until({1, 2, 3, 4, 5, 6})
    stream.read()
    assert sorted(stream.seen) == [1, 2, 3, 4, 5, 6]


def test_two_transactions_hold_the_bound_one_after_the_other(table):
    stream = followed(table, "t", **APPEND)
    with table.connect("source", autocommit=False) as one:
        one.execute("INSERT INTO t (id) VALUES (1)")
        with table.connect("source", autocommit=False) as two:
            two.execute("INSERT INTO t (id) VALUES (2)")
            insert(table, 3)
            stream.read()
            one.commit()
            stream.read()
            stream.read()
            assert not {2, 3} & set(stream.seen)
            two.commit()
    stream.until({1, 2, 3})
    assert sorted(stream.seen) == [1, 2, 3]


def test_a_prepared_transaction_outlives_its_session_and_holds_the_bound(table):
    stream = followed(table, "t", **APPEND)
    insert(table, 1)
    stream.until({1})
    before = stream.upper
    with table.connect("source") as session:
        session.execute("BEGIN; INSERT INTO t (id) VALUES (2); PREPARE TRANSACTION 'apart'")
    try:
        insert(table, 3)
        for _ in range(3):
            assert stream.read() == []
        assert stream.upper == before
        assert "prepared transaction 'apart'" in stream.notes[0]
    finally:
        table.source("COMMIT PREPARED 'apart'")
    stream.until({2, 3})
    assert sorted(stream.seen) == [1, 2, 3]


@pytest.mark.parametrize("spec", [APPEND, MERGE])
def test_a_stream_that_begins_while_a_transaction_is_prepared_doubles_nothing(table, spec):
    stream = Loaded(table, "t", **spec)
    insert(table, 1)
    with table.connect("source") as session:
        session.execute("BEGIN; INSERT INTO t (id) VALUES (2); PREPARE TRANSACTION 'apart'")
    try:
        for _ in range(2):
            stream.sync()
            assert table.content("destination", "t", "id") == ["(1)"]
    finally:
        table.source("COMMIT PREPARED 'apart'")
    insert(table, 3)
    wait_past(table)
    for _ in range(2):
        stream.sync()
        assert table.same("t")


def test_rows_with_the_very_time_of_the_bound_come_once_whenever_they_commit(table):
    stream = followed(table, "t", **APPEND)
    insert(table, 1)
    stream.until({1})
    for i in range(10, 15):
        table.source(f"INSERT INTO t VALUES ({i}, '{stream.upper}')")
    stream.until({10, 11, 12, 13, 14})
    stream.read()
    assert sorted(stream.seen) == [1, 10, 11, 12, 13, 14]


# ── rounding ─────────────────────────────────────────────────────────────────────────────────


def bound_of(pair, at: datetime, zone: str = "UTC", cursor: Cursor | None = None, **spec):
    """The window of table t for a bound, without waiting until it is that late."""
    stream = StreamSpec(name="public.t", **{**MERGE, **spec})
    relation = find(pair.session("source"), "public", "t")
    assert relation is not None
    return time_window(stream, relation, TimeBound(at, exact=True, notes=()), cursor, zone)


_SECOND = datetime(2026, 5, 6, 7, 8, 9, tzinfo=UTC)


@pytest.mark.parametrize(
    "type_",
    [
        "timestamptz", "timestamptz(0)", "timestamptz(1)", "timestamptz(5)", "timestamp",
        "timestamp(0)", "timestamp(3)", "whole",
    ],
)  # fmt: skip
def test_no_time_from_the_bound_on_is_rounded_below_it(pair, type_):
    pair.source(
        "CREATE DOMAIN whole AS timestamptz(0)",
        f"CREATE TABLE t (id int PRIMARY KEY, at {type_})",
    )
    for micros in (0, 1, 5, 49_999, 50_000, 300_000, 449_999, 499_999, 500_000, 999_999):
        at = _SECOND + timedelta(microseconds=micros)
        upper = bound_of(pair, at).upper["value"]
        pair.source("TRUNCATE t", "SET TimeZone = 'UTC'")
        pair.session("source").execute("INSERT INTO t VALUES (1, %s::timestamptz)", (at,))
        assert pair.rows("source", f"SELECT count(*) FROM t WHERE at < '{upper}'") == [(0,)]


@pytest.mark.parametrize("mode", ["append", "merge"])
def test_a_row_at_the_bound_belongs_to_the_window_that_begins_there(pair, mode):
    pair.source("CREATE TABLE t (id int PRIMARY KEY, at timestamptz)")
    bounds = [_SECOND + timedelta(microseconds=i) for i in (-5, 0, 5)]
    for i, at in enumerate(bounds):
        pair.session("source").execute("INSERT INTO t VALUES (%s, %s)", (i, at))
    cursor, read = None, []
    for at in (*bounds, bounds[-1] + timedelta(seconds=1)):
        window = bound_of(pair, at, cursor=cursor, mode=mode)
        query = sql.SQL("SELECT id FROM t WHERE {}").format(window.where)
        read.append([row[0] for row in pair.rows("source", query)])
        cursor = window.upper
    assert read == [[], [0], [1], [2]]


# ── clocks ───────────────────────────────────────────────────────────────────────────────────


def ahead(pair, **by: float) -> Cursor:
    """The bound of a run that saw the clock so much later than it is now."""
    ((at,),) = pair.rows("source", "SELECT clock_timestamp()")
    value = (at.astimezone(UTC) + timedelta(**by)).strftime("%Y-%m-%d %H:%M:%S.%f+00")
    return {"kind": "column", "column": "at", "value": value}


@pytest.mark.parametrize("mode", ["merge", "history"])
def test_what_reads_twice_for_free_follows_a_clock_that_was_set_back(table, mode):
    stream = followed(table, "t", **{**MERGE, "mode": mode})
    stream.cursor = ahead(table, hours=1)
    insert(table, 1)  # an hour below the last bound
    stream.read()
    assert stream.notes[0].startswith("the source's time is 3600 s before the last bound")
    insert(table, 2)
    stream.until({2})
    insert(table, 3)
    stream.until({3})
    assert not any("before the last bound" in note for note in stream.notes)


def test_an_append_does_not_read_twice_after_a_clock_was_set_back_and_says_what_it_misses(table):
    stream = followed(table, "t", **APPEND)
    before = stream.cursor = ahead(table, hours=1)
    insert(table, 1)
    assert stream.read() == []
    assert stream.cursor == before
    (note,) = stream.notes
    assert note.startswith("inexact: the source's time is 3600 s before the last bound")
    assert note.endswith("rows that it dates in between are missed")


def test_a_bound_that_moves_back_by_the_margin_is_nothing_to_say(table):
    stream = followed(table, "t", **MERGE)
    stream.cursor = ahead(table, seconds=0.3)
    stream.read()
    assert stream.notes == ()


# ── zones ────────────────────────────────────────────────────────────────────────────────────

#: Where and when a clock is set back, in UTC: by an hour, by half of one, at midnight.
_AUTUMN = [
    ("Europe/Berlin", datetime(2026, 10, 25, 1, tzinfo=UTC)),
    ("America/New_York", datetime(2026, 11, 1, 6, tzinfo=UTC)),
    ("Australia/Lord_Howe", datetime(2026, 4, 4, 15, tzinfo=UTC)),
    ("Atlantic/Azores", datetime(2026, 10, 25, 1, tzinfo=UTC)),
    ("Africa/Cairo", datetime(2026, 10, 29, 21, tzinfo=UTC)),
    ("Asia/Kathmandu", datetime(2026, 6, 1, tzinfo=UTC)),  # never
]


@pytest.mark.parametrize("kind", ["timestamp", "timestamp(0)", "date"])
def test_a_clock_without_a_zone_never_shows_less_than_the_bound_again(pair, kind):
    pair.source(f"CREATE TABLE t (id int PRIMARY KEY, at {kind})")
    for zone, change in _AUTUMN:
        uppers = []
        for minutes in range(-300, 301, 25):
            at = change + timedelta(minutes=minutes, seconds=7, microseconds=400_000)
            upper = bound_of(pair, at, zone).upper["value"]
            uppers.append(upper)
            ((lowest,),) = pair.rows(
                "source",
                sql.SQL(
                    "SELECT min((at AT TIME ZONE {zone})::{kind}::timestamp) FROM generate_series("
                    "{at}, {at} + interval '6 h', interval '11 min') AS at"
                ).format(zone=sql.Literal(zone), kind=sql.SQL(kind), at=sql.Literal(at)),
            )
            seen = datetime.fromisoformat(upper)
            assert seen <= lowest, (zone, at)
            allowed = timedelta(days=1) if kind == "date" else timedelta(minutes=61)
            assert lowest - seen < allowed, "no further behind than the hour that comes twice"
        assert uppers == sorted(uppers), "it never moves back"


def test_the_hour_that_comes_twice_is_not_read_past(pair):
    pair.source("CREATE TABLE t (id int PRIMARY KEY, at timestamp)")
    bounds = [
        bound_of(pair, datetime(2026, 10, 25, hour, minute, tzinfo=UTC), "Europe/Berlin")
        .upper["value"][11:16]
        for hour, minute in [(23, 30), (0, 0), (0, 30), (0, 59), (1, 0), (1, 30), (2, 0)]
    ]  # fmt: skip
    assert bounds[1:] == ["02:00", "02:00", "02:00", "02:00", "02:30", "03:00"]


def test_a_column_without_a_zone_is_followed_in_the_zone_of_the_login(pair):
    """The login and the application are in the same zone: that of the database."""
    name = pair.names["source"]
    pair.source(
        f"ALTER DATABASE \"{name}\" SET TimeZone = 'America/New_York'",
        "CREATE TABLE t (id int PRIMARY KEY, at timestamp DEFAULT now())",
    )
    stream = followed(pair, "t", **APPEND)
    with pair.connect("source") as application:
        application.execute("INSERT INTO t VALUES (1)")
        stream.until({1})
        application.execute("INSERT INTO t VALUES (2)")
        stream.until({2})
    assert stream.seen == [1, 2]
    assert "at has no time zone; read as America/New_York wall-clock time" in stream.notes


# ── what else the bound is asked ─────────────────────────────────────────────────────────────


def test_rows_outside_of_the_condition_do_not_stop_a_run_with_their_time(table):
    table.source(
        "ALTER TABLE t ADD kind text",
        "INSERT INTO t VALUES (1, now(), 'ours'), (2, now() + interval '9 days', 'theirs')",
    )
    stream = followed(table, "t", **MERGE, where="kind = 'ours'")
    stream.read()  # it reads everything, so it looks at all of them
    assert stream.beyond is None
    table.source("INSERT INTO t VALUES (3, now() + interval '9 days', 'ours')")
    stream.cursor = None
    stream.read()
    assert stream.beyond is not None


def test_settle_is_as_long_as_it_says_and_the_stream_is_inexact(table, admin):
    admin.execute("REVOKE pg_read_all_stats FROM reader")
    try:
        stream = followed(table, "t", **APPEND, settle="0s")
        insert(table, 1)
        assert stream.read() == [1]
        (note,) = stream.notes
        assert note.startswith("inexact: without pg_read_all_stats open transactions are hidden")
        assert note.endswith("rows are read 0 s behind")
    finally:
        admin.execute("GRANT pg_read_all_stats TO reader")
