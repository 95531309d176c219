"""Rows that wait for each other: none is left out that can be taken, whatever their order is."""

from contextlib import closing
from random import Random

import pytest

from connectors.postgres import rejects
from schemas.errors import ConfigError
from tests.connectors.test_rejects import MERGE, make, mover_of

pytestmark = pytest.mark.integration


@pytest.fixture
def ends(pair):
    with closing(mover_of(pair)) as made:
        yield made


def fill(ends, table: str, rows: list[tuple[object, ...]]) -> None:
    shown = ", ".join(
        "(" + ", ".join("NULL" if v is None else str(v) for v in row) + ")" for row in rows
    )
    make(ends, f"TRUNCATE {table}", f"INSERT INTO {table} VALUES {shown}")


def tree(chance: Random, size: int) -> dict[int, int | None]:
    """Return a parent for each row; ids tell nothing of who is above whom."""
    ids = list(range(1, size + 1))
    chance.shuffle(ids)
    return {one: ids[chance.randrange(n)] if n else None for n, one in enumerate(ids)}


def below(parents: dict[int, int | None], one: int) -> set[int]:
    found = {one}
    while more := {n for n, parent in parents.items() if parent in found} - found:
        found |= more
    return found


@pytest.mark.parametrize("deferred", ["", "DEFERRABLE INITIALLY DEFERRED"])
def test_a_bad_row_takes_none_with_it_but_those_that_refer_to_it(ends, deferred):
    """Rows refer to each other in no order: nearly every set of them refers to another one."""
    chance = Random(7)
    parents = tree(chance, 1_500)
    leaf = next(n for n in parents if n not in parents.values())
    branch = next(n for n in parents if 3 <= len(below(parents, n)) <= 9)
    gone = below(parents, branch) | {leaf}
    make(ends, "CREATE TABLE t (id int PRIMARY KEY, parent int, v int)")
    ends.sync("t", **MERGE)
    ends.run(
        "destination",
        f"ALTER TABLE acme.t ADD FOREIGN KEY (parent) REFERENCES acme.t {deferred}, "
        "ADD CHECK (v > 0)",
    )
    rows = [(n, parent, 0 if n in {leaf, branch} else 1) for n, parent in parents.items()]
    fill(ends, "t", sorted(rows))
    result = ends.sync("t", **MERGE, rejected_max=10)
    assert (result.rows_inserted, result.rows_rejected) == (1_500 - len(gone), len(gone))
    assert {int(key["id"]) for key, *_ in ends.kept()} == gone
    make(ends, "UPDATE t SET v = 1")
    assert ends.sync("t", **MERGE, rejected_max=10).rows_rejected == 0
    assert len(ends.there("t", "id")) == 1_500


def test_values_that_move_along_a_chain_are_taken_from_its_end(ends):
    """Each row gets the value of the next one, at once checked; two rows want the same one."""
    chance, size = Random(3), 200
    order = list(range(1, size + 1))
    chance.shuffle(order)
    make(ends, "CREATE TABLE u (id int PRIMARY KEY, v int, w int)")
    fill(ends, "u", [(n, place, 1) for place, n in enumerate(order)])
    ends.sync("u", **MERGE)
    ends.run("destination", "ALTER TABLE acme.u ADD UNIQUE (v), ADD CHECK (w > 0)")
    fill(
        ends,
        "u",
        [(n, place + 1, 1) for place, n in enumerate(order)]
        + [(900, size, 1), (901, None, 0), (902, size + 7, 1)],
    )
    result = ends.sync("u", **MERGE, rejected_max=10)
    assert (result.rows_updated, result.rows_inserted, result.rows_rejected) in {
        (size, 1, 2), (size - 1, 2, 2),
    }  # fmt: skip  # of the two that want one value either is taken
    (rejected,) = [key["id"] for key, state, *_ in ends.kept() if state == "23505"]
    assert int(rejected) in {900, order[-1]}


def test_what_a_trigger_looks_for_may_come_later(ends):
    make(
        ends,
        "CREATE TABLE g (id int PRIMARY KEY, parent int)",
        "INSERT INTO g SELECT n, n + 1 FROM generate_series(1, 8) AS n",
        "INSERT INTO g VALUES (9, NULL), (50, 51)",
    )
    ends.sync("g", **MERGE)
    ends.run(
        "destination",
        "TRUNCATE acme.g",
        "CREATE FUNCTION public.there() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.parent IS NOT NULL AND NOT EXISTS (SELECT FROM acme.g WHERE id = NEW.parent) "
        "THEN RAISE 'no parent'; END IF; RETURN NEW; END $$",
        "CREATE TRIGGER there BEFORE INSERT ON acme.g FOR EACH ROW EXECUTE FUNCTION public.there()",
    )
    result = ends.sync("g", **MERGE, rejected_max=10)
    assert (result.rows_inserted, result.rows_rejected) == (9, 1)
    assert [key["id"] for key, *_ in ends.kept()] == ["50"]


def test_rings_are_taken_whole_beside_one_that_cannot_be(ends):
    """Four rings of three rows; one refers to a row that a check refuses."""
    make(ends, "CREATE TABLE r (id int PRIMARY KEY, next int, v int)")
    ends.sync("r", **MERGE)
    ends.run(
        "destination",
        "ALTER TABLE acme.r ADD FOREIGN KEY (next) REFERENCES acme.r, ADD CHECK (v > 0)",
    )
    rows = [(10 * ring + n, 10 * ring + (n + 1) % 3, 1) for ring in range(1, 5) for n in range(3)]
    rows = [(n, then, 0 if n == 21 else 1) for n, then, _ in rows]
    fill(ends, "r", [*rows, (99, 12, 1), (98, 22, 1)])
    result = ends.sync("r", **MERGE, rejected_max=10)
    assert {int(key["id"]) for key, *_ in ends.kept()} == {20, 21, 22, 98}
    assert (result.rows_inserted, result.rows_rejected) == (10, 4)


def test_what_was_not_tried_in_every_order_says_so(ends, monkeypatch):
    make(
        ends,
        "CREATE TABLE s (id int PRIMARY KEY, v int)",
        "INSERT INTO s SELECT n, n FROM generate_series(1, 9) AS n",
    )
    ends.sync("s", **MERGE)
    ends.run("destination", "ALTER TABLE acme.s ADD UNIQUE (v)")
    make(ends, "INSERT INTO s VALUES (10, 4)", "UPDATE s SET v = 20 WHERE id = 5")
    monkeypatch.setattr(rejects, "_AGAIN_MAX", -1)
    assert ends.sync("s", **MERGE, rejected_max=5).rows_rejected == 1
    ((_, _, reason, *_),) = ends.kept()
    assert "not every order" in reason
    with pytest.raises(ConfigError, match="held twice"):
        ends.sync("s", **MERGE)
