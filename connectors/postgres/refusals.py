"""Rows that a destination's server refused: why, which ones, and where that is kept.

`_syncward.rejected_rows` holds the key of each and the reason, written in the transaction of the
rows that were taken. How refused rows are found is in rejects.py.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from hashlib import sha256

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from connectors.postgres.link import Connection, beside_values, named
from schemas.errors import ConfigError, SyncwardError
from schemas.guards import SAMPLE_CHARS
from schemas.records import SAMPLE_REJECTED, Column, LoadRequest, RejectedRow
from schemas.streams import REJECTED_MOST

TABLE = "rejected_rows"
CREATE = """
CREATE TABLE _syncward.rejected_rows (
  connection_id uuid NOT NULL,
  stream text NOT NULL,
  digest bytea NOT NULL,
  key jsonb,
  readable boolean NOT NULL,
  sqlstate text NOT NULL,
  reason text NOT NULL,
  constraint_name text,
  column_name text,
  found_by integer NOT NULL,
  rows bigint NOT NULL,
  loads bigint NOT NULL DEFAULT 1,
  run_id uuid,
  generation bigint,
  first_seen timestamptz NOT NULL DEFAULT now(),
  last_seen timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (connection_id, stream, digest),
  FOREIGN KEY (connection_id, stream) REFERENCES _syncward.state ON DELETE CASCADE
)
"""
#: An expression for the statement that takes a stream's state: how carefully its rows must be
#: looked at because some were refused before; NULL if none were.
CARE = """
(SELECT max(r.found_by) FROM _syncward.rejected_rows r
  WHERE r.connection_id = %(connection)s AND r.stream = %(stream)s)
"""
_KEEP = """
INSERT INTO _syncward.rejected_rows AS r (connection_id, stream, digest, key, readable, sqlstate,
  reason, constraint_name, column_name, found_by, rows, run_id, generation)
SELECT %(connection)s, %(stream)s, n.* , %(run)s, %(generation)s
FROM unnest(%(digest)s::bytea[], %(key)s::jsonb[], %(readable)s::boolean[], %(sqlstate)s::text[],
  %(reason)s::text[], %(constraint)s::text[], %(column)s::text[], %(found_by)s::integer[],
  %(rows)s::bigint[]) AS n
"""
#: A row that is refused once more keeps the time when it was first seen.
AGAIN = """
ON CONFLICT (connection_id, stream, digest) DO UPDATE SET (key, readable, sqlstate, reason,
    constraint_name, column_name, found_by, rows, loads, run_id, generation, last_seen)
  = (excluded.key, excluded.readable, excluded.sqlstate, excluded.reason,
    excluded.constraint_name, excluded.column_name, excluded.found_by, excluded.rows,
    r.loads + 1, excluded.run_id, excluded.generation, now())
"""
#: Rows that repeat a key go from where they are into the table; `doomed` says which, of `d`. There
#: is no limit to how many they are, but one to how many keys are kept: the first by their digest.
KEEP_REPEATED = """
WITH gone AS (
  DELETE FROM {table} d WHERE {doomed} RETURNING {digest} AS digest, {key} AS key),
kept AS (
  INSERT INTO _syncward.rejected_rows AS r (connection_id, stream, digest, key, readable,
    sqlstate, reason, found_by, rows, run_id)
  SELECT %(connection)s, %(stream)s, digest, min(key::text)::jsonb, true, '23505', %(reason)s,
    %(found_by)s, count(*), %(run)s
  FROM gone GROUP BY digest ORDER BY digest LIMIT %(most)s {again})
SELECT count(*) FROM gone
"""
_REPEATS = "another row of the batch has the same key"
_SAMPLE = """
SELECT coalesce(left(key::text, %(chars)s), ''), reason FROM _syncward.rejected_rows
WHERE connection_id = %(connection)s AND stream = %(stream)s AND run_id = %(run)s
ORDER BY key, digest LIMIT %(most)s
"""


class RowsRefused(ConfigError):  # noqa: N818 - an event more than an error
    """Rows of a batch are refused before the server is asked; without them it can be loaded."""


class Care(IntEnum):
    """How carefully the rows of a stream are looked at; each costs more than the one before."""

    NONE = 0  # as one set: whatever is refused ends the load
    SETS = 1  # staged, then halved until the rows that the table refuses are alone
    ROWS = 2  # also on the way into staging: a row that its types refuse is left out


# ── why ──────────────────────────────────────────────────────────────────────────────────────

#: Reasons in our words, by SQLSTATE and by its class.
_WORDS = {
    "22": "a value does not fit its column",
    "23502": "a column may not be NULL",
    "23503": "the row that it refers to is not there",
    "23505": "a key would be held twice",
    "23514": "a check refuses it",
    "23P01": "an exclusion constraint refuses it",
    "23": "a constraint refuses it",
    "44": "a view's check refuses it",
    "42501": "a policy of the table refuses it",
    "54000": "it is too long for an index",
}
#: Behind the reason of a row that may be taken in another order of the load's rows.
UNSETTLED = "; it may wait for other rows of the load, and not every order of them was tried"
_BY_ROUTINE = "a trigger or function refuses it"
#: Classes of which time or an administrator is the cure, whoever raised them.
_NEVER = ("08", "40", "53", "55", "57", "58", "72", "XX")
_FORMAT = "22P04"
_LINE = re.compile(r"syncward_\w+\D+(\d+)")


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a row was refused: names of the table's own, never a value."""

    sqlstate: str
    words: str
    constraint: str | None = None
    column: str | None = None

    def __str__(self) -> str:
        names = [f"column {self.column}"] if self.column else []
        names += [f"constraint {self.constraint}"] if self.constraint else []
        return f"{self.words} ({', '.join([*names, f'SQLSTATE {self.sqlstate}'])})"


def is_of_a_row(error: BaseException | None) -> bool:
    """Say whether a row is to blame: then others may be taken without it."""
    if not isinstance(error, psycopg.Error):
        return False
    state = error.sqlstate
    if state is None:  # the driver could not write a value
        return isinstance(error, psycopg.DataError)
    if state.startswith(_NEVER) or state == _FORMAT:
        return False
    if error.diag.source_function in {"exec_stmt_raise", "ExecWithCheckOptions"}:
        return True
    return (state in _WORDS and state != "42501") or state[:2] in _WORDS


@contextmanager
def unless_refused(conn: Connection) -> Iterator[None]:
    """Do something under a savepoint; where a row is to blame, it was not done."""
    try:
        with conn.transaction():
            yield
    except psycopg.Error as error:
        if not is_of_a_row(error):
            raise


def depends(error: psycopg.Error) -> bool:
    """Say whether the row may be taken once another one is there, or is another one."""
    return error.sqlstate in {"23503", "23505", "23P01"}


def may_wait(error: psycopg.Error) -> bool:
    """Say whether the row may be taken later: what a trigger looks at may be there then, too."""
    by_code = error.diag.source_function in {"exec_stmt_raise", "ExecWithCheckOptions"}
    return by_code or depends(error)


def reason_of(error: psycopg.Error, columns: Iterable[str]) -> Reason:
    """Say in our words why a row was refused; `columns` are those that COPY may name."""
    state = error.sqlstate or "22000"
    if error.diag.source_function == "exec_stmt_raise":
        return Reason(state, _BY_ROUTINE)
    words = _WORDS.get(state) or _WORDS.get(state[:2]) or _BY_ROUTINE
    found = named(error)
    constraint, column = (found.constraint_name, found.column_name) if found else (None, None)
    return Reason(state, words, constraint, column or _copied_column(error, columns))


def refused_line(error: psycopg.Error) -> int | None:
    """Return which row of a COPY the server refused, from 0; None if it did not say so."""
    for line in (error.diag.context or "").splitlines():
        found = _LINE.search(line)
        if found and line.startswith("COPY "):
            return int(found[1]) - 1
    return None


def next_care(error: psycopg.Error, care: Care) -> Care:
    """Return how carefully to look for the row that was refused.

    What a type refuses is refused by a staging table, too; a constraint is not.
    """
    copied = any(line.startswith("COPY ") for line in (error.diag.context or "").splitlines())
    state, file = error.sqlstate, (error.diag.source_file or "").rsplit("/", 1)[-1]
    if state is None or (copied and (care or state.startswith("22") or file == "domains.c")):
        return Care.ROWS
    return Care.SETS


def _copied_column(error: psycopg.Error, columns: Iterable[str]) -> str | None:
    """Return the column in which a COPY failed, if it is one that we know."""
    for line in (error.diag.context or "").splitlines():
        found = _LINE.search(line)
        if found and line.startswith("COPY "):
            rest = line[found.end() :].split(": ", 1)[0]
            known = [name for name in columns if rest.endswith(f" {name}")]
            return max(known, key=len, default=None)
    return None


# ── which ────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Refused:
    """A row that was refused: its key as text by column, None if it has none."""

    digest: bytes
    key: dict[str, str | None] | None
    reason: Reason
    found_by: Care
    readable: bool = True  # False: the key itself could not be read, and is shown as it came
    rows: int = 1


@dataclass(slots=True)
class Refusals:
    """The rows of one load that were refused so far, and how many may be.

    Rows that repeat a key are none of them: a guard decides about those.
    """

    request: LoadRequest
    care: Care
    #: the large read that this is a part of, and how many rows were refused in its other ranges
    generation: int | None = None
    before: int = 0
    found: dict[bytes, Refused] = field(default_factory=dict)
    met: bool = False  # one was refused in this very run
    left_out: int = 0  # of these, those that are not staged
    rows: int | None = None  # read, where that is known

    noted: int = 0

    @property
    def count(self) -> int:
        """How many rows were refused."""
        return self.before + self.noted

    @property
    def room(self) -> int:
        """How many more may be."""
        return self.request.stream.rejects_allowed(self.rows) - self.count

    def add(self, refused: Sequence[Refused], error: psycopg.Error | None) -> None:
        """Note rows; SyncwardError if that is more than the stream allows.

        Where none is allowed, what the server said is the error.
        """
        for one in refused:
            self.noted += one.rows
            same = self.found.setdefault(one.digest, one)
            if same is not one:
                same.rows += one.rows
        self.check(error)

    def check(self, error: psycopg.Error | None = None) -> None:
        """SyncwardError if more rows were refused than the stream allows."""
        if self.room < 0:
            self.too_many([one.reason for one in self.found.values()], error)

    def too_many(self, reasons: Sequence[Reason], error: psycopg.Error | None) -> None:
        """Fail the stream."""
        stream = self.request.stream
        if error is not None and stream.rejected_max == 0:
            raise error
        raise over(stream.name, stream.rejected_max, reasons)


def over(stream: str, allowed: object, reasons: Sequence[Reason]) -> SyncwardError:
    """Make the error of a stream of which too many rows were refused."""
    words = sorted({str(reason) for reason in reasons})
    more = f" and {len(words) - 3} other reasons" if len(words) > 3 else ""  # noqa: PLR2004
    return ConfigError(
        f"{stream}: more rows were refused than rejected_max allows ({allowed}): "
        f"{'; '.join(words[:3])}{more}. Nothing was kept: correct the rows at the source, change "
        "the table here, or allow more",
        code="rows_rejected",
    )


# ── where it is kept ─────────────────────────────────────────────────────────────────────────


def keep(conn: Connection, refusals: Refusals, *, of_range: bool = False) -> None:
    """Write down the rows of this load; of a range they count once the read has come to its end."""
    rows = list(refusals.found.values())
    if not rows:
        return
    conn.execute(
        _KEEP + AGAIN,
        {
            **_of(refusals.request),
            "run": refusals.request.run_id,
            "generation": refusals.generation if of_range else None,
            "digest": [one.digest for one in rows],
            "key": [None if one.key is None else Jsonb(one.key) for one in rows],
            "readable": [one.readable for one in rows],
            "sqlstate": [one.reason.sqlstate for one in rows],
            "reason": [one.reason.words for one in rows],
            "constraint": [one.reason.constraint for one in rows],
            "column": [one.reason.column for one in rows],
            "found_by": [int(one.found_by) for one in rows],
            "rows": [one.rows for one in rows],
        },
    )


def repeated(request: LoadRequest) -> dict[str, object]:
    """Return the values that `KEEP_REPEATED` wants."""
    found_by = int(Care.SETS)
    return {
        **_of(request),
        "run": request.run_id,
        "reason": _REPEATS,
        "found_by": found_by,
        "most": REJECTED_MOST,
    }


def of_ranges(conn: Connection, refusals: Refusals, generation: int) -> Refusals:
    """Add what was refused in the ranges that are kept of a large read, of which this is a part."""
    row = conn.execute(
        "SELECT coalesce(sum(rows), 0) FROM _syncward.rejected_rows WHERE generation = "
        "%(generation)s AND connection_id = %(connection)s AND stream = %(stream)s",
        {**_of(refusals.request), "generation": generation},
    ).fetchone()
    return replace(refusals, generation=generation, before=int(row[0]) if row else 0)


def forget_ranges(conn: Connection, request: LoadRequest) -> None:
    """Let rows of a large read that nobody goes on with be as any other that was refused."""
    conn.execute(
        "UPDATE _syncward.rejected_rows SET generation = NULL WHERE generation IS NOT NULL "
        "AND connection_id = %(connection)s AND stream = %(stream)s",
        _of(request),
    )


def fill(
    conn: Connection, refusals: Refusals, table: sql.Composable, key: Sequence[Column]
) -> None:
    """Bring the keys of rows that were refused in ranges into a table of keys."""
    typed = sql.SQL(", ").join(
        sql.SQL("(r.key ->> {})::{}").format(
            sql.Literal(c.name), sql.SQL("text" if c.as_text else c.type)
        )
        for c in key
    )
    conn.execute(
        sql.SQL(
            "INSERT INTO {} ({}) SELECT {} FROM _syncward.rejected_rows r WHERE readable "
            "AND generation = %(generation)s AND connection_id = %(connection)s "
            "AND stream = %(stream)s"
        ).format(
            table,
            beside_values(conn, sql.SQL(", ").join(sql.Identifier(c.name) for c in key)),
            beside_values(conn, typed),
        ),
        {**_of(refusals.request), "generation": refusals.generation},
    )


def mark(conn: Connection, refusals: Refusals, which: sql.Composable) -> None:
    """Mark rows `r` that were refused before and came again, or are gone.

    What is refused once more is written down once more; `forget_marked` ends the rest.
    """
    conn.execute(
        sql.SQL(
            "UPDATE _syncward.rejected_rows r SET run_id = NULL WHERE {} "
            "AND generation IS DISTINCT FROM %(generation)s "
            "AND connection_id = %(connection)s AND stream = %(stream)s"
        ).format(beside_values(conn, which)),
        {**_of(refusals.request), "generation": refusals.generation or 0},
    )


#: What the table refused before and comes again, from the statement of a load.
MARKED = sql.SQL(
    "SELECT {} FROM _syncward.rejected_rows r WHERE connection_id = %(connection)s "
    "AND stream = %(stream)s AND run_id IS NULL AND readable AND found_by = %(found_by)s"
)


def marked(request: LoadRequest) -> dict[str, object]:
    """Return the values that `MARKED` wants."""
    return {**_of(request), "found_by": int(Care.SETS)}


def forget_marked(conn: Connection, refusals: Refusals) -> None:
    """Forget the marked rows that were not refused again: they are loaded or gone."""
    conn.execute(
        "DELETE FROM _syncward.rejected_rows WHERE connection_id = %(connection)s "
        "AND stream = %(stream)s AND run_id IS NULL",
        _of(refusals.request),
    )
    if refusals.before:
        conn.execute(
            "UPDATE _syncward.rejected_rows SET generation = NULL, run_id = %(run)s "
            "WHERE generation = %(generation)s AND connection_id = %(connection)s "
            "AND stream = %(stream)s",
            {
                **_of(refusals.request),
                "generation": refusals.generation,
                "run": refusals.request.run_id,
            },
        )


def digest_of(key: dict[str, str | None]) -> bytes:
    """Return by what a row is known again whose key could not be read."""
    return sha256(json.dumps(key, sort_keys=True).encode()).digest()


def sample(conn: Connection, request: LoadRequest) -> tuple[RejectedRow, ...]:
    """Return a few of the rows that this run wrote down."""
    named = {**_of(request), "run": request.run_id, "most": SAMPLE_REJECTED, "chars": SAMPLE_CHARS}
    rows = conn.execute(_SAMPLE, named)
    return tuple(RejectedRow(key=key, reason=reason) for key, reason in rows)


def _of(request: LoadRequest) -> dict[str, object]:
    return {"connection": request.connection_id, "stream": request.stream.name}
