"""`where`: a condition in a small language of our own. A document never holds SQL."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from pydantic import ValidationError

from connectors.postgres import selection
from schemas import conditions
from schemas.conditions import All, Among, Compare, IsNull, Not, parse
from schemas.records import Column
from schemas.streams import StreamSpec

BY_XMIN = "{mode: merge, key: [id], cursor: xmin"


# ── the language ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("text", "wanted"), [
    ("a = 1", Compare("a", "=", "1")),
    ("a != -1.50", Compare("a", "<>", "-1.50")),
    ("a<='it''s'", Compare("a", "<=", "it's")),
    ('"A ""b""" > true', Compare('A "b"', ">", "true")),
    ("straße = 'ü'", Compare("straße", "=", "ü")),
    ("a in ('x' , 2)", Among("a", ("x", "2"))),
    ("a NOT IN (1)", Not(Among("a", ("1",)))),
    ("a is null", IsNull("a")),
    ("a IS NOT NULL", Not(IsNull("a"))),
    ("NOT NOT a = 1", Compare("a", "=", "1")),
    ("a = 1 OR b = 2 AND c = 3", conditions.Any(
        (Compare("a", "=", "1"), All((Compare("b", "=", "2"), Compare("c", "=", "3"))))
    )),
    ("(a = 1 OR b = 2) AND c = 3", All(
        (conditions.Any((Compare("a", "=", "1"), Compare("b", "=", "2"))), Compare("c", "=", "3"))
    )),
])  # fmt: skip
def test_a_condition_is_read_as_written(text, wanted):
    assert parse(text) == wanted


@pytest.mark.parametrize("text", [
    "", " ", "a", "a =", "= 1", "a = b", "a = 1 b = 2", "a = 1;", "a = 1; DROP TABLE t",
    "a = 1 -- x", "a = 1 /* x */", "a = (SELECT 1)", "pg_sleep(10) = 1", "a = pg_sleep(10)",
    "a = 1 OR", "(a = 1", "a = 1)", "a IN ()", "a IN (1", "a = 'x", 'a = "x"', "a::text = 'x'",
    "a = $1", "a = %s", "a = E'x'", "a = $$x$$", "a LIKE 'x'", "a = 1 UNION SELECT 1", "a ~ 'x'",
    "a = 1e9", "a = NULL", "a = 1a", "t.a = 1", "a = 'x' || 'y'", "a \\ 1", "a = 'x\x00'",
    "(" * 30 + "a = 1" + ")" * 30, "a = 1 OR " * 500 + "a = 1", "NOT",
    "select = ", "a BETWEEN 1 AND 2",
])  # fmt: skip
def test_whatever_else_is_refused_when_the_document_is_read(text):
    with pytest.raises(ValidationError, match="where: "):
        StreamSpec(name="a.b", mode="replace", where=text)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_and_never_more(text):
    refused = ""
    try:
        assert list(conditions.tests(parse(text)))
    except ValueError as error:
        refused = str(error)
    assert not refused or refused.startswith("where: ")


# ── as SQL ───────────────────────────────────────────────────────────────────────────────────────

_NAMES = st.text(st.characters(exclude_characters="\x00", codec="utf-8"), min_size=1, max_size=15)
_TESTS = st.one_of(
    st.builds(Compare, _NAMES, st.sampled_from(["=", "<>", "<", "<=", ">", ">="]), _NAMES),
    st.builds(Among, _NAMES, st.lists(_NAMES, min_size=1, max_size=3).map(tuple)),
    st.builds(IsNull, _NAMES),
)


@pytest.mark.integration
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(_TESTS)
def test_no_name_and_no_literal_is_ever_more_than_that(pair, test):
    """The server reads any name and any literal as what it is."""
    session = pair.session("source")
    name = test.column
    if len(name.encode()) > 63:
        return
    table = sql.Identifier("odd")
    session.execute("DROP TABLE IF EXISTS odd")
    session.execute(sql.SQL("CREATE TABLE odd ({} text)").format(sql.Identifier(name)))
    literals = getattr(test, "literals", (getattr(test, "literal", "x"),))
    for literal in literals:
        session.execute(sql.SQL("INSERT INTO odd VALUES ({})").format(sql.Literal(literal)))
    written = selection._sql(session, test, {name: Column(name, "text")})
    found = session.execute(sql.SQL("SELECT count(*) FROM {} WHERE {}").format(table, written))
    ((count,),) = found.fetchall()
    if isinstance(test, Among):
        assert count == len(literals)
    elif isinstance(test, IsNull):
        assert count == 0
    else:
        assert count == (1 if test.operator in {"=", "<=", ">="} else 0)


# ── on real databases ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def table(world):
    world.pair.source(
        "CREATE TYPE mood AS ENUM ('sad', 'glad')",
        "CREATE TABLE t (id int PRIMARY KEY, price numeric(5,2), code varchar(3), at timestamptz, "
        'm mood, tags int[], doc json, "select" boolean)',
        "INSERT INTO t VALUES (1, 1.00, 'abc', '2026-01-01', 'sad', '{1,2}', '{}', true), "
        "(2, 2.50, 'x''y', '2026-06-01', 'glad', '{}', '{}', false), "
        "(3, NULL, NULL, NULL, NULL, NULL, NULL, NULL)",
    )
    return world


def ids(world) -> list[int]:
    return [i for (i,) in world.pair.rows("destination", "SELECT id FROM acme.t ORDER BY id")]


def spec(where: str, more: str = "") -> str:
    quoted = where.replace("'", "''")
    return f"{BY_XMIN}{more}, where: '{quoted}'" + "}"


@pytest.mark.integration
@pytest.mark.parametrize(("where", "wanted"), [
    ("id > 1", [2, 3]), ("id IN (1, 3)", [1, 3]), ("price = 1", [1]), ("price < 2.505", [1, 2]),
    ("price > 2.499", [2]), ("code = 'abcdef'", []), ("code = 'x''y'", [2]),
    ("NOT code = 'abc'", [2]),
    ("code IS NULL", [3]), ("at >= '2026-03-01'", [2]), ("m = 'glad'", [2]), ("m < 'glad'", [1]),
    ("tags = '{1,2}'", [1]), ('"select" = true', [1]),
    ("id = 1 OR (id > 1 AND price IS NULL)", [1, 3]),
    ("code = '''; DROP TABLE t; --'", []), ("code = '\\'", []), ("code NOT IN ('abc')", [2]),
])  # fmt: skip
def test_the_rows_of_a_condition_are_loaded(table, where, wanted):
    table.apply({"public.t": spec(where)})
    run, streams = table.sync()
    assert run.state == "succeeded", table.log(run.run_id)
    assert ids(table) == wanted
    assert streams["t"].rows_extracted == len(wanted)
    assert len(table.pair.rows("source", "SELECT FROM t")) == 3


@pytest.mark.integration
@pytest.mark.parametrize(("where", "column"), [
    ("id = 1 AND id = 'x'", "id is integer"), ("at > 'soon'", "at is timestamp"),
    ("m = 'angry'", "m is"), ("doc = '{}'", "doc is json"), ("id = 1.5", "id is integer"),
    ("id = 99999999999999", "id is integer"),
])  # fmt: skip
def test_a_literal_that_is_none_of_its_column_is_refused_with_both_named(table, where, column):
    table.apply({"public.t": spec(where)})
    run, streams = table.sync()
    assert run.state == "failed"
    assert f"where: column {column}" in streams["t"].error


@pytest.mark.integration
@pytest.mark.parametrize("begin", [
    "{mode: replace", "{mode: merge, key: [id], deletes: hard",
])  # fmt: skip
def test_in_full_reads_rows_that_leave_the_filter_are_gone(table, begin):
    table.apply({"public.t": begin + ", where: id < 3}"})
    table.sync()
    assert ids(table) == [1, 2]
    table.apply({"public.t": begin + ", where: id > 1}"})
    run, _ = table.sync()
    assert run.state == "succeeded", table.log(run.run_id)
    assert ids(table) == [2, 3]


@pytest.mark.integration
def test_another_condition_reads_from_the_beginning(table):
    table.apply({"public.t": spec("id = 1")})
    table.sync()
    table.apply({"public.t": spec("id <= 2")})
    run, streams = table.sync()
    assert run.state == "succeeded", table.log(run.run_id)
    assert (ids(table), streams["t"].rows_extracted) == ([1, 2], 2)


@pytest.mark.integration
def test_a_row_that_leaves_the_filter_is_found_by_the_key_sweep(table):
    table.apply({"public.t": spec("price IS NOT NULL", ", deletes: hard, key_sweep: 2")})
    table.sync()
    table.pair.source("UPDATE t SET price = NULL WHERE id = 1")
    seen = []
    for _ in range(2):
        run, _ = table.sync()
        assert run.state == "succeeded", table.log(run.run_id)
        seen.append(ids(table))
    assert [2] in seen
    assert ids(table) == [2]
