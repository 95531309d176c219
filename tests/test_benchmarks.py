"""What the benchmarks conclude: a missed promise is said, and a copy that is not exact is found."""

import json
from dataclasses import replace

import psycopg
import pytest

from benchmarks import page, rest, rest_page, rest_written
from benchmarks.lab import Usage
from benchmarks.races import CASES, Found
from benchmarks.report import Case, document
from benchmarks.rivals import LOCKS, versions
from benchmarks.written import beside_truth


def test_a_ratio_above_its_promise_is_missed_and_one_at_it_is_met():
    assert Case("a", 1.15, 1.0, "s", 1.15).mark == "met"
    assert Case("a", 1.16, 1.0, "s", 1.15).mark == "MISSED"
    assert Case("a", 1.16, 1.0, "s").plain().keys() == {
        "case", "ours", "reference", "unit", "ratio",
    }  # fmt: skip


def test_the_document_holds_every_case_with_its_promise():
    made = document([Case("first_load", 2.0, 1.0, "s", CASES["first_load"])])
    (case,) = json.loads(json.dumps(made))["cases"]
    assert (case["ratio"], case["limit"], case["met"]) == (2.0, 1.15, False)


@pytest.mark.parametrize("name", ["sling", "dlt", "tls", "singer_tap", "singer_target"])
def test_every_package_beside_us_is_pinned_with_its_hash(name):
    lines = (LOCKS / f"{name}.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith(" ")]
    assert all("==" in pin and pin.endswith("\\") for pin in pins), "followed by its hashes"
    assert versions(name).keys() <= {pin.split("==")[0] for pin in pins}


def test_the_page_says_what_was_missed_and_what_was_left_out(tmp_path, monkeypatch):
    found = Found(
        servers={"postgres_tls": "17.10"},
        cases=[
            Case("first_load", 1.0, 1.0, "s per 1,000,000 rows", 1.15),
            Case("first_load_vs_sling", 1.0, 1.5, "s per 1,000,000 rows", 0.5),
            Case("first_load_tls", 1.1, 1.0, "s per 1,000,000, plain beside"),
        ],
        usages={
            "first_load": {"psql": [Usage(1.0)], "syncward": [Usage(1.0)]},
            "first_load_tls": {
                "syncward": [Usage(1.0, 0.5, server_cpu_seconds=1.5)],
                "syncward_tls": [Usage(1.1, 1.0, server_cpu_seconds=1.5)],
            },
        },
        left_out={"dlt": "dlt: dlt.lock could not be installed (no network)"},
    )
    monkeypatch.setattr(page, "DOCS", tmp_path)
    page.write({**document(found.cases), "rows": 1_000_000, "rounds": 5, "load_before": 0.1}, found)
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "| first load | sling | 1.0 s | 1.5 s | 0.67 | 0.50 | **missed** |" in text
    assert "| first load | 1.1 s | 1.0 s | +10 % | +25 % |" in text
    assert "Left out: dlt: dlt.lock could not be installed (no network)." in text
    assert (tmp_path / "benchmarks.svg").read_text(encoding="utf-8").count("<rect") == 3


# ── an API ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.full
def test_the_race_over_an_api_loads_every_record_as_it_is(tmp_path):
    found = rest.race(1_500, 1, (), tmp_path)
    (written,) = found.written
    assert (written.contestant, written.exact) == ("syncward", True)
    assert [case.case for case in found.cases()] == ["landing"]
    made = document(found.cases()) | {
        "rows": 1_500, "rounds": 1, "page_size": rest.PAGE_SIZE, "load_before": 0.1,
        "server_rows_per_second": round(found.server[0]),
        "seconds": {"syncward": [1.0]}, "cpu_seconds": {"syncward": [0.5]},
        "memory_mb": {"syncward": 90}, "left_out": {"dlt": "dlt: not to be had"},
    }  # fmt: skip
    missed = Case("vs_dlt", 1.0, 1.5, "s per 1,500 records", 0.5)
    lossy = replace(
        written,
        contestant="dlt",
        rows_missing=3,
        columns=(rest_written.Column("id", None, 1_500), *written.columns[1:]),
    )
    text = rest_page.page(made, [missed], [written, lossy])
    assert "| `vs_dlt`, s per 1,500 records | 1.00 | 1.50 | 0.67 | 0.50 | **missed** |" in text
    assert "| `id` bigint | exact | not there |" in text
    assert "Records that are missing: dlt (`rest_api`) 3." in text
    assert not lossy.exact


# ── what was written ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def db(cluster):
    """Return a session that holds the truth, in a transaction that is rolled back."""
    with psycopg.connect(
        host=cluster.host, port=cluster.port, dbname="postgres",
        user=cluster.superuser, password=cluster.password,
    ) as session:  # fmt: skip
        session.execute(
            "CREATE SCHEMA truth; CREATE TABLE truth.events "
            "(id bigint PRIMARY KEY, u uuid NOT NULL, n numeric(12,2), tags text[]); "
            "INSERT INTO truth.events SELECT g, md5(g::text)::uuid, g, '{a,b}' "
            "FROM generate_series(1, 3) g"
        )
        yield session
        session.rollback()


def columns(session, change: str):
    session.execute("CREATE TABLE truth.copy (LIKE truth.events INCLUDING ALL)")
    session.execute("INSERT INTO truth.copy SELECT * FROM truth.events")
    session.execute(change)
    written = beside_truth(session, "somebody", "truth.copy")
    return written, {column.name: column for column in written.columns}


@pytest.mark.integration
def test_a_copy_with_a_column_of_its_own_is_exact(db):
    written, _ = columns(db, "ALTER TABLE truth.copy ADD synced_at timestamptz DEFAULT now()")
    assert (written.exact, written.own_columns) == (True, ("synced_at",))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("change", "column", "expected"),
    [
        pytest.param("ALTER TABLE truth.copy ALTER u TYPE text", "u", ("text", 0, False)),
        pytest.param("ALTER TABLE truth.copy ALTER u TYPE text USING '[1 2]'", "u",
                     ("text", 3, False)),
        pytest.param("UPDATE truth.copy SET tags = NULL WHERE id = 2", "tags",
                     ("text[]", 1, False)),
        pytest.param("ALTER TABLE truth.copy ALTER n TYPE numeric USING 1.0 * trim_scale(n)", "n",
                     ("numeric", 3, False)),
        pytest.param("ALTER TABLE truth.copy ALTER u DROP NOT NULL", "u", ("uuid", 0, True)),
        pytest.param("ALTER TABLE truth.copy DROP tags", "tags", (None, 0, False)),
    ],
)  # fmt: skip
def test_a_column_that_is_not_what_it_was_is_found(db, change, column, expected):
    written, found = columns(db, change)
    one = found.pop(column)
    assert (one.type_there, one.differs, one.null_allowed) == expected
    assert not written.exact
    assert all(other.exact for other in found.values())


@pytest.mark.integration
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("DELETE FROM truth.copy WHERE id = 2", (1, 0, "id")),
        ("UPDATE truth.copy SET id = 9 WHERE id = 2", (1, 1, "id")),
        ("ALTER TABLE truth.copy DROP CONSTRAINT copy_pkey", (0, 0, None)),
    ],
)
def test_rows_and_a_key_that_are_not_there_are_found(db, change, expected):
    written, _ = columns(db, change)
    assert (written.rows_missing, written.rows_extra, written.key) == expected
    assert not written.exact
