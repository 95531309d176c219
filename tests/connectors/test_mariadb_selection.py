"""MariaDB: columns that are left out, masks, and conditions; a document never holds SQL."""

from contextlib import closing
from hashlib import sha256

import pytest

from connectors import masking
from schemas.errors import ConfigError
from tests.connectors.test_mariadb import Shop

pytestmark = [pytest.mark.integration, pytest.mark.full]

TABLE = """
CREATE TABLE p (id int PRIMARY KEY, name varchar(20), price decimal(12,2), ok boolean, born date,
  at datetime(6), seen timestamp(6) NULL, clock time, tag uuid, ratio double, image blob,
  doc json, place point, big bigint unsigned, `odd %s "name` varchar(9))
"""
ROWS = (
    (
        "(1, 'Ann', 1.50, 1, '2026-01-01', '2026-01-01 10:00:00', '2026-01-01 10:00:00', '10:00', "
        "'00000000-0000-0000-0000-000000000001', 0.5, 'x', '{\"a\": 1}', POINT(1, 2), "
        "18446744073709551615, 'a')"
    ),
    (
        "(2, 'ann', 10.00, 0, '2026-02-01', '2026-02-01 10:00:00.5', '2026-02-01 10:00:00', "
        "'11:00', '00000000-0000-0000-0000-000000000002', 0.25, 'y', '[]', POINT(1, 2), 7, 'b')"
    ),
    (
        "(3, 'it''s \\\\ %s', -3.25, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, "
        "9007199254740993, NULL)"
    ),
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    made = Shop(tmp_path_factory.mktemp("root"))
    made.act(TABLE, *(f"INSERT INTO p VALUES {row}" for row in ROWS))
    return made


PLAIN = {"columns": {"include": ["id"]}}


def ids(shop, where) -> list[int]:
    rows, _ = shop.read("p", where=where, **PLAIN)
    return sorted(row[0] for row in rows)


@pytest.mark.parametrize(("where", "wanted"), [
    ("id = 1", [1]),
    ("id <> 1", [2, 3]),
    ("id IN (1, 3) AND NOT (price < 0)", [1]),
    ("name = 'it''s \\ %s'", [3]),
    ("name = 'x'' OR 1 = 1 -- '", []),
    ("name = 'ann'", [1, 2]),  # by the column's own collation
    ("price = 1.5", [1]),
    ("price >= 1.50 OR price = -3.250", [1, 2, 3]),
    ("price > '9.999999999999999999'", [2]),
    ("ok = true", [1]),
    ("ok <> true", [2]),
    ("ok IS NULL", [3]),
    ("ok IS NOT NULL", [1, 2]),
    ("born < '2026-02-01'", [1]),
    ("at > '2026-02-01 10:00:00'", [2]),
    ("seen = '2026-01-01T11:00:00+01:00'", [1]),
    ("clock >= '10:30'", [2]),
    ("tag = '00000000-0000-0000-0000-000000000002'", [2]),
    ("big = 18446744073709551615", [1]),
    ("big = 9007199254740993", [3]),  # as a double it would be another number's equal
    ("big = 9007199254740992", []),
    ("\"odd %s \"\"name\" = 'b'", [2]),
    ("place IS NULL AND image IS NULL", [3]),
    ("NOT (name = 'ann' AND ok = true)", [2, 3]),
])  # fmt: skip
def test_a_condition_reads_the_rows_that_it_says(shop, where, wanted):
    assert ids(shop, where) == wanted


@pytest.mark.parametrize("where", [
    "id = 'one'", "id = 1.5", "price = 'NaN'", "ok = 'maybe'", "born = 'soon'",
    "at = '2026-01-01T10:00:00+01:00'", "clock = '25:00'", "tag = 'x'", "ratio = 0.5",
    "image = 'x'", "doc = '{}'", "price = '1e-60'",
])  # fmt: skip
def test_a_literal_of_another_type_is_named_by_its_column_and_not_shown(shop, where):
    with pytest.raises(ConfigError, match=f"where: column {where.split()[0]} is ") as caught:
        ids(shop, where)
    assert where.split("=")[1].strip(" '") not in caught.value.public.partition("is ")[2]


def test_what_is_left_out_needs_no_counterpart_here(shop):
    session = shop.session()
    with session, session.cursor() as cursor:
        cursor.execute("CREATE TABLE few (id int PRIMARY KEY, secret text, at point, v int)")
        cursor.execute("INSERT INTO few VALUES (1, 's', POINT(1, 2), 5)")
    with pytest.raises(ConfigError, match="no counterpart"):
        shop.read("few")
    rows, batch = shop.read("few", columns={"exclude": ["secret", "at"]})
    assert (rows, [c.name for c in batch.shape.columns]) == ([(1, 5)], ["id", "v"])
    assert (batch.shape.key, batch.shape.key_is_unique) == (("id",), True)
    with pytest.raises(ConfigError, match="no column nope at the source; there are id, secret"):
        shop.read("few", columns={"include": ["id", "nope"]})
    with pytest.raises(ConfigError, match="no column nope at the source"):
        shop.read("few", columns={"include": ["id"]}, where="nope = 1")
    with pytest.raises(ConfigError, match="all of its columns are excluded"):
        shop.read("few", columns={"exclude": ["id", "secret", "at", "v"]})


def test_masks_are_put_on_the_text_that_postgres_would_write(shop):
    def token(value: bytes) -> bytes:
        return sha256(value).hexdigest()[:32].encode()

    mask = dict.fromkeys(("name", "price", "ok", "born", "tag", "big"), "hmac")
    spec = shop.spec(
        "p", mode="merge", key=("id",), deletes="hard", columns={"include": ["id", *mask]},
        mask={"id": "hmac", **mask, "name": "truncate(2)"},
    )  # fmt: skip
    with closing(shop.open()) as source, source.extract(spec, None, sweep=True) as batches:
        (batch,) = batches
        assert {c.type for c in batch.shape.columns} == {"text"}
        assert batch.shape.key_is_unique
        masked = masking.masked(batch, spec, token)
        rows = {row[0]: row for group in masked.groups for row in group.rows}
    tokens = {text: token(text.encode()).decode() for text in (
        "1", "2", "3", "1.50", "true", "2026-01-01", "00000000-0000-0000-0000-000000000001",
        "18446744073709551615",
    )}  # fmt: skip
    assert rows[tokens["1"]] == (
        tokens["1"], "An", tokens["1.50"], tokens["true"], tokens["2026-01-01"],
        tokens["00000000-0000-0000-0000-000000000001"], tokens["18446744073709551615"],
    )  # fmt: skip
    assert rows[tokens["3"]][3:6] == (None, None, None)


@pytest.mark.parametrize("column", ["ratio", "image", "at", "seen", "clock"])
def test_what_has_another_text_elsewhere_cannot_be_masked(shop, column):
    with pytest.raises(ConfigError, match=f"{column} .* cannot be masked"):
        shop.read("p", columns={"include": ["id", column]}, mask={column: "hmac"})


def test_windows_sweeps_and_backfills_keep_to_the_condition(shop):
    shop.act(
        "CREATE TABLE w (id int PRIMARY KEY, kind varchar(3), n int)",
        "INSERT INTO w VALUES (1, 'a', 1), (2, 'b', 50), (3, 'a', 3)",
    )
    spec = {"mode": "merge", "key": ("id",), "cursor": "n", "deletes": "hard"}
    where = {"where": "kind = 'a'"}
    rows, batch = shop.read("w", **spec, **where)
    assert ([row[0] for row in rows], batch.upper["value"]) == ([1, 3], "3")
    shop.act("INSERT INTO w VALUES (4, 'a', 4), (5, 'b', 5)")
    stream = shop.spec("w", **spec, **where)
    with (
        closing(shop.open()) as source,
        source.extract(stream, batch.upper, sweep=True) as batches,
    ):
        (found,) = batches
        assert [row[0] for group in found.groups for row in group.rows] == [3, 4]
        keys = [row[0] for group in found.keys.groups for row in group.rows]
    assert sorted(keys) == [1, 3, 4]
