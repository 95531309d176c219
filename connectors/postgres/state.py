"""The destination's own memory: `_syncward.state`, written in the transaction of the rows.

Fence and cursor of a stream live beside its data, so that a commit moves both or neither, and a
worker that lost its run cannot commit any more.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from psycopg import sql
from psycopg.types.json import Jsonb

from connectors.postgres import generations
from connectors.postgres import purge as pg_purge
from connectors.postgres import refusals as pg_refusals
from connectors.postgres.catalog import ensure_schema
from connectors.postgres.generations import Generation
from connectors.postgres.link import Connection, PostgresConfig
from schemas.errors import ConfigError, LeaseLost, TransientError
from schemas.records import Cursor, LoadRequest, StreamResult, ahead
from schemas.streams import StreamSpec

SCHEMA = "_syncward"

#: The source's columns: the number and the type of each.
SeenColumns = dict[str, tuple[int, str]]

#: Asked of the catalog's table: the session's name cache may be older than the lock.
_HAS_TABLE = """
SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = '_syncward' AND c.relname = %s::text
"""
_CREATE = """
CREATE TABLE _syncward.state (
  connection_id uuid NOT NULL,
  stream text NOT NULL,
  fence bigint NOT NULL DEFAULT 0,
  claimed_by uuid,
  cursor jsonb,
  reads text,
  generation bigint NOT NULL DEFAULT 0,
  schema_hash text,
  run_id uuid,
  result jsonb,
  updated_at timestamptz NOT NULL DEFAULT now(),
  runs_since_full integer NOT NULL DEFAULT 0,
  runs_since_sweep integer NOT NULL DEFAULT 0,
  columns jsonb,
  target text,
  PRIMARY KEY (connection_id, stream)
)
"""
#: What tables made by an earlier version lack.
_ADD = """
ALTER TABLE _syncward.state ADD COLUMN IF NOT EXISTS runs_since_full integer NOT NULL DEFAULT 0,
  ADD COLUMN IF NOT EXISTS runs_since_sweep integer NOT NULL DEFAULT 0,
  ADD COLUMN IF NOT EXISTS columns jsonb,
  ADD COLUMN IF NOT EXISTS target text
"""
#: The row lock waits out a zombie's commit, and holds until our fence is in place.
_SEEN = """
SELECT fence, claimed_by, cursor, reads, run_id, result, generation, schema_hash,
  runs_since_full, runs_since_sweep, columns, target
FROM _syncward.state
WHERE connection_id = %(connection)s AND stream = %(stream)s FOR UPDATE
"""
_CLAIM = """
UPDATE _syncward.state SET fence = %(fence)s, claimed_by = %(run)s
WHERE connection_id = %(connection)s AND stream = %(stream)s RETURNING
"""
#: `updated_at` never goes back, nor behind the transaction's time: histories count on it.
_COMMIT = """
UPDATE _syncward.state SET cursor = %(upper)s, reads = %(reads)s, generation = generation + 1,
  target = %(target)s,
  schema_hash = %(schema_hash)s, columns = %(columns)s, run_id = %(run)s, result = %(result)s,
  runs_since_full = CASE WHEN %(full)s THEN 0 ELSE runs_since_full + (run_id IS DISTINCT FROM
    %(run)s)::int END,
  runs_since_sweep = CASE WHEN %(swept)s THEN 0 ELSE runs_since_sweep + (run_id IS DISTINCT FROM
    %(run)s)::int END,
  updated_at = greatest(clock_timestamp(), now(), updated_at + interval '1 microsecond')
WHERE connection_id = %(connection)s AND stream = %(stream)s AND fence = %(fence)s
  AND cursor IS NOT DISTINCT FROM %(expected)s
"""


#: Of a backfill: cursor, definition and counters are the syncs'.
_COMMIT_BESIDE = """
UPDATE _syncward.state SET run_id = %(run)s, result = %(result)s,
  updated_at = greatest(clock_timestamp(), now(), updated_at + interval '1 microsecond')
WHERE connection_id = %(connection)s AND stream = %(stream)s AND fence = %(fence)s
  AND cursor IS NOT DISTINCT FROM %(expected)s
"""
_REWIND = """
UPDATE _syncward.state SET cursor = %(upper)s, reads = %(reads)s, run_id = %(run)s,
  result = %(result)s,
  updated_at = greatest(clock_timestamp(), now(), updated_at + interval '1 microsecond')
WHERE connection_id = %(connection)s AND stream = %(stream)s AND fence = %(fence)s
"""


@dataclass(frozen=True, slots=True)
class StateRow:
    """What the destination remembers of a stream, under this run's fence."""

    cursor: Cursor | None  # as stored: the commit must find it unchanged
    resumable: bool  # False: the stream is defined differently now, read it from the beginning
    result: StreamResult | None  # of this very run, if it has committed this stream
    known: bool  # this connection has loaded this stream before
    fence: int  # the highest before this run's
    run_id: UUID | None  # the run that loaded it last
    schema_hash: str | None = None  # of what was loaded last
    generation: int = 0  # how many loads this stream has seen
    unfinished: Generation | None = None  # a large full read that did not come to its end
    runs_since_full: int = 0
    runs_since_sweep: int = 0
    columns: SeenColumns | None = None  # of the source, when it was loaded last
    care: pg_refusals.Care = pg_refusals.Care.NONE  # rows were refused before, and may be again
    reads: str | None = None  # the stream's definition then
    elsewhere: str | None = None  # the schema that it was loaded into, where that is another one

    def full_due(self, stream: StreamSpec) -> bool:
        """Say whether this is the N-th run since everything was read."""
        every = stream.full_every
        return self.known and every is not None and self.runs_since_full + 1 >= every

    def sweep_due(self, stream: StreamSpec) -> bool:
        """Say whether this is the N-th run since all keys were compared."""
        every = stream.key_sweep
        return self.known and every is not None and self.runs_since_sweep + 1 >= every


@dataclass(frozen=True, slots=True)
class Seen:
    """What a new session says of our own schema at the destination."""

    owned: bool | None  # by a role that we have; None: there is none
    may_create: bool
    whole: bool  # with everything that this version keeps there


#: Nothing here needs a right on the schema: whose it is, is told in our words.
LOOK = sql.SQL("""
pg_has_role(current_user, n.nspowner, 'USAGE'),
has_database_privilege(current_database(), 'CREATE'),
(SELECT count(*) FROM pg_class c WHERE c.relnamespace = n.oid AND c.relname IN
  ('state', 'ranges', 'rejected_rows', 'purged')) = 4
AND EXISTS (SELECT FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
  WHERE a.attname = 'target' AND c.relnamespace = n.oid AND c.relname = 'state')
FROM (VALUES (1)) AS one LEFT JOIN pg_namespace n ON n.nspname = '_syncward'
""")


def ensure(conn: Connection, config: PostgresConfig, seen: Seen) -> None:
    """Make the state schema where it is missing; ConfigError if it is not ours to use."""
    if seen.owned is False:
        raise ConfigError(
            f"{config.where}: schema {SCHEMA} belongs to another role than {config.user}; "
            "use one destination login per database"
        )
    if seen.whole:
        return
    if seen.owned is None and not seen.may_create:
        raise ConfigError(
            f"{config.where}: {config.user} cannot create schemas; run there: "
            f"GRANT CREATE ON DATABASE {config.database} TO {config.user}; "
            f"GRANT TEMP ON DATABASE {config.database} TO {config.user};"
        )
    ensure_schema(conn, SCHEMA)
    with conn.transaction():
        conn.execute("SELECT pg_advisory_xact_lock(hashtext('_syncward.state'))")
        if conn.execute(_HAS_TABLE, ("state",)).fetchone() is None:
            conn.execute(_CREATE)
        conn.execute(_ADD)
        if conn.execute(_HAS_TABLE, ("ranges",)).fetchone() is None:
            for statement in generations.CREATE.split(";"):
                conn.execute(statement)
        if conn.execute(_HAS_TABLE, (pg_refusals.TABLE,)).fetchone() is None:
            conn.execute(pg_refusals.CREATE)
        if conn.execute(_HAS_TABLE, ("purged",)).fetchone() is None:
            conn.execute(pg_purge.CREATE)


def claim(conn: Connection, request: LoadRequest) -> StateRow:
    """Raise the fence in a transaction of its own; GuardTripped if it is not below ours.

    A fence only grows, at both ends: a run that a person has approved comes with a higher one.
    """
    names = {"connection": request.connection_id, "stream": request.stream.name}
    with conn.transaction():
        row = conn.execute(_SEEN, names).fetchone()
        if row is None:
            conn.execute(
                "INSERT INTO _syncward.state (connection_id, stream) "
                "VALUES (%(connection)s, %(stream)s) ON CONFLICT DO NOTHING",
                names,
            )
            row = conn.execute(_SEEN, names).fetchone()
        if row is None:  # forgotten in this very moment
            raise TransientError(f"{request.stream.name}: its state was removed; try again")
        fence, claimed_by, cursor, reads, run_id, result, generation, schema_hash, *counted = row
        if fence > request.fence or (fence == request.fence and claimed_by != request.run_id):
            # A zombie's own finish is refused by its lease; the owner must not go on unseen.
            raise ahead(request.stream.name)
        raised = {**names, "fence": request.fence, "run": request.run_id}
        returned = f"{generations.UNFINISHED}, {pg_refusals.CARE}, {pg_purge.EXPIRED}"
        found = conn.execute(_CLAIM + returned, raised).fetchone()
        unfinished, care, expired = found or (None, None, None)
        if expired is not None:
            pg_purge.remove(conn, request, expired)
    return StateRow(
        cursor=cursor,
        resumable=reads == definition(request),
        result=_result(result) if run_id == request.run_id else None,
        known=generation > 0,
        fence=fence,
        run_id=run_id,
        schema_hash=schema_hash,
        generation=generation,
        unfinished=generations.parsed(unfinished),
        runs_since_full=counted[0],
        runs_since_sweep=counted[1],
        columns=counted[2],
        elsewhere=None if counted[3] == request.target_schema else counted[3],
        care=pg_refusals.Care(care or 0),
        reads=reads,
    )


def highest_fence(conn: Connection, connection_id: UUID) -> int:
    """Return the highest fence that any stream of a connection has seen here; 0 if none."""
    row = conn.execute(
        "SELECT coalesce(max(fence), 0) FROM _syncward.state WHERE connection_id = %s",
        (connection_id,),
    ).fetchone()
    return 0 if row is None else int(row[0])


def _result(stored: dict[str, Any] | None) -> StreamResult | None:
    return None if stored is None else StreamResult.model_validate(stored)


def commit(
    conn: Connection,
    request: LoadRequest,
    result: StreamResult,
    columns: SeenColumns,
    *,
    expected: Cursor | None,
    full: bool,
    swept: bool,
    more: bool = False,
) -> None:
    """Store cursor and result as the last act of the rows' transaction; LeaseLost if fenced off.

    With `more` to come there is no result yet: another attempt goes on from the cursor.
    """
    done = conn.execute(
        _COMMIT_BESIDE if request.backfill else _COMMIT,
        {
            "connection": request.connection_id,
            "stream": request.stream.name,
            "fence": request.fence,
            "run": request.run_id,
            "reads": definition(request),
            "target": request.target_schema,
            "schema_hash": result.schema_hash,
            "columns": Jsonb(columns),
            "result": None
            if more
            else Jsonb(result.model_dump(mode="json", exclude_defaults=True)),
            "upper": _jsonb(result.cursor_to),
            "expected": _jsonb(expected),
            "full": full,
            "swept": swept,
        },
    )
    if done.rowcount != 1:
        raise LeaseLost(f"{request.stream.name}: another run has taken over; nothing was written")


def rewind(
    conn: Connection, request: LoadRequest, result: StreamResult, *, reads: str | None = None
) -> None:
    """Move a stream to the cursor of `result`, as its definition `reads` of then; None: nowhere.

    The last act of its transaction; LeaseLost if fenced off.
    """
    values = {
        "connection": request.connection_id,
        "stream": request.stream.name,
        "fence": request.fence,
        "run": request.run_id,
        "reads": reads,
        "upper": _jsonb(result.cursor_to),
        "result": Jsonb(result.model_dump(mode="json", exclude_defaults=True)),
    }
    if conn.execute(_REWIND, values).rowcount != 1:
        raise LeaseLost(f"{request.stream.name}: another run has taken over; nothing was written")


def _jsonb(cursor: Cursor | None) -> Jsonb | None:
    return None if cursor is None else Jsonb(cursor)


def definition(request: LoadRequest) -> str:
    """Return a digest of what decides which rows belong into the target, and where that is."""
    stream = request.stream
    parts = [stream.mode, *stream.key, stream.cursor or "", request.target_schema]
    if stream.tombstone is not None:  # it decides about rows that are there already
        parts += [stream.tombstone, stream.deletion]
    parts += request.selection
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def last_shape(conn: Connection, request: LoadRequest) -> str | None:
    """Return the digest of the source's shape that was loaded last; None if none was."""
    row = conn.execute(
        "SELECT schema_hash FROM _syncward.state WHERE connection_id = %s AND stream = %s",
        (request.connection_id, request.stream.name),
    ).fetchone()
    return None if row is None else row[0]


def forget(conn: Connection, connection_id: UUID, stream: str) -> None:
    """Drop what is remembered of a stream: it will be read from the beginning."""
    conn.execute(
        "DELETE FROM _syncward.state WHERE connection_id = %s AND stream = %s",
        (connection_id, stream),
    )
