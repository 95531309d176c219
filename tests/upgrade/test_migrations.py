"""Migrations after the first only expand (docs/decisions/0008): the version before goes on."""

import re

import pytest

from storage import migrate, revision

#: What takes something away from the version before, or holds its tables for as long as they are.
FORBIDDEN = {
    "drops": r"\bDROP\s+(COLUMN|TABLE|TYPE|VIEW|FUNCTION|SCHEMA|ROLE|SEQUENCE|DOMAIN)\b",
    "renames": r"\bRENAME\b",
    "changes a type": r"\bALTER\s+(COLUMN\s+)?\S+\s+(SET\s+DATA\s+)?TYPE\b",
    "forbids NULL": r"\bSET\s+NOT\s+NULL\b",
    "removes a default": r"\bDROP\s+DEFAULT\b",
    "adds a column that old INSERTs do not fill": (
        r"\bADD\s+COLUMN\b(?:(?!DEFAULT|;|\bADD\b).)*\bNOT\s+NULL\b(?:(?!DEFAULT|;|\bADD\b).)*(;|,)"
    ),
    "takes a right": r"\bREVOKE\b[^;]*\bFROM\s+syncward_",
    "empties": r"\bTRUNCATE\s+(TABLE\s+)?\w",
    "sets its own lock_timeout": r"\block_timeout\b",
}
CONTRACT = re.compile(r"^-- contract: unused since version \S+$", re.MULTILINE)
MIGRATIONS = sorted(revision.VERSIONS.glob("*.sql"))


def breaks(script: str) -> list[str]:
    """Name what a script takes from the version before; a contract step says so and may."""
    if CONTRACT.search(script):
        return []
    plain = re.sub(r"\$\$.*?\$\$", "''", script, flags=re.DOTALL)  # bodies run later
    plain = re.sub(r"--[^\n]*", "", plain)
    return [
        name
        for name, pattern in FORBIDDEN.items()
        if re.search(pattern, plain, re.IGNORECASE | re.DOTALL)
    ]


@pytest.mark.parametrize("path", MIGRATIONS[1:], ids=lambda path: path.name)
def test_a_migration_after_the_first_only_adds(path):
    assert breaks(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("statement", "finding"), [
    ("ALTER TABLE runs DROP COLUMN error;", "drops"),
    ("DROP TABLE workers;", "drops"),
    ("ALTER TABLE runs RENAME COLUMN error TO reason;", "renames"),
    ("ALTER TABLE runs ALTER COLUMN attempt TYPE bigint;", "changes a type"),
    ("ALTER TABLE runs ALTER attempt SET DATA TYPE bigint;", "changes a type"),
    ("ALTER TABLE runs ALTER COLUMN error SET NOT NULL;", "forbids NULL"),
    ("ALTER TABLE runs ALTER COLUMN error DROP DEFAULT;", "removes a default"),
    ("ALTER TABLE runs ADD COLUMN x int NOT NULL;", "adds a column that old INSERTs do not fill"),
    ("REVOKE SELECT ON runs FROM syncward_worker;", "takes a right"),
    ("TRUNCATE runs;", "empties"),
    ("SET LOCAL lock_timeout = 0;", "sets its own lock_timeout"),
])  # fmt: skip
def test_the_lint_finds_what_would_break_the_version_before(statement, finding):
    assert breaks(statement) == [finding]
    assert breaks(f"-- contract: unused since version 1.2.0\n{statement}") == []


@pytest.mark.parametrize("statement", [
    "ALTER TABLE runs ADD COLUMN x int NOT NULL DEFAULT 0;",
    "ALTER TABLE runs ADD COLUMN x int DEFAULT 0 NOT NULL;",
    "ALTER TABLE runs ADD COLUMN x text;",
    "CREATE TABLE x (a int NOT NULL);",
    "CREATE FUNCTION f() RETURNS void LANGUAGE sql AS $$ DROP TABLE x $$;",
])  # fmt: skip
def test_the_lint_lets_pass_what_only_adds(statement):
    assert breaks(statement) == []


def test_every_migration_is_one_script_and_the_numbers_have_no_gap():
    numbers = [path.name[:4] for path in MIGRATIONS]
    assert numbers == [f"{n:04d}" for n in range(1, len(numbers) + 1)]
    assert sorted(p.name[:4] for p in revision.VERSIONS.glob("0*.py")) == numbers
    assert revision.wanted() == migrate.head()


@pytest.mark.parametrize(("there", "older"), [
    (None, True), ("", True), ("0001", True), (revision.wanted(), False), ("9999", False),
    ("1234abcd", True),
])  # fmt: skip
def test_a_newer_schema_is_accepted_and_an_older_one_is_not(there, older):
    assert revision.is_older(there, revision.wanted()) is older
