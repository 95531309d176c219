"""A large full read on its way in: its ranges go into a hidden table beside the target.

Each range is one transaction, and none is visible to readers. `_syncward.generations` and
`_syncward.ranges` say what is there, so that the next attempt asks for the ranges that are left.
The end of the read makes the hidden table the target's content (load.py), with cursor and result.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from psycopg import sql
from psycopg.types.json import Jsonb

from connectors.postgres.batch import Hidden
from connectors.postgres.link import Connection
from schemas.errors import LeaseLost, SyncwardError
from schemas.records import Cursor, Kept, LoadRequest, Part

#: Seconds for which another run may go on with what one began: its rows are as old as that.
_TAKEN_OVER_FOR = 86_400.0
#: Makes a definition that no other attempt's is equal to: none goes on with such a read.
_OF_ONE_SNAPSHOT = "of one snapshot"

#: Statements that make the two tables, for a schema that has none of them.
CREATE = """
CREATE TABLE IF NOT EXISTS _syncward.generations (
  connection_id uuid NOT NULL,
  stream text NOT NULL,
  generation bigint NOT NULL,
  run_id uuid NOT NULL,
  reads text NOT NULL,
  shape text NOT NULL,
  upper jsonb,
  target_schema text NOT NULL,
  hidden text NOT NULL,
  begun_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (connection_id, stream),
  FOREIGN KEY (connection_id, stream) REFERENCES _syncward.state ON DELETE CASCADE
);
CREATE TABLE IF NOT EXISTS _syncward.ranges (
  connection_id uuid NOT NULL,
  stream text NOT NULL,
  generation bigint NOT NULL,
  n integer NOT NULL,
  lower jsonb,
  upper jsonb,
  done boolean NOT NULL DEFAULT false,
  rows bigint NOT NULL DEFAULT 0,
  bytes bigint NOT NULL DEFAULT 0,
  seconds double precision NOT NULL DEFAULT 0,
  PRIMARY KEY (connection_id, stream, n),
  FOREIGN KEY (connection_id, stream) REFERENCES _syncward.generations ON DELETE CASCADE
)
"""
#: An expression of one JSON object, for a statement that takes a stream's state; NULL if there is
#: no such read. Only in a statement that begins after the row is locked: before, a zombie's range
#: that was just committed would not be seen.
UNFINISHED = """
(SELECT jsonb_build_object('number', g.generation, 'run_id', g.run_id, 'reads', g.reads,
    'shape', g.shape, 'upper', g.upper, 'schema', g.target_schema, 'hidden', g.hidden,
    'age', extract(epoch FROM clock_timestamp() - g.begun_at), 'ranges', (
      SELECT jsonb_agg(jsonb_build_array(r.lower, r.done, r.rows) ORDER BY r.n)
      FROM _syncward.ranges r WHERE r.connection_id = g.connection_id AND r.stream = g.stream))
  FROM _syncward.generations g
  WHERE g.connection_id = %(connection)s AND g.stream = %(stream)s)
"""
_FENCED = """
SELECT FROM _syncward.state WHERE connection_id = %(connection)s AND stream = %(stream)s
  AND fence = %(fence)s FOR SHARE
"""
_FORGET = """
DELETE FROM _syncward.generations WHERE connection_id = %(connection)s AND stream = %(stream)s
"""
_BEGIN = """
INSERT INTO _syncward.generations
  (connection_id, stream, generation, run_id, reads, shape, upper, target_schema, hidden)
VALUES (%(connection)s, %(stream)s, %(number)s, %(run)s, %(reads)s, %(shape)s, %(upper)s,
  %(schema)s, %(hidden)s)
"""
_BEGIN_RANGES = """
INSERT INTO _syncward.ranges (connection_id, stream, generation, n, lower, upper)
SELECT %(connection)s, %(stream)s, %(number)s, n, %(bounds)s::jsonb -> (n - 1),
  %(bounds)s::jsonb -> n
FROM generate_series(1, %(last)s) AS n
UNION ALL
SELECT %(connection)s, %(stream)s, %(number)s, 0, NULL, %(bounds)s::jsonb -> 0
"""
_DONE = """
UPDATE _syncward.ranges SET done = true, rows = %(rows)s, bytes = %(bytes)s, seconds = %(seconds)s
WHERE connection_id = %(connection)s AND stream = %(stream)s AND generation = %(number)s
  AND n = %(n)s AND NOT done
"""
_SUMS = """
SELECT bool_and(done), sum(rows)::bigint, sum(bytes)::bigint, sum(seconds) FROM _syncward.ranges
WHERE connection_id = %(connection)s AND stream = %(stream)s AND generation = %(number)s
"""


@dataclass(frozen=True, slots=True)
class Generation:
    """A large full read that has not come to its end, as the destination remembers it."""

    number: int
    reads: str
    schema: str
    hidden: str
    age: float
    kept: Kept

    @property
    def table(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.hidden)

    def goes_on(self, request: LoadRequest, *, loaded: int) -> bool:
        """Say whether this run may go on with it; `loaded` is the number of generations before.

        Another run takes over what is not yet complete: what was, and was not made visible, has
        met a guard or a refusal, and is read again once somebody has seen to that.
        """
        own = self.kept.run_id == request.run_id
        young = self.age < _TAKEN_OVER_FOR and not self.kept.complete
        return self.number == loaded + 1 and self.reads == definition(request) and (own or young)


def parsed(found: Mapping[str, Any] | None) -> Generation | None:
    """Read the object of `UNFINISHED`."""
    if found is None:
        return None
    ranges = found["ranges"] or []
    return Generation(
        number=found["number"],
        reads=found["reads"],
        schema=found["schema"],
        hidden=found["hidden"],
        age=float(found["age"]),
        kept=Kept(
            run_id=UUID(found["run_id"]),
            shape=found["shape"],
            upper=found["upper"],
            bounds=tuple(tuple(lower) for lower, _, _ in ranges[1:]),
            done=frozenset(n for n, (_, done, _) in enumerate(ranges) if done),
            rows=sum(rows for _, _, rows in ranges),
        ),
    )


def definition(request: LoadRequest) -> str:
    """Return a digest of what decides which rows are read and how they are written.

    Guards and how often something is done decide about neither. A backfill is of one run: what it
    keeps is no part of a full read, and its rows are as they were when somebody asked.
    """
    ways = {"guards", "full_every", "key_sweep", "range_rows", "ranges_at_once", "rejected_max"}
    stream = request.stream.model_dump(mode="json", exclude=ways)
    parts = [stream, request.target_schema, request.rewrite]
    parts += [f"backfill {request.run_id}"] if request.backfill else []
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def begun(
    request: LoadRequest, number: int, shape: str, upper: Cursor | None, part: Part
) -> Generation:
    """Describe a new generation. One stream has one hidden table, whatever becomes of it."""
    reads = definition(request)
    named = hashlib.sha256(f"{request.connection_id} {request.stream.name}".encode()).hexdigest()
    return Generation(
        number=number,
        reads=reads if part.lasting else f"{reads} {_OF_ONE_SNAPSHOT}",
        schema=request.target_schema,
        hidden=f"_syncward_{named[:24]}",
        age=0.0,
        kept=Kept(request.run_id, shape, upper, part.bounds, frozenset(), 0),
    )


def begin(
    conn: Connection, request: LoadRequest, new: Generation, before: Generation | None
) -> None:
    """Remember a new generation, under this run's fence; its hidden table is the caller's to make.

    Whatever was there of an earlier one is dropped, also where its state was forgotten.
    """
    values = _names(request, new) | {
        "run": request.run_id,
        "reads": new.reads,
        "shape": new.kept.shape,
        "upper": None if new.kept.upper is None else Jsonb(new.kept.upper),
        "schema": new.schema,
        "hidden": new.hidden,
        "bounds": Jsonb(new.kept.bounds),
        "last": len(new.kept.bounds),
    }
    fenced(conn, request)
    for one in (before or new, new):
        drop(conn, request, one)
    conn.execute(_BEGIN, values)
    conn.execute(_BEGIN_RANGES, values)


def fenced(conn: Connection, request: LoadRequest) -> None:
    """Hold this run's fence until the end of the transaction; LeaseLost if another one is there."""
    if conn.execute(_FENCED, _names(request)).fetchone() is None:
        raise _taken_over(request)


def done(
    conn: Connection, request: LoadRequest, of: Generation, part: Part, counts: Mapping[str, float]
) -> None:
    """Note that a range is there, as the last act of its rows' transaction."""
    fenced(conn, request)
    noted = conn.execute(_DONE, _names(request, of) | {"n": part.n, **counts})
    if noted.rowcount != 1:
        raise _taken_over(request)


def complete(conn: Connection, request: LoadRequest, of: Generation) -> tuple[Hidden, float]:
    """Return the hidden table with all its rows, and the seconds they took.

    What the ranges say and what the table holds must agree, whoever was there in between.
    """
    row = conn.execute(_SUMS, _names(request, of)).fetchone()
    whole, rows, size, seconds = row or (None, 0, 0, 0.0)
    counted = conn.execute(sql.SQL("SELECT count(*) FROM {}").format(of.table)).fetchone()
    if not whole or counted is None or counted[0] != rows:
        raise SyncwardError(
            f"{request.stream.name}: {rows} rows were kept of the ranges of this read and "
            f"{counted[0] if counted else 'no'} are there; nothing was kept",
            code="rows_missing",
        )
    return Hidden(of.table, rows, size), float(seconds)


def drop(conn: Connection, request: LoadRequest, of: Generation) -> None:
    """Forget a generation and its hidden table: another one took its place, or nobody wants it."""
    conn.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(of.table))
    conn.execute(_FORGET, _names(request))


def _names(request: LoadRequest, of: Generation | None = None) -> dict[str, Any]:
    named: dict[str, Any] = {
        "connection": request.connection_id,
        "stream": request.stream.name,
        "fence": request.fence,
    }
    return named if of is None else named | {"number": of.number}


def _taken_over(request: LoadRequest) -> LeaseLost:
    return LeaseLost(f"{request.stream.name}: another run has taken over; nothing was written")
