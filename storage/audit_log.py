"""Read the sealed log in the order of its indexes, for those who verify, prove and export it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import Connection, Engine, text

from storage.engine import transaction

#: (index, seq, xid, at, account_id, class, action, target_kind, target_id, login, client, body,
#: leaf); where an event is missing, all after `seq` is None. Times are text, as they are hashed.
LogRow = tuple[Any, ...]

_TIME = '\'YYYY-MM-DD"T"HH24:MI:SS.US"Z"\''


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """One read-only transaction that sees the log as it is now, however long it reads."""
    with transaction(engine) as tx:
        driver = _driver(tx)
        role = sql.Identifier(str(tx.execute(text("SELECT current_user")).scalar_one()))
        # in place of the transaction that is open: a snapshot is chosen before the first query
        driver.execute(
            sql.SQL(
                "COMMIT; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL ROLE {}; "
                "SET LOCAL search_path = public; SET LOCAL TimeZone = 'UTC'; "
                "SET LOCAL statement_timeout = '10min'; "
                "SET LOCAL idle_in_transaction_session_timeout = '10min'; "
                # a batch is joined by its times: a loop would look at all of them for each event
                "SET LOCAL enable_nestloop = off; SET LOCAL jit = off; "
                "SET LOCAL cursor_tuple_fraction = 1"
            ).format(role)
        )
        yield tx


def _driver(tx: Connection) -> psycopg.Connection[LogRow]:
    driver = tx.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)  # noqa: S101 - the only driver we open
    return driver


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A checkpoint as the database has it, without the list of its events."""

    size: int
    count: int
    epoch: int
    root: bytes
    time: str
    signatures: str
    last_xid: int
    last_seq: int
    earliest: str
    latest: str


#: What a row may hold is what its owner put there: nothing is read beyond what we would write.
_LONGEST = 65536  # bytes of a body (audit.event has a CHECK), characters of its other fields
_SIGNATURES = 16384
_REASON = 65536


def _number(column: str) -> str:
    """Return a transaction's number as bigint, the largest one for those that do not fit."""
    return (
        f"CASE WHEN {column} < '9223372036854775807'::xid8 THEN {column}::text::bigint "
        f"WHEN {column} IS NOT NULL THEN 9223372036854775807 END"
    )


_BATCHES = (
    "SELECT size, cardinality(seqs)::bigint, epoch, substr(root, 1, 33), "  # noqa: S608 - a constant
    f"coalesce(to_char(signed_at AT TIME ZONE 'UTC', {_TIME}), ''), "
    f"left(signatures, {_SIGNATURES}), "
    f"{_number('last_xid')}, last_seq, earliest::text, latest::text "
    "FROM audit.checkpoint WHERE size > %s ORDER BY size LIMIT %s"
)


def batches(tx: Connection, *, after: int, most: int) -> list[BatchRow]:
    """Return checkpoints of more than `after` events, the smallest first."""
    with _driver(tx).cursor(binary=True) as cursor:
        rows = cursor.execute(_BATCHES, (after, most), binary=True).fetchall()
    return [BatchRow(*row) for row in rows]


def batch_at(tx: Connection, index: int) -> BatchRow | None:
    """Return the batch that an index lies in; None if the log is shorter."""
    found = batches(tx, after=index, most=1)
    return found[0] if found else None


def largest_batch(tx: Connection, *, at_most: int | None = None) -> BatchRow | None:
    """Return the largest checkpoint, or the largest of at most so many events."""
    size = tx.execute(
        text(
            "SELECT max(size) FROM audit.checkpoint "
            "WHERE CAST(:at_most AS bigint) IS NULL OR size <= :at_most"
        ),
        {"at_most": at_most},
    ).scalar_one()
    return None if size is None else batch_at(tx, size - 1)


_ROWS = (
    f"SELECT l.index, l.seq, {_number('e.xid')}, "
    f"coalesce(to_char(e.at AT TIME ZONE 'UTC', {_TIME}), ''), e.account_id::text, "
    + "".join(
        f"CASE WHEN octet_length(e.{column}) > {_LONGEST} THEN left(e.{column}, {_LONGEST + 1}) "
        f"ELSE e.{column} END, "
        if column != "target_id"
        else "e.target_id::text, "
        for column in ("class", "action", "target_kind", "target_id", "login", "client", "body")
    )
    + "substr(e.leaf, 1, 33) "
    "FROM (SELECT c.size - cardinality(c.seqs) + p.place - 1 AS index, p.seq "
    "FROM audit.checkpoint c CROSS JOIN LATERAL unnest(c.seqs) WITH ORDINALITY AS p (seq, place) "
    "WHERE c.size > %s AND c.size <= %s) AS l "
    "LEFT JOIN audit.event e ON e.seq = l.seq "
    "AND e.at BETWEEN %s::timestamptz AND %s::timestamptz ORDER BY l.index"
)


def rows(tx: Connection, group: Sequence[BatchRow]) -> list[LogRow]:
    """Return the events of batches that follow each other, in the order of their indexes."""
    return list(stream(tx, group))


#: Rows that are held at once: 32 MiB, if each is as long as an event can be.
_PORTION = 512


def stream(tx: Connection, group: Sequence[BatchRow]) -> Iterator[LogRow]:
    """Yield the events of batches as `rows` returns them, read in portions."""
    earliest, latest = (
        min(batch.earliest for batch in group),
        max(batch.latest for batch in group),
    )
    with _driver(tx).cursor("events", binary=True) as cursor:
        cursor.itersize = _PORTION
        cursor.execute(_ROWS, (group[0].size - 1, group[-1].size, earliest, latest), binary=True)
        yield from cursor


def is_cut(row: LogRow) -> bool:
    """Say whether a field is longer than what is read of it."""
    return any(isinstance(field, str) and len(field.encode()) > _LONGEST for field in row)


def tiles(tx: Connection, level: int, first: int, last: int) -> dict[int, bytes]:
    """Return the tiles first <= n <= last of a level that are there."""
    found = tx.execute(
        text(
            "SELECT n, substr(hashes, 1, 8192) FROM audit.tile "
            "WHERE level = :level AND n BETWEEN :first AND :last"
        ),
        {"level": level, "first": first, "last": last},
    )
    return {n: bytes(hashes) for n, hashes in found}


def tiled(tx: Connection) -> int:
    """Return how many leaves the tiles hold."""
    found = tx.execute(
        text(
            "SELECT n::numeric * 256 + octet_length(hashes) / 32 FROM audit.tile WHERE level = 0 "
            "ORDER BY n DESC LIMIT 1"
        )
    ).scalar_one_or_none()
    return int(found or 0)


@dataclass(frozen=True, slots=True)
class EpochRow:
    """Why and where the log went on, as the database has it."""

    epoch: int
    size: int
    reason: str
    lost_size: int | None
    lost_root: str | None


def epochs(tx: Connection, *, most: int | None = None) -> list[EpochRow]:
    """Return all epochs, or so many, the oldest first."""
    found = tx.execute(
        text(
            "SELECT epoch, size, left(reason, :longest), lost_size, "
            "encode(substr(lost_root, 1, 33), 'hex') FROM audit.epoch ORDER BY epoch LIMIT :most"
        ),
        {"longest": _REASON, "most": most},
    )
    return [EpochRow(*row) for row in found]


@dataclass(frozen=True, slots=True)
class Unsealed:
    """An event that is in no checkpoint."""

    seq: int
    at: str
    never: bool  # of a transaction that has not come yet, or of a time a day ahead or more
    ahead: bool  # of a time that clocks do not differ by
    behind: bool  # before the last one that is sealed in this epoch, or before its cut
    old: bool  # written more than five minutes ago


@dataclass(frozen=True, slots=True)
class Place:
    """Where the log stands as it was verified: an event that is not sealed must lie behind."""

    epoch: int
    xid: int
    seq: int
    since: str  # only events of this time and later are looked at


def total(tx: Connection) -> int:
    """Return how many events the database holds."""
    return int(tx.execute(text("SELECT count(*) FROM audit.event")).scalar_one())


def unsealed(tx: Connection, place: Place, most: int) -> tuple[int, list[Unsealed]]:
    """Return how many events are in no checkpoint, and up to `most` of them, the worst first.

    Since `-infinity`, which reads the whole log, or a part of it. Where the log stands is not asked
    here: rows that say it are rows like others, and nobody signs them. Of an event that an epoch
    found there (up to its cut) numbers of transactions mean nothing.
    """
    rows = tx.execute(
        text(
            "WITH cut AS (SELECT coalesce((SELECT floor_seq FROM audit.epoch "
            "WHERE epoch = :epoch), 0) AS seq), "
            "outside AS (SELECT e.* FROM audit.event e WHERE e.at >= CAST(:since AS timestamptz) "
            "AND NOT EXISTS ("
            "SELECT FROM (SELECT unnest(c.seqs) AS seq, c.earliest, c.latest "
            "FROM audit.checkpoint c WHERE c.latest >= CAST(:since AS timestamptz)) AS s "
            "WHERE s.seq = e.seq AND e.at BETWEEN s.earliest AND s.latest)) "
            "SELECT o.seq, o.at::text, "
            "o.xid >= pg_snapshot_xmax(pg_current_snapshot()) "
            "OR o.at > clock_timestamp() + interval '1 day' AS never, "
            "o.at > clock_timestamp() + interval '5 minutes' AS ahead, "
            "o.seq <= cut.seq OR o.xid < CAST(:xid AS xid8) "
            "OR (o.xid = CAST(:xid AS xid8) AND o.seq < :seq) AS behind, "
            "o.at < clock_timestamp() - interval '5 minutes' AS old, count(*) OVER () "
            "FROM outside o CROSS JOIN cut "
            "ORDER BY never DESC, behind DESC, ahead DESC, old DESC, o.seq LIMIT :most"
        ),
        {
            "epoch": place.epoch,
            "xid": str(place.xid),
            "seq": place.seq,
            "since": place.since,
            "most": most,
        },
    ).all()
    found = [Unsealed(*row[:6]) for row in rows]
    return (int(rows[0][6]) if rows else 0), found
