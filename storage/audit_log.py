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
                "SET LOCAL enable_nestloop = off; SET LOCAL jit = off"
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


_BATCHES = (
    "SELECT size, cardinality(seqs)::bigint, epoch, root, "  # noqa: S608 - a constant
    f"coalesce(to_char(signed_at AT TIME ZONE 'UTC', {_TIME}), ''), signatures, "
    "last_xid::text::bigint, last_seq, earliest::text, latest::text "
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
    "SELECT l.index, l.seq, e.xid::text::bigint, "  # noqa: S608 - a constant
    f"coalesce(to_char(e.at AT TIME ZONE 'UTC', {_TIME}), ''), e.account_id::text, e.class, "
    "e.action, e.target_kind, e.target_id::text, e.login, e.client, e.body, e.leaf "
    "FROM (SELECT c.size - cardinality(c.seqs) + p.place - 1 AS index, p.seq "
    "FROM audit.checkpoint c CROSS JOIN LATERAL unnest(c.seqs) WITH ORDINALITY AS p (seq, place) "
    "WHERE c.size > %s AND c.size <= %s) AS l "
    "LEFT JOIN audit.event e ON e.seq = l.seq "
    "AND e.at BETWEEN %s::timestamptz AND %s::timestamptz ORDER BY l.index"
)


def rows(tx: Connection, group: Sequence[BatchRow]) -> list[LogRow]:
    """Return the events of batches that follow each other, in the order of their indexes."""
    earliest, latest = (
        min(batch.earliest for batch in group),
        max(batch.latest for batch in group),
    )
    with _driver(tx).cursor(binary=True) as cursor:
        return cursor.execute(
            _ROWS,
            (group[0].size - 1, group[-1].size, earliest, latest),
            binary=True,
        ).fetchall()


def tiles(tx: Connection, level: int, first: int, last: int) -> dict[int, bytes]:
    """Return the tiles first <= n <= last of a level that are there."""
    found = tx.execute(
        text(
            "SELECT n, hashes FROM audit.tile WHERE level = :level AND n BETWEEN :first AND :last"
        ),
        {"level": level, "first": first, "last": last},
    )
    return {n: bytes(hashes) for n, hashes in found}


def tiled(tx: Connection) -> int:
    """Return how many leaves the tiles hold."""
    found = tx.execute(
        text(
            "SELECT n * 256 + octet_length(hashes) / 32 FROM audit.tile WHERE level = 0 "
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


def epochs(tx: Connection) -> list[EpochRow]:
    """Return all epochs, the oldest first."""
    found = tx.execute(
        text(
            "SELECT epoch, size, reason, lost_size, encode(lost_root, 'hex') FROM audit.epoch "
            "ORDER BY epoch"
        )
    )
    return [EpochRow(*row) for row in found]


@dataclass(frozen=True, slots=True)
class Unsealed:
    """An event that is in no checkpoint."""

    seq: int
    at: str
    never: bool  # of a transaction or a time that has not come yet
    behind: bool  # of one that is older than what is sealed in this epoch
    old: bool  # written more than five minutes ago


#: Events of the last hour before the newest checkpoint are looked at one by one.
_YOUNG = "(SELECT max(latest) - interval '1 hour' FROM audit.checkpoint)"


def total(tx: Connection) -> int:
    """Return how many events the database holds."""
    return int(tx.execute(text("SELECT count(*) FROM audit.event")).scalar_one())


def unsealed(tx: Connection, most: int, *, all_: bool) -> tuple[int, list[Unsealed]]:
    """Return how many events are in no checkpoint, and up to `most` of them, the worst first.

    Young ones, or all of them, which reads the whole log. What audit.log says is not asked: it is
    a row like another, and nobody signs it.
    """
    since = "'-infinity'::timestamptz" if all_ else f"coalesce({_YOUNG}, '-infinity')"
    rows = tx.execute(
        text(
            "WITH newest AS (SELECT c.epoch, c.last_xid, c.last_seq, p.floor_seq "  # noqa: S608 - one of two constants
            "FROM audit.checkpoint c JOIN audit.epoch p ON p.epoch = c.epoch "
            "ORDER BY c.size DESC LIMIT 1), "
            f"outside AS (SELECT e.* FROM audit.event e WHERE e.at >= {since} AND NOT EXISTS ("
            "SELECT FROM (SELECT unnest(c.seqs) AS seq, c.earliest, c.latest "
            f"FROM audit.checkpoint c WHERE c.latest >= {since}) AS s "
            "WHERE s.seq = e.seq AND e.at BETWEEN s.earliest AND s.latest)) "
            "SELECT o.seq, o.at::text, "
            "o.xid >= pg_snapshot_xmax(pg_current_snapshot()) "
            "OR o.at > clock_timestamp() + interval '1 minute' AS never, "
            "coalesce(n.last_seq > 0 AND (o.seq > n.floor_seq OR n.epoch = 1) "
            "AND (o.xid < n.last_xid "
            "OR (o.xid = n.last_xid AND o.seq < n.last_seq)), false) AS behind, "
            "o.at < clock_timestamp() - interval '5 minutes' AS old, count(*) OVER () "
            "FROM outside o LEFT JOIN newest n ON true "
            "ORDER BY never DESC, behind DESC, old DESC, o.seq LIMIT :most"
        ),
        {"most": most},
    ).all()
    found = [Unsealed(*row[:5]) for row in rows]
    return (int(rows[0][5]) if rows else 0), found
