"""`cursor: xmin` under fire: transactions that stay open, numbers that wrap, servers set back."""

import os
import shutil
import signal
import time
from contextlib import contextmanager
from datetime import timedelta

import psycopg
import pytest

from connectors.postgres import window as pg_window
from embedded.postgres import Cluster
from tests.connectors.followed import Followed, Loaded, followed

pytestmark = pytest.mark.integration

APPEND = {"mode": "append", "cursor": "xmin"}
MERGE = {"mode": "merge", "key": ("id",), "cursor": "xmin"}


@pytest.fixture
def table(pair):
    pair.source("CREATE TABLE t (id int PRIMARY KEY, v int)")
    return pair


# ── transactions ─────────────────────────────────────────────────────────────────────────────


def test_a_transaction_held_over_several_runs_loses_nothing_and_doubles_nothing(table):
    stream = followed(table, "t", **APPEND)
    table.source("INSERT INTO t VALUES (1)")
    stream.until({1})
    with table.connect("source", autocommit=False) as slow:
        slow.execute("INSERT INTO t VALUES (2)")
        for quick in (3, 4, 5):
            table.source(f"INSERT INTO t VALUES ({quick})")
            assert stream.read() == []
        with slow.transaction():
            slow.execute("INSERT INTO t VALUES (6)")
        slow.commit()
    stream.until({1, 2, 3, 4, 5, 6})
    stream.read()
    assert sorted(stream.seen) == [1, 2, 3, 4, 5, 6]


def test_one_that_has_begun_and_writes_later_holds_nothing_and_is_not_missed(table):
    stream = followed(table, "t", **APPEND)
    stream.read()
    with table.connect("source", autocommit=False) as slow:
        slow.execute("SELECT 1")
        table.source("INSERT INTO t VALUES (1)")
        assert stream.read() == [1]
        slow.execute("INSERT INTO t VALUES (2)")
        assert stream.read() == []
        slow.commit()
    stream.until({2})
    assert stream.seen == [1, 2]


def test_the_first_read_leaves_out_what_the_next_will_bring(table):
    with table.connect("source", autocommit=False) as slow:
        slow.execute("INSERT INTO t VALUES (1)")
        table.source("INSERT INTO t VALUES (2)")  # later than one that is open: not decided
        stream = followed(table, "t", **APPEND)
        assert stream.read() == []
        slow.commit()
    stream.until({1, 2})
    stream.read()
    assert sorted(stream.seen) == [1, 2]


def test_a_rolled_back_write_does_not_bring_its_row_again(table):
    table.source("INSERT INTO t VALUES (1, 0)")
    stream = followed(table, "t", **APPEND)
    stream.until({1})
    with table.connect("source", autocommit=False) as undone:
        undone.execute("UPDATE t SET v = 1")
        undone.rollback()
    table.source("SELECT FROM t FOR UPDATE")  # a lock is no change
    assert stream.read() == []


def test_who_holds_the_bound_for_long_is_named(table, monkeypatch):
    monkeypatch.setattr(pg_window, "_HELD_LONG", timedelta(0))
    stream = followed(table, "t", **MERGE)
    stream.read()
    assert list(stream.notes) == []
    with table.connect("source", autocommit=False) as slow:
        slow.execute("INSERT INTO t VALUES (1)")
        stream.read()
        pid = slow.info.backend_pid
        assert list(stream.notes) == [f"held back by the open transaction of pid {pid}"]
        slow.rollback()
    table.source("BEGIN", "INSERT INTO t VALUES (1)", "PREPARE TRANSACTION 'apart'")
    try:
        stream.read()
        assert list(stream.notes) == ["held back by prepared transaction 'apart'"]
    finally:
        table.source("ROLLBACK PREPARED 'apart'")


# ── another server, or an earlier state of it ────────────────────────────────────────────────


def test_a_cursor_of_another_server_reads_everything_and_says_why(table):
    table.source("INSERT INTO t VALUES (1), (2)")
    stream = followed(table, "t", **MERGE)
    stream.until({1, 2})
    for change, why in (
        ({"system": "1"}, "is another server than before"),
        ({"timeline": "77"}, "was restored, or a standby took over"),
        ({"value": str(int(stream.upper) + 1_000_000)}, "is at an earlier state than before"),
        ({"value": str(int(stream.upper) - 2**31)}, "over 2^31 transactions since the last run"),
    ):
        assert stream.read() == []
        assert stream.cursor is not None
        stream.cursor = {**stream.cursor, **change}
        assert sorted(stream.read()) == [1, 2]
        assert why in stream.notes[0]
        assert stream.batch is not None
        assert stream.batch.full


def test_a_cursor_that_names_no_timeline_is_one_of_this_server(table):
    """Versions before this one wrote such."""
    table.source("INSERT INTO t VALUES (1)")
    stream = followed(table, "t", **MERGE)
    stream.until({1})
    assert stream.cursor is not None
    stream.cursor = {k: v for k, v in stream.cursor.items() if k != "timeline"}
    assert stream.read() == []
    assert "timeline" in stream.cursor


def test_an_append_that_reads_everything_again_doubles_nothing(table):
    """The target becomes what the server has: what it lost is gone, too."""
    stream = Loaded(table, "t", **APPEND)
    table.source("INSERT INTO t VALUES (1), (2)")
    stream.sync()
    table.session("destination").execute(
        'UPDATE _syncward.state SET cursor = cursor || \'{"timeline": "77"}\''
    )
    table.source("DELETE FROM t WHERE id = 2", "INSERT INTO t VALUES (3)")
    stream.sync()
    assert table.same("t")


# ── a cluster of its own ─────────────────────────────────────────────────────────────────────


class Own:
    """A cluster that is stopped, copied and set back, with one table in it."""

    def __init__(self, root) -> None:
        root.mkdir()
        self.cluster = Cluster(root, durable=False, guard_parent=True)

    def connect(self, **more):
        return psycopg.connect(
            host=self.cluster.host, port=self.cluster.port, user="postgres", dbname="postgres",
            password=self.cluster.password, **{"autocommit": True, **more},
        )  # fmt: skip

    def act(self, *statements: str) -> list[tuple[object, ...]]:
        with self.connect() as conn:
            found = [conn.execute(s) for s in statements]
            return found[-1].fetchall() if found[-1].description else []

    def follow(self, **spec) -> Followed:
        config = {
            "host": self.cluster.host, "port": self.cluster.port, "database": "postgres",
            "user": "postgres", "sslmode": "disable",
        }  # fmt: skip
        return Followed(config, {"password": self.cluster.password}, "t", **spec)

    def again(self, stream: Followed) -> None:
        """Point a stream at the port that this cluster has now."""
        stream._config = {**stream._config, "port": self.cluster.port}
        stream._secret = {"password": self.cluster.password}

    @property
    def data(self):
        return self.cluster.root / "pgdata"

    def copied_to(self, root) -> "Own":
        """Copy a cluster that is stopped, with everything in it."""
        shutil.copytree(self.cluster.root, root, symlinks=True)
        made = Own.__new__(Own)
        made.cluster = Cluster(root, durable=False, guard_parent=True)
        for path in (root, *root.rglob("*")):
            made.cluster._own(path)
        return made


@contextmanager
def running(own: Own):
    own.cluster.start()
    try:
        yield own
    finally:
        own.cluster.stop()


@pytest.fixture
def own(tmp_path):
    made = Own(tmp_path / "pg")
    with running(made):
        made.act("CREATE TABLE t (id int PRIMARY KEY, v int)", "INSERT INTO t VALUES (1), (2)")
    return made


def next_xid(own: Own, number: int, epoch: int) -> None:
    """Let a stopped cluster go on with another transaction; what it knows of older ones ends."""
    done = own.cluster._run("pg_resetwal", "-f", "-x", str(number), "-e", str(epoch), str(own.data))
    assert done.returncode == 0, done.stdout
    segment = own.data / "pg_xact" / f"{number // (8192 * 4 * 32):04X}"
    if not segment.exists():
        segment.write_bytes(b"\x55" * 8192 * 32)  # all committed
        own.cluster._own(segment)


@pytest.mark.full
def test_a_window_goes_over_the_end_of_32_bits(own):
    with running(own):
        own.act("VACUUM FREEZE")
    next_xid(own, 2**32 - 40, 0)
    with running(own):
        stream = own.follow(**APPEND)
        stream.until({1, 2})
        own.act("INSERT INTO t VALUES (3)")
        assert stream.read() == [3]
        with own.connect(autocommit=False) as slow:
            slow.execute("INSERT INTO t VALUES (4)")  # before the end
            before = int(stream.upper)
            for i in range(100, 160):  # over it
                own.act(f"INSERT INTO t VALUES ({i})")
            assert stream.read() == []
            slow.commit()
        found = stream.read()
        assert before < 2**32 < int(stream.upper)
        assert sorted(found) == [4, *range(100, 160)]
        own.act("INSERT INTO t VALUES (5)", "UPDATE t SET v = 1 WHERE id = 2")
        assert sorted(stream.read()) == [2, 5]
        assert stream.read() == []


@pytest.mark.full
def test_half_of_all_numbers_later_everything_is_read_again(own):
    with running(own):
        own.act("VACUUM FREEZE")
        stream = own.follow(**MERGE)
        stream.until({1, 2})
        assert stream.read() == []
    next_xid(own, 2**31 + 2_000, 0)
    with running(own):
        own.again(stream)
        assert sorted(stream.read()) == [1, 2]
        assert "over 2^31 transactions since the last run" in stream.notes[0]
        assert stream.read() == []


@pytest.mark.full
def test_a_backup_that_was_restored_and_ran_on_is_not_taken_for_what_it_was(own, tmp_path):
    """Its transactions have the numbers of those that were lost: no number tells them apart."""
    copy = own.copied_to(tmp_path / "copy")
    with running(own):
        stream = own.follow(**MERGE)
        stream.until({1, 2})
        for i in range(10, 20):
            own.act(f"INSERT INTO t VALUES ({i})")
        stream.until(set(range(10, 20)))
    (copy.data / "recovery.signal").touch()
    copy.cluster._own(copy.data / "recovery.signal")
    with (copy.data / "postgresql.auto.conf").open("a") as settings:
        settings.write("restore_command = 'false'\n")
    with running(copy):
        reached(copy, "SELECT NOT pg_is_in_recovery()")
        copy.again(stream)
        for i in range(100, 140):  # in the numbers below the last bound, and beyond it
            copy.act(f"INSERT INTO t VALUES ({i})")
        found = set(stream.read())
        assert "was restored, or a standby took over" in stream.notes[0]
        assert found == {1, 2, *range(100, 140)}
        assert stream.read() == []


@pytest.mark.full
def test_a_disk_that_was_set_back_is_seen_until_it_has_passed_the_last_bound(own, tmp_path):
    copy = own.copied_to(tmp_path / "copy")
    with running(own):
        stream = own.follow(**MERGE)
        for i in range(10, 20):
            own.act(f"INSERT INTO t VALUES ({i})")
        stream.until(set(range(10, 20)))
    with running(copy):
        copy.again(stream)
        copy.act("INSERT INTO t VALUES (30)")
        assert sorted(stream.read()) == [1, 2, 30]
        assert "is at an earlier state than before" in stream.notes[0]


@pytest.mark.full
def test_a_standby_is_read_by_xmin_exactly_and_by_time_inexactly(own, tmp_path):
    with running(own):
        own.act("CREATE TABLE u (id int PRIMARY KEY, at timestamptz DEFAULT now())")
        own.act("INSERT INTO u VALUES (1)")
    copy = own.copied_to(tmp_path / "copy")
    (copy.data / "standby.signal").touch()
    copy.cluster._own(copy.data / "standby.signal")
    with running(copy):
        stream = copy.follow(**APPEND)
        assert [sorted(stream.read()), stream.read()] == [[1, 2], []]
        assert not any("inexact" in note for note in stream.notes)
        times = copy.follow(mode="merge", key=("id",), cursor="at")
        times.spec = times.spec.model_copy(update={"name": "public.u"})
        times.read()
        assert times.notes[0] == "inexact: a standby; rows are read 60 s behind"
        # it takes over: the timeline is another one, whatever was or was not lost
        copy.act("SELECT pg_promote()")
        assert sorted(stream.read()) == [1, 2]
        assert "a standby took over" in stream.notes[0]


@pytest.mark.full
def test_a_standby_that_took_over_is_known_before_its_first_checkpoint(own, tmp_path):
    """What its primary committed last is lost, and other rows get the numbers of those."""
    copy = own.copied_to(tmp_path / "copy")
    (copy.data / "standby.signal").touch()
    copy.cluster._own(copy.data / "standby.signal")
    with running(own):
        source = (
            f"host={own.cluster.host} port={own.cluster.port} user=postgres "
            f"password={own.cluster.password}"
        )
        with (copy.data / "postgresql.auto.conf").open("a") as settings:
            settings.write(f"primary_conninfo = '{source}'\n")
        own.act("INSERT INTO t VALUES (3)")
        with running(copy):
            reached(copy, "SELECT max(id) = 3 FROM t")
            reached(copy, "SELECT count(*) = 1 FROM pg_stat_wal_receiver")
            on_standby = copy.follow(**MERGE)
            on_standby.until({1, 2, 3})
            assert on_standby.cursor["timeline"] == "1"
        stream = own.follow(**MERGE)
        for i in range(10, 20):  # which the standby never gets
            own.act(f"INSERT INTO t VALUES ({i})")
        stream.until({1, 2, 3, *range(10, 20)})
    with running(copy):
        ((checkpointer,),) = copy.act(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'"
        )
        os.kill(int(str(checkpointer)), signal.SIGSTOP)
        try:
            copy.act("SELECT pg_promote()")
            for i in range(100, 140):  # in the numbers below the last bound, and beyond it
                copy.act(f"INSERT INTO t VALUES ({i})")
            assert copy.act("SELECT timeline_id FROM pg_control_checkpoint()") == [(1,)]
            copy.again(stream)
            assert set(stream.read()) == {1, 2, 3, *range(100, 140)}
            assert "a standby took over" in stream.notes[0]
            assert (stream.cursor["timeline"], stream.read()) == ("2", [])
        finally:
            os.kill(int(str(checkpointer)), signal.SIGCONT)
        copy.act("CHECKPOINT")
        assert stream.read() == []  # its control file says so, too, and that changes nothing


def reached(own: Own, question: str) -> None:
    deadline = time.monotonic() + 60
    while own.act(question) != [(True,)]:
        assert time.monotonic() < deadline, question
        time.sleep(0.05)
