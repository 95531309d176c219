"""Rows that no cursor shows: partitions that are attached, tables that are swapped, missing values.

`cursor: xmin` is exact, so it must bring rows that come with their table, and once.
"""

from itertools import count

import pytest

from connectors.postgres.catalog import describe
from schemas.errors import ConfigError, ReadAgain
from tests.connectors.followed import Loaded

pytestmark = pytest.mark.integration

MERGE = {"mode": "merge", "key": ("id",), "cursor": "xmin"}
APPEND = {"mode": "append", "cursor": "xmin"}
_NUMBERS = count()


class Shop:
    """A pair that all tests of this file share, and a table of the test's own."""

    def __init__(self, pair) -> None:
        self.pair, self.name = pair, f"t{next(_NUMBERS)}"

    def run(self, *statements: str) -> None:
        self.pair.source(*(s.replace("{t}", self.name) for s in statements))

    def loaded(self, **spec) -> Loaded:
        return Loaded(self.pair, self.name, **spec)

    def same(self) -> bool:
        return self.pair.same(self.name)

    def ids(self, role: str = "destination") -> list[int]:
        schema = "acme" if role == "destination" else "public"
        return [
            i for (i,) in self.pair.rows(role, f"SELECT id FROM {schema}.{self.name} ORDER BY 1")
        ]


@pytest.fixture
def shop(shared_pair):
    return Shop(shared_pair)


def parts(shop) -> None:
    shop.run(
        "CREATE TABLE {t} (id int PRIMARY KEY, v int) PARTITION BY RANGE (id)",
        "CREATE TABLE {t}_1 PARTITION OF {t} FOR VALUES FROM (0) TO (100)",
        "CREATE TABLE {t}_2 (id int PRIMARY KEY, v int)",
        "INSERT INTO {t} VALUES (1, 1)",
        "INSERT INTO {t}_2 VALUES (150, 1)",
    )


ATTACH = "ALTER TABLE {t} ATTACH PARTITION {t}_2 FOR VALUES FROM (100) TO (200)"


@pytest.mark.parametrize("spec", [MERGE, APPEND], ids=lambda s: s["mode"])
def test_a_partition_that_is_attached_brings_its_rows_once(shop, spec):
    parts(shop)
    stream = shop.loaded(**spec)
    stream.sync()
    shop.run(ATTACH, "INSERT INTO {t} VALUES (160, 1)")
    assert stream.sync().rows_inserted == 2
    assert shop.same()
    shop.run("INSERT INTO {t} VALUES (170, 1)")
    assert stream.sync().rows_inserted == 1
    assert shop.same()


def test_a_partition_made_as_one_brings_its_rows_once(shop):
    parts(shop)
    stream = shop.loaded(**APPEND)
    stream.sync()
    shop.run(
        "CREATE TABLE {t}_3 PARTITION OF {t} FOR VALUES FROM (200) TO (300)",
        "INSERT INTO {t} VALUES (250, 1)",
    )
    assert stream.sync().rows_inserted == 1
    shop.run("INSERT INTO {t} VALUES (251, 1)")
    assert stream.sync().rows_inserted == 1
    assert shop.same()


def test_a_partition_of_a_partition_brings_its_rows(shop):
    parts(shop)
    shop.run(
        "CREATE TABLE {t}_9 (id int PRIMARY KEY, v int) PARTITION BY RANGE (id)",
        "CREATE TABLE {t}_91 PARTITION OF {t}_9 FOR VALUES FROM (900) TO (950)",
        "INSERT INTO {t}_9 VALUES (901, 1)",
    )
    stream = shop.loaded(**APPEND)
    stream.sync()
    shop.run("ALTER TABLE {t} ATTACH PARTITION {t}_9 FOR VALUES FROM (900) TO (999)")
    assert stream.sync().rows_inserted == 1
    assert stream.sync().rows_inserted == 0
    assert shop.same()


def test_a_child_that_is_adopted_brings_its_rows(shop):
    shop.run(
        "CREATE TABLE {t} (id int, v int)",
        "CREATE TABLE {t}_kid (id int, v int)",
        "INSERT INTO {t} VALUES (1, 1)",
        "INSERT INTO {t}_kid VALUES (2, 1)",
    )
    stream = shop.loaded(**APPEND)
    stream.sync()
    shop.run("ALTER TABLE {t}_kid INHERIT {t}")
    assert stream.sync().rows_inserted == 1
    assert shop.same()


@pytest.mark.parametrize("full", [True, False], ids=["first read", "window"])
def test_a_partition_attached_beside_an_open_transaction_comes_once(shop, full):
    """It is there already, and its place in time is not decided yet."""
    parts(shop)
    stream = shop.loaded(**APPEND)
    if not full:
        stream.sync()
    with shop.pair.connect("source", autocommit=False) as slow:
        slow.execute("SELECT pg_current_xact_id()")
        shop.run(ATTACH, "INSERT INTO {t} VALUES (160, 1)")
        stream.sync()
        assert 150 not in shop.ids()
    stream.sync()
    stream.sync()
    assert shop.same()


def test_a_foreign_partition_is_refused_by_name(shop):
    """Its rows have no xmin here: each window would leave them out."""
    cluster = shop.pair.cluster
    shop.run(
        "CREATE EXTENSION postgres_fdw",
        f"CREATE SERVER back FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{cluster.host}', "
        f"port '{cluster.port}', dbname 'postgres')",
        f"CREATE USER MAPPING FOR PUBLIC SERVER back OPTIONS (user '{cluster.superuser}', "
        f"password '{cluster.password}')",
        "CREATE TABLE {t} (id int, v int) PARTITION BY RANGE (id)",
        "CREATE FOREIGN TABLE {t}_away PARTITION OF {t} FOR VALUES FROM (200) TO (300) SERVER back",
    )
    with pytest.raises(ConfigError, match=rf"{shop.name}_away is a foreign table"):
        shop.loaded(**APPEND).sync()


SWAP = ("ALTER TABLE {t} RENAME TO {t}_old", "ALTER TABLE {t}_new RENAME TO {t}")


def swapped(shop) -> None:
    shop.run(
        "CREATE TABLE {t} (id int PRIMARY KEY, v int)",
        "INSERT INTO {t} VALUES (1, 1), (2, 1)",
        "CREATE TABLE {t}_new (id int PRIMARY KEY, v int)",
        "INSERT INTO {t}_new VALUES (1, 5), (3, 1)",
    )


@pytest.mark.parametrize("mode", ["merge", "history"])
def test_another_table_of_the_name_is_read_as_a_whole(shop, mode):
    swapped(shop)
    stream = shop.loaded(**MERGE | {"mode": mode})
    stream.sync()
    shop.run(*SWAP)
    assert stream.sync().rows_extracted == 2
    assert {1, 2, 3} == set(shop.ids())
    assert stream.sync().rows_extracted == 0


def test_another_table_of_the_name_is_added_to_an_append(shop):
    """What was loaded of the one before stays: logs are turned over so."""
    swapped(shop)
    stream = shop.loaded(**APPEND)
    stream.sync()
    shop.run(*SWAP)
    assert stream.sync().rows_inserted == 2
    shop.run(
        "ALTER TABLE {t} RENAME TO {t}_older",
        "CREATE TABLE {t} (id int PRIMARY KEY, v int)",
        "INSERT INTO {t} VALUES (4, 1)",
    )
    assert stream.sync().rows_inserted == 1
    assert stream.sync().rows_inserted == 0
    assert shop.ids() == [1, 1, 2, 3, 4]


def test_a_table_that_becomes_a_partition_is_not_added_again(shop):
    swapped(shop)
    stream = shop.loaded(**APPEND)
    stream.sync()
    shop.run(
        "ALTER TABLE {t} RENAME TO {t}_old",
        "CREATE TABLE {t} (id int PRIMARY KEY, v int) PARTITION BY RANGE (id)",
        "ALTER TABLE {t} ATTACH PARTITION {t}_old FOR VALUES FROM (0) TO (100)",
        "INSERT INTO {t} VALUES (5, 1)",
    )
    assert stream.sync().rows_inserted == 1
    assert shop.same()


def test_a_cursor_that_names_no_table_is_one_of_this_table(shop):
    """Those of versions before this one."""
    swapped(shop)
    stream = shop.loaded(**MERGE)
    stream.sync()
    shop.pair.session("destination").execute("UPDATE _syncward.state SET cursor = cursor - 'table'")
    shop.run("INSERT INTO {t} VALUES (9, 1)")
    assert stream.sync().rows_extracted == 1


@pytest.mark.parametrize(("type_", "value"), [
    ("timestamptz", "now() - interval '1 h'"), ("date", "'2026-01-01'"), ("bigint", "7"),
    ("text", "'m'"),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["merge", "history"])
def test_rows_without_a_cursor_value_come_with_every_window(shop, type_, value, mode):
    """They lie in no window; a row that is inserted so would never be seen."""
    shop.run(
        f"CREATE TABLE {{t}} (id int PRIMARY KEY, at {type_})",
        f"INSERT INTO {{t}} VALUES (1, {value}), (2, NULL)",
    )
    stream = shop.loaded(mode=mode, key=("id",), cursor="at")
    stream.sync()
    shop.run("INSERT INTO {t} VALUES (3, NULL)")
    assert stream.sync().rows_inserted == 1
    assert shop.ids() == [1, 2, 3]
    assert stream.sync().rows_unchanged >= 2


def test_a_cursor_of_an_extension_is_compared_as_it_is_ordered(shop):
    """As text, D lies before c."""
    shop.run("CREATE EXTENSION citext")
    shop.pair.session("destination").execute("CREATE EXTENSION citext")
    shop.run(
        "CREATE TABLE {t} (id int PRIMARY KEY, c citext NOT NULL)",
        "INSERT INTO {t} VALUES (1, 'a'), (2, 'c')",
    )
    stream = shop.loaded(mode="merge", key=("id",), cursor="c")
    stream.sync()
    shop.run("INSERT INTO {t} VALUES (3, 'D')")
    assert stream.sync().rows_inserted == 1
    for condition, wanted in (
        ("c = 'd'", [3]), ("c <> 'A'", [2, 3]), ("c IN ('A', 'C')", [1, 2]), ("c < 'D'", [1, 2]),
    ):  # fmt: skip
        shop.pair.session("destination").execute(f"DROP TABLE acme.{shop.name}")
        shop.loaded(mode="replace", where=condition).sync()
        assert shop.ids() == wanted


@pytest.mark.parametrize("change", [
    "ALTER COLUMN at TYPE timestamptz USING at AT TIME ZONE 'Asia/Kathmandu'",
    "ALTER COLUMN n TYPE real", "DROP COLUMN n",
])  # fmt: skip
def test_a_column_that_changes_before_the_snapshot_is_described_anew(shop, change, monkeypatch):
    """Its bytes would be taken for a value of the type before: of as many, and another one."""
    shop.run(
        "CREATE TABLE {t} (id int PRIMARY KEY, n int, at timestamp)",
        "INSERT INTO {t} VALUES (1, 7, '2026-01-01 12:00')",
    )
    told: list[object] = []

    def described(*known):
        found = describe(*known)
        if not told:
            told.append(found)
            shop.run(f"ALTER TABLE {{t}} {change}")
        return found

    monkeypatch.setattr("connectors.sources.postgres.describe", described)
    stream = shop.loaded(mode="merge", key=("id",))
    with pytest.raises(ReadAgain, match="was changed just now"):
        stream.sync()
    stream.sync()
    assert shop.same()
