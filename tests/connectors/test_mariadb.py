"""MariaDB as a source: types, bounds under open transactions, links. Pairs: conformance/."""

import socket
import ssl
import struct
import threading
from contextlib import closing, contextmanager
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from uuid import UUID

import pytest

from connectors import registry
from connectors.egress import EgressRefused
from connectors.mariadb import link as mariadb_link
from connectors.mariadb import window
from connectors.mariadb.tables import MariadbConfig, describe
from connectors.portable import Kind
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, SyncwardError, TransientError
from schemas.records import WireFormat
from schemas.streams import StreamSpec
from tests.connectors.conformance.ends import policy
from tests.mariadb import server
from tests.tls_proxy import certificate


class Shop:
    """A database of a real server, and the connector on it."""

    def __init__(self, root) -> None:
        self.server = server()
        self.name, self.config, self.secrets = self.server.database()
        self.policy = policy(root)

    def act(self, *statements: str) -> list[tuple[object, ...]]:
        with self.session() as session, session.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            return list(cursor.fetchall())

    def session(self):
        return self.server.connect(self.name)

    def open(self):
        return registry.open_source("mariadb", self.config, self.secrets, self.policy)

    def spec(self, table, **spec) -> StreamSpec:
        return StreamSpec(name=f"{self.name}.{table}", **{"mode": "replace", **spec})

    def read(self, table, since=None, **spec):
        """Return (rows, batch) of one read."""
        with (
            closing(self.open()) as source,
            source.extract(self.spec(table, **spec), since, WireFormat.ROWS) as batches,
        ):
            (batch,) = batches
            return [row for group in batch.groups for row in group.rows], batch


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


# ── values ───────────────────────────────────────────────────────────────────────────────────

#: declared, as SQL writes a value, the type here, the value here
_VALUES = [
    ("TINYINT", "-128", "smallint", -128),
    ("TINYINT UNSIGNED", "255", "smallint", 255),
    ("BOOLEAN", "1", "boolean", True),
    ("SMALLINT UNSIGNED", "65535", "integer", 65_535),
    ("MEDIUMINT UNSIGNED", "16777215", "integer", 16_777_215),
    ("INT UNSIGNED", "4294967295", "bigint", 4_294_967_295),
    ("INT(5) UNSIGNED ZEROFILL", "7", "bigint", 7),
    ("BIGINT UNSIGNED", "18446744073709551615", "numeric(20,0)", Decimal(18446744073709551615)),
    ("DECIMAL(65,30)", "-1.5", "numeric(65,30)", Decimal("-1.500000000000000000000000000000")),
    ("FLOAT", "0.1", "real", 0.10000000149011612),
    ("DOUBLE", "0.1", "double precision", 0.1),
    ("BIT(1)", "b'1'", "bit(1)", "1"),
    ("BIT(64)", "b'101'", "bit(64)", "101".zfill(64)),
    ("YEAR", "1999", "smallint", 1999),
    ("CHAR(3)", "'a'", "character varying(3)", "a"),
    ("VARCHAR(3)", "'a '", "character varying(3)", "a "),
    ("VARCHAR(9) CHARACTER SET latin1", "'é€'", "character varying(9)", "é€"),
    ("LONGTEXT", "'🙂'", "text", "🙂"),
    ("ENUM('a','b')", "'b'", "text", "b"),
    ("SET('x','y','z')", "'z,x'", "text", "x,z"),
    ("BINARY(3)", "'a'", "bytea", b"a\0\0"),
    ("VARBINARY(3)", "x'ff00'", "bytea", b"\xff\0"),
    ("BLOB", "''", "bytea", b""),
    ("DATE", "'0001-01-01'", "date", date(1, 1, 1)),
    ("TIME", "'23:59:59'", "time(0) without time zone", time(23, 59, 59)),
    ("TIME(6)", "'00:00:00.000001'", "time without time zone", time(0, 0, 0, 1)),
    ("DATETIME", "'2026-03-29 02:30:00'", "timestamp(0) without time zone",
     datetime(2026, 3, 29, 2, 30)),  # noqa: DTZ001 - it has none
    ("DATETIME(6)", "'9999-12-31 23:59:59.999999'", "timestamp without time zone",
     datetime.max),  # noqa: DTZ901 - as above
    ("TIMESTAMP(3) NULL", "'2026-01-02 03:04:05.678'", "timestamp(3) with time zone",
     datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)),
    ("JSON", "'{\"b\": 1,  \"a\": 1.00}'", "json", '{"b": 1,  "a": 1.00}'),
    ("UUID", "'00000000-0000-0000-0000-00000000abcd'", "uuid",
     UUID("00000000-0000-0000-0000-00000000abcd")),
    ("INET6", "'2001:db8::1'", "inet", "2001:db8::1"),
    ("INT AS (c1 + 1) VIRTUAL", None, "integer", -127),
    ("INT INVISIBLE", "5", "integer", 5),
]  # fmt: skip


@pytest.mark.full
def test_every_type_arrives_as_what_it_is(shop):
    columns = ", ".join(f"c{i} {v[0]}" for i, v in enumerate(_VALUES, 1))
    own = [(f"c{i}", v[1]) for i, v in enumerate(_VALUES, 1) if v[1] is not None]
    shop.act(
        f"CREATE TABLE t ({columns})",
        f"INSERT INTO t ({', '.join(n for n, _ in own)}) VALUES ({', '.join(v for _, v in own)})",
    )
    ((row,), batch) = shop.read("t")
    found = [(c.type, v) for c, v in zip(batch.shape.columns, row, strict=True)]
    assert found == [(v[2], v[3]) for v in _VALUES]
    assert [type(v) for v in row] == [type(v[3]) for v in _VALUES]


@pytest.mark.full
@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("DATE", "'0000-00-00'"), ("DATE", "'2026-00-10'"), ("DATE", "'2026-02-31'"),
        ("DATETIME", "'0000-00-00 00:00:00'"), ("TIMESTAMP NULL", "'0000-00-00 00:00:00'"),
        ("TIME", "'24:00:00'"), ("TIME", "'-01:00:00'"), ("TIME", "'838:59:59'"),
        ("BOOLEAN", "77"),
    ],
)  # fmt: skip
def test_what_no_type_here_holds_ends_the_read_with_its_column_and_no_guess(shop, declared, value):
    shop.act(
        f"CREATE TABLE t (id INT PRIMARY KEY, secret {declared})",
        "SET sql_mode = 'ALLOW_INVALID_DATES'",
        f"INSERT INTO t VALUES (1, NULL), (2, {value})",
    )
    with pytest.raises(ConfigError, match=r"column secret .* of row 2 of the read") as caught:
        shop.read("t")
    assert caught.value.code == "data_refused"
    assert value.strip("'") not in str(caught.value)


@pytest.mark.full
def test_a_type_without_a_counterpart_is_refused_with_what_to_do(shop):
    shop.act(
        "CREATE TABLE t (id INT PRIMARY KEY, place POINT)",
        "CREATE VIEW v AS SELECT id, ST_AsText(place) AS place FROM t",
        "INSERT INTO t VALUES (1, ST_PointFromText('POINT(1 2)'))",
    )
    with pytest.raises(ConfigError, match=r"place \(point\) has no counterpart .* ST_AsText"):
        shop.read("t")
    assert shop.read("v")[0] == [(1, "POINT(1 2)")]


@pytest.mark.full
def test_names_are_taken_as_they_are_written(shop):
    shop.act('CREATE TABLE "a`%s b" ("x%`" INT PRIMARY KEY, "select" INT)')
    shop.act('INSERT INTO "a`%s b" VALUES (1, 2)')
    rows, batch = shop.read("a`%s b", mode="merge", key=("x%`",), cursor="x%`")
    assert (rows, batch.shape.key) == ([(1, 2)], ("x%`",))
    with pytest.raises(ConfigError, match="no table"):
        shop.read("A`%s b")


@pytest.mark.full
def test_a_key_is_proven_by_an_index_over_whole_columns_that_are_never_null(shop):
    shop.act(
        "CREATE TABLE t (a INT NOT NULL, b INT, c VARCHAR(9) NOT NULL, d INT NOT NULL, "
        "UNIQUE (a), UNIQUE (b), UNIQUE (c(3)), INDEX (d))"
    )
    proven = {
        name: shop.read("t", mode="merge", key=(name,))[1].shape.key_is_unique for name in "abcd"
    }
    assert proven == {"a": True, "b": False, "c": False, "d": False}


# ── windows ──────────────────────────────────────────────────────────────────────────────────

_ORDERS = (
    "CREATE TABLE orders (id BIGINT AUTO_INCREMENT PRIMARY KEY, note TEXT, "
    "changed TIMESTAMP(6) DEFAULT NOW(6) ON UPDATE NOW(6))"
)


@contextmanager
def left_open(shop, *statements: str):
    """A transaction that has done something and is neither committed nor rolled back yet."""
    with shop.session() as session, session.cursor() as cursor:
        cursor.execute("BEGIN")
        for statement in statements:
            cursor.execute(statement)
        yield session
        session.rollback()


def notes(rows):
    return sorted(row[1] for row in rows)


@pytest.mark.full
@pytest.mark.parametrize("cursor", ["id", "changed"])
def test_an_append_misses_no_row_that_commits_out_of_order(shop, monkeypatch, cursor):
    monkeypatch.setattr(window, "_WAIT_S", 0.2)
    shop.act(_ORDERS, "INSERT INTO orders (note) VALUES ('begin')", "DO SLEEP(1.1)")
    how = {"mode": "append", "cursor": cursor}
    rows, batch = shop.read("orders", **how)
    assert (notes(rows), batch.full) == (["begin"], True)
    with left_open(shop, "INSERT INTO orders (note) VALUES ('slow')") as slow:
        shop.act("INSERT INTO orders (note, changed) VALUES ('fast', NOW(6) + INTERVAL 1 SECOND)")
        first, batch = shop.read("orders", batch.upper, **how)
        assert (first, batch.full) == ([], False)
        shop.act("DO SLEEP(2.1)")  # both lie behind the margin
        second, batch = shop.read("orders", batch.upper, **how)
        assert second == []
        slow.commit()
    third, batch = shop.read("orders", batch.upper, **how)
    assert notes(third) == ["fast", "slow"]
    fourth, _ = shop.read("orders", batch.upper, **how)
    assert fourth == []


@pytest.mark.full
def test_an_append_by_number_waits_for_those_that_end_soon(shop):
    shop.act(_ORDERS)
    how = {"mode": "append", "cursor": "id"}
    with left_open(shop, "INSERT INTO orders (note) VALUES ('slow')") as slow:
        shop.act("INSERT INTO orders (note) VALUES ('fast')")
        threading.Timer(0.5, slow.commit).start()
        rows, batch = shop.read("orders", **how)
    assert (notes(rows), batch.notes) == (["fast", "slow"], ())


@pytest.mark.full
def test_an_append_that_begins_while_others_write_reads_all_and_begins_anew(shop, monkeypatch):
    """Without a bound the batch is all there is, which the next one replaces."""
    monkeypatch.setattr(window, "_WAIT_S", 0.2)
    shop.act(_ORDERS)
    how = {"mode": "append", "cursor": "id"}
    with left_open(shop, "INSERT INTO orders (note) VALUES ('slow')") as slow:
        shop.act("INSERT INTO orders (note) VALUES ('fast')")
        rows, batch = shop.read("orders", **how)
        assert (notes(rows), batch.everything) == (["fast"], True)
        assert batch.notes[0].startswith("held back by the open transaction or statement")
        slow.commit()
    rows, batch = shop.read("orders", batch.upper, **how)
    assert (notes(rows), batch.full, batch.upper["value"]) == (["fast", "slow"], True, "2")


@pytest.mark.full
def test_a_merge_sees_what_is_committed_at_once_and_misses_nothing_that_is_late(shop):
    shop.act(_ORDERS)
    how = {"mode": "merge", "key": ("id",), "cursor": "changed"}
    with left_open(shop, "INSERT INTO orders (note) VALUES ('slow')") as slow:
        shop.act("DO SLEEP(1.5)", "INSERT INTO orders (note) VALUES ('fast')")
        first, batch = shop.read("orders", **how)
        assert notes(first) == ["fast"]
        slow.commit()
    second, batch = shop.read("orders", batch.upper, **how)
    assert notes(second) == ["fast", "slow"]
    assert batch.notes == ()


@pytest.mark.full
def test_a_statement_that_still_runs_holds_the_bound_before_its_transaction_shows(shop):
    """It has read the clock, waits for a table's definition, and is no transaction yet."""
    shop.act(_ORDERS)
    with shop.session() as lock, lock.cursor() as locking, shop.session() as late:
        locking.execute("LOCK TABLES orders WRITE")
        thread = threading.Thread(
            target=late.query, args=("INSERT INTO orders (note) VALUES ('late')",)
        )
        thread.start()
        waits = "SELECT 1 FROM information_schema.processlist WHERE state LIKE 'Waiting for table%'"
        while not shop.act(waits):
            pass
        shop.act("DO SLEEP(2)")
        with closing(shop.open()) as source:
            stream = shop.spec("orders", mode="merge", key=("id",), cursor="changed")
            session = source._session
            table = describe(session, shop.name, "orders")
            assert table is not None
            seen = window.look(session, stream, table)
        locking.execute("UNLOCK TABLES")
        thread.join()
    ((changed,),) = shop.act("SELECT changed FROM orders")
    assert seen.at is not None
    assert seen.at < changed.replace(tzinfo=UTC) < seen.now - timedelta(seconds=1)


@pytest.mark.full
def test_a_prepared_transaction_holds_every_bound(shop):
    shop.act(_ORDERS)
    with shop.session() as session, session.cursor() as cursor:
        for statement in ("START 'held'", "END 'held'", "PREPARE 'held'"):
            if statement.startswith("END"):
                cursor.execute("INSERT INTO orders (note) VALUES ('prepared')")
            cursor.execute(f"XA {statement}")
    try:
        how = {"mode": "append", "cursor": "changed"}
        rows, batch = shop.read("orders", **how)
        assert (rows, batch.everything) == ([], True)
        assert "prepared transaction is open" in batch.notes[0]
    finally:
        shop.act("XA COMMIT 'held'")
    shop.act("DO SLEEP(1.1)")
    rows, _ = shop.read("orders", batch.upper, **how)
    assert notes(rows) == ["prepared"]


@pytest.mark.full
def test_a_list_of_transactions_that_is_not_renewed_holds_the_bound(shop):
    """Whoever looks more than ten times a second keeps the server from making a new one."""
    shop.act(_ORDERS)
    done = threading.Event()

    def watch():
        with shop.session() as session, session.cursor() as cursor:
            while not done.wait(0.01):
                cursor.execute("SELECT COUNT(*) FROM information_schema.innodb_trx")

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        shop.act("DO SLEEP(0.5)")
        with left_open(shop, "INSERT INTO orders (note) VALUES ('slow')") as slow:
            shop.act("DO SLEEP(1.5)")
            first, batch = shop.read("orders", mode="append", cursor="changed")
            slow.commit()
    finally:
        done.set()
        thread.join()
    assert (first, batch.everything) == ([], True)
    assert "never renews" in batch.notes[0]
    assert notes(shop.read("orders", batch.upper, mode="append", cursor="changed")[0]) == ["slow"]


@pytest.mark.full
def test_without_process_a_window_is_inexact_and_append_by_number_is_refused(shop):
    shop.act(_ORDERS, "INSERT INTO orders (note) VALUES ('x')")
    shop.act(f"REVOKE PROCESS ON *.* FROM '{shop.name}'@'%'")
    _, batch = shop.read("orders", mode="merge", key=("id",), cursor="changed")
    assert batch.notes == (
        "inexact: without PROCESS open transactions are hidden; rows are read 60 s behind",
    )
    with pytest.raises(ConfigError, match="GRANT PROCESS"):
        shop.read("orders", mode="append", cursor="id")
    with closing(shop.open()) as source:
        assert source.test().missing[0].startswith(f"GRANT PROCESS ON *.* TO {shop.name}")


@pytest.mark.full
def test_a_clock_without_a_zone_is_bounded_by_the_hour_that_comes_twice(shop):
    """The server is in New York, where 01:00 to 02:00 came twice on 2026-11-01."""
    with closing(shop.open()) as source:

        def wall(hour, minute):
            at = datetime(2026, 11, 1, hour, minute, tzinfo=UTC)
            return window._in_column(source._session, Kind.TIMESTAMP, at)[11:16]

        assert [wall(4, 30), wall(5, 0), wall(5, 30), wall(6, 0), wall(6, 30), wall(7, 0)] == [
            "00:30", "01:00", "01:00", "01:00", "01:30", "02:00",
        ]  # fmt: skip


@pytest.mark.full
def test_an_engine_without_snapshots_is_said(shop):
    shop.act("CREATE TABLE t (id INT) ENGINE=MyISAM")
    assert "knows no snapshots" in shop.read("t")[1].notes[0]


@pytest.mark.full
def test_a_snapshot_is_of_one_moment(shop):
    shop.act(_ORDERS, "INSERT INTO orders (note) VALUES ('before')")
    stream = shop.spec("orders", mode="merge", key=("id",), cursor="changed", deletes="hard")
    with closing(shop.open()) as source, source.extract(stream, None, sweep=True) as batches:
        (batch,) = batches
        shop.act("INSERT INTO orders (note) VALUES ('after')")
        assert notes(row for group in batch.groups for row in group.rows) == ["before"]
        assert [row for group in batch.keys.groups for row in group.rows] == [(1,)]


@pytest.mark.full
def test_a_read_that_was_left_early_does_not_spoil_the_next(shop):
    shop.act(_ORDERS, "INSERT INTO orders (note) SELECT 'x' FROM seq_1_to_20000")
    with closing(shop.open()) as source:
        for taken in (1, 2):
            with source.extract(shop.spec("orders"), None) as batches:
                groups = next(batches).groups
                for _ in range(taken):
                    next(groups)
        with source.extract(shop.spec("orders"), None) as batches:
            assert sum(len(group.rows) for group in next(batches).groups) == 20_000


@pytest.mark.full
def test_a_server_that_ends_the_session_is_a_lost_connection(shop):
    shop.act(_ORDERS, "INSERT INTO orders (note) SELECT REPEAT('x', 9999) FROM seq_1_to_20000")
    with closing(shop.open()) as source, source.extract(shop.spec("orders"), None) as batches:
        groups = next(batches).groups
        next(groups)
        shop.act(f"KILL {source._session.thread}")
        with pytest.raises(TransientError) as caught:
            list(groups)
    assert caught.value.code in {"connection_lost", "session_ended"}


@pytest.mark.full
def test_what_the_login_may_do_is_reported(shop):
    shop.act(_ORDERS)
    with closing(shop.open()) as source:
        report = source.test()
        (found,) = source.discover()
    assert report.server_version.startswith("MariaDB 1")
    assert (report.tls, report.login, report.missing) == ("TLSv1.3", shop.name, ())
    assert found.suggestion == "{mode: merge, key: [id], cursor: changed}"
    assert found.cursors == ("changed", "id")


# ── links ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"host": "127.0.0.1"}, "tls_refused"),  # the certificate says localhost
        ({"sslrootcert": "system"}, "tls_refused"),
        ({"database": "nowhere"}, "permission"),
        ({"user": "nobody"}, "credentials"),
    ],
)
def test_a_wrong_setting_is_named(shop, change, code):
    shop.config.update(change)
    with pytest.raises(ConfigError) as caught:
        shop.open()
    assert caught.value.code == code


def config(port: int, **more: object) -> dict[str, object]:
    return {
        "host": "localhost", "port": port, "database": "shop", "user": "reader", **more,
    }  # fmt: skip


def test_a_link_goes_where_the_guard_lets_it_and_to_no_other_address(monkeypatch):
    with pytest.raises(EgressRefused):
        registry.open_source("mariadb", config(3306), {"password": "x"}, LinkPolicy())
    reached = []

    def note(address, *_rest):
        reached.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", note)
    checked = MariadbConfig.model_validate(config(3306, host="db.example.com"))
    with pytest.raises(TransientError):
        mariadb_link.open_session(checked, {}, LinkPolicy(), lambda *_: ["198.41.0.4"])
    assert reached == [("198.41.0.4", 3306)]


_NATIVE = b"mysql_native_password\0"
#: PROTOCOL_41, CONNECT_WITH_DB, SECURE_CONNECTION, PLUGIN_AUTH
_CAPABLE = 0x0200 | 0x0008 | 0x8000 | 0x80000
_SSL = 0x0800


def greeting(capabilities: int) -> bytes:
    low, high = capabilities & 0xFFFF, capabilities >> 16
    return (
        b"\x0a" + b"5.5.5-10.11.9-MariaDB\0" + struct.pack("<I", 1) + b"12345678\0"
        + struct.pack("<HBHHB", low, 45, 2, high, 21) + b"\0" * 10 + b"123456789012\0" + _NATIVE
    )  # fmt: skip


def packet(number: int, body: bytes) -> bytes:
    return struct.pack("<I", len(body))[:3] + bytes([number]) + body


@contextmanager
def pretender(talk):
    """A server that says what `talk` says to one client, and keeps what the client said last."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            link, _ = listener.accept()
            with link:
                link.settimeout(10)
                heard.append(talk(link))

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], heard
        thread.join()


def test_a_server_without_tls_hears_nothing(tmp_path):
    def talk(link):
        link.sendall(packet(0, greeting(_CAPABLE)))
        return link.recv(1_000)

    with pretender(talk) as (port, heard), pytest.raises(ConfigError) as caught:
        registry.open_source("mariadb", config(port), {"password": "x"}, policy(tmp_path))
    assert (caught.value.code, heard) == ("tls_missing", [b""])


@pytest.mark.parametrize("plugin", ["mysql_clear_password", "dialog", "mysql_old_password"])
def test_a_server_that_asks_for_the_password_itself_does_not_get_it(tmp_path, plugin):
    files = certificate(tmp_path, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)

    def talk(link):
        link.sendall(packet(0, greeting(_CAPABLE | _SSL)))
        link.recv(36)
        with context.wrap_socket(link, server_side=True) as safe:
            safe.recv(1_000)
            safe.sendall(packet(3, b"\xfe" + plugin.encode() + b"\0Password: "))
            try:
                return safe.recv(1_000)
            except OSError:  # it left without a word
                return b""

    secrets = {"password": "hunter2-canary"}
    with pretender(talk) as (port, heard), pytest.raises(SyncwardError) as caught:
        registry.open_source(
            "mariadb", config(port, sslrootcert=str(files[0])), secrets, policy(tmp_path)
        )
    assert (caught.value.code, heard) == ("login_method", [b""])


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9\r\n", b"\x01\0\0\0\x0a", b"", b"\xff" * 40])
def test_what_is_no_mariadb_is_said_in_our_words(tmp_path, said):
    def talk(link):
        link.sendall(said)
        link.shutdown(socket.SHUT_WR)
        return link.recv(1_000)

    with pretender(talk) as (port, _), pytest.raises(SyncwardError) as caught:
        registry.open_source("mariadb", config(port), {"password": "x"}, policy(tmp_path))
    assert str(caught.value).startswith(f"localhost:{port}/shop: ")


class Answers(mariadb_link.Session):
    """A session that was told a version, and nothing else."""

    def __init__(self, version: str) -> None:
        self._config = MariadbConfig.model_validate(config(1))
        self._conn = type("Said", (), {"get_server_info": lambda _: version})()


def test_another_server_of_the_protocol_is_refused():
    for version in ("8.0.36", "5.5.5-10.5.9-MariaDB"):
        with pytest.raises(ConfigError, match=r"not MariaDB 10\.6 or later"):
            Answers(version)._checked_version()
    assert Answers("5.5.5-11.4.2-MariaDB-log")._checked_version() == "MariaDB 11.4.2"
