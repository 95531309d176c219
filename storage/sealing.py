"""What the sealer asks of the control database and writes there: window, tiles, checkpoints.

An event is taken once it is final: its transaction is older than every transaction that still runs
(`xid < pg_snapshot_xmin`). A rule like `seq > last` would lose those that commit out of order.

Numbers of transactions mean nothing in another server. There an epoch begins with a cut: no event
is being written at that moment, so those up to the cut are told from later ones by `seq`. What is
not sealed of them (`left_over`) comes first, then the window starts again behind the cut.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.errors import ConfigError
from storage.rowset import rowset


@dataclass(frozen=True, slots=True)
class Position:
    """Of an event, in the order in which events are sealed within an epoch."""

    xid: int
    seq: int


@dataclass(frozen=True, slots=True)
class LogState:
    """How far a log is sealed and published, and who seals it."""

    log_id: UUID
    epoch: int
    size: int
    last: Position
    floor_seq: int
    sealed_at: datetime
    published_size: int
    published_at: datetime
    holder: str
    held: bool  # by `holder`, at the time of reading
    left_over: bool  # up to `floor_seq` there may be events that no checkpoint holds
    elsewhere: bool  # another server counted the transactions of this epoch: we were restored


@dataclass(frozen=True, slots=True)
class Window:
    """Final events that are not sealed, in their order."""

    leaves: Sequence[bytes]
    seqs: Sequence[int]
    ends: Sequence[Position]  # where the log stands after each
    earliest: datetime
    latest: datetime

    def parts(self, most: int) -> Iterator["Window"]:
        """Yield it in parts of at most `most` events, the times of each within those of all."""
        for at in range(0, len(self.seqs), most):
            part = slice(at, at + most)
            yield replace(
                self, leaves=self.leaves[part], seqs=self.seqs[part], ends=self.ends[part]
            )


@dataclass(frozen=True, slots=True)
class Sealed:
    """One batch as it was written: docs/audit.md says what each column means."""

    size: int
    epoch: int
    seqs: Sequence[int]
    last: Position
    earliest: datetime
    latest: datetime
    root: bytes
    signed_at: datetime
    signatures: str


#: A right that would last longer than any sealer asks for is a clock that was put back.
_HELD = "(held_until > clock_timestamp() AND held_until < clock_timestamp() + interval '1 minute')"

#: A row that was restored from a dump was written (xmin) by another transaction than it says.
_STATE = text(
    "SELECT l.log_id, l.epoch, l.size, l.last_xid::text::bigint AS last_xid, l.last_seq, "  # noqa: S608 - a constant
    f"l.floor_seq, l.sealed_at, l.published_size, l.published_at, l.holder, {_HELD} AS held, "
    "l.left_over, l.last_xid >= pg_snapshot_xmin(pg_current_snapshot()) "
    "OR e.xmin::text::numeric <> mod(e.xid::text::numeric, 4294967296) AS elsewhere "
    "FROM audit.log l JOIN audit.epoch e ON e.epoch = l.epoch"
)


def state(tx: Connection) -> LogState:
    """Return how far the log is sealed; ConfigError if it says so no longer."""
    row = tx.execute(_STATE).one_or_none()
    if row is None:
        raise ConfigError(
            "audit: the row of audit.log or its epoch is gone from the control database, which no "
            "process of ours removes; compare with the anchors, then restore the database"
        )
    return LogState(
        log_id=row.log_id,
        epoch=row.epoch,
        size=row.size,
        last=Position(row.last_xid, row.last_seq),
        floor_seq=row.floor_seq,
        sealed_at=row.sealed_at,
        published_size=row.published_size,
        published_at=row.published_at,
        holder=row.holder,
        held=row.held,
        left_over=row.left_over,
        elsewhere=row.elsewhere,
    )


_FINAL = text(
    "WITH found AS MATERIALIZED (SELECT e.xid, e.seq, e.leaf, e.at FROM audit.event e "
    "WHERE e.xid >= CAST(:xid AS xid8) AND (e.xid > CAST(:xid AS xid8) OR e.seq > :seq) "
    "AND e.seq > :floor AND e.xid < pg_snapshot_xmin(pg_current_snapshot()) "
    "ORDER BY e.xid, e.seq LIMIT :most) "
    "SELECT string_agg(leaf, ''::bytea ORDER BY xid, seq) AS leaves, "
    "array_agg(seq ORDER BY xid, seq) AS seqs, "
    "array_agg(xid::text::bigint ORDER BY xid, seq) AS xids, "
    "min(at) AS earliest, max(at) AS latest FROM found"
)


def window(tx: Connection, after: LogState, most: int) -> Window | None:
    """Return up to `most` final events after what is sealed; None if there are none."""
    row = tx.execute(
        _FINAL,
        {
            "xid": str(after.last.xid),
            "seq": after.last.seq,
            "floor": after.floor_seq,
            "most": most,
        },
    ).one()
    if row.leaves is None:
        return None
    joined = bytes(row.leaves)
    return Window(
        leaves=[joined[at : at + 32] for at in range(0, len(joined), 32)],
        seqs=row.seqs,
        ends=[Position(xid, seq) for xid, seq in zip(row.xids, row.seqs, strict=True)],
        earliest=row.earliest,
        latest=row.latest,
    )


#: The next events by their time, sealed or not, after those that were looked at before.
_PAGE = text(
    "WITH page AS MATERIALIZED (SELECT e.xid, e.seq, e.leaf, e.at FROM audit.event e "
    "WHERE e.at >= (SELECT left_at FROM audit.log) AND (e.at, e.seq) > "
    "((SELECT left_at FROM audit.log), (SELECT left_seq FROM audit.log)) "
    "ORDER BY e.at, e.seq LIMIT :most), "
    "moved AS (UPDATE audit.log SET left_at = p.at, left_seq = p.seq "
    "FROM (SELECT at, seq FROM page ORDER BY at DESC, seq DESC LIMIT 1) AS p) "
    "SELECT (SELECT count(*) FROM page) AS looked, "
    "string_agg(leaf, ''::bytea ORDER BY xid, seq) AS leaves, "
    "array_agg(seq ORDER BY xid, seq) AS seqs, array_agg(at ORDER BY xid, seq) AS times, "
    "min(at)::text AS first, max(at)::text AS last FROM page WHERE seq <= :floor"
)
#: Of the checkpoints whose events are of that time.
_SEALED = text(
    "SELECT unnest(c.seqs) FROM audit.checkpoint c WHERE tstzrange(c.earliest, c.latest, '[]') "
    "&& tstzrange(CAST(:first AS timestamptz), CAST(:last AS timestamptz), '[]')"
)


@dataclass(frozen=True, slots=True)
class LeftOver:
    """What one look found: events that no checkpoint holds, and whether it was the last look."""

    found: Window | None
    ended: bool


def left_over(tx: Connection, after: LogState, most: int) -> LeftOver:
    """Look at the next `most` events for those up to the cut that no checkpoint holds.

    The log remembers how far it was looked at, so that each event is looked at once, whatever the
    size of the log, whoever goes on. Only for who holds it.
    """
    row = tx.execute(_PAGE, {"most": most, "floor": after.floor_seq}).one()
    ended = row.looked < most
    if row.seqs is None:
        return LeftOver(None, ended)
    sealed = set(tx.execute(_SEALED, {"first": row.first, "last": row.last}).scalars())
    left = [place for place, seq in enumerate(row.seqs) if seq not in sealed]
    if not left:
        return LeftOver(None, ended)
    joined, times = bytes(row.leaves), [row.times[place] for place in left]
    found = Window(
        leaves=[joined[place * 32 : place * 32 + 32] for place in left],
        seqs=[row.seqs[place] for place in left],
        ends=[after.last] * len(left),
        earliest=min(times),
        latest=max(times),
    )
    return LeftOver(found, ended)


@dataclass(frozen=True, slots=True)
class Taken:
    """What an epoch took in of what the ones before had left."""

    count: int
    oldest: str | None  # of their times, as docs/audit.md writes times


def nothing_left(tx: Connection, seen: LogState) -> Taken:
    """Note that every event up to the cut is sealed: from now on, the window counts."""
    tx.execute(text("UPDATE audit.log SET left_over = false"))
    row = tx.execute(
        text(
            "SELECT coalesce(sum(cardinality(seqs)), 0)::bigint AS events, "
            "to_char(min(earliest) AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') "
            "AS oldest FROM audit.checkpoint WHERE epoch = :epoch AND last_seq = 0"
        ),
        {"epoch": seen.epoch},
    ).one()
    return Taken(row.events, row.oldest)


def hold(tx: Connection, holder: str, seen: LogState, *, lease: timedelta) -> bool:
    """Take or keep the right to seal; False if another sealer has it, or was here since `seen`.

    The row stays locked until the transaction ends, so that nobody seals meanwhile. What is signed
    must not be lost in a crash: this commit is durable whatever the server does with others.
    """
    kept = tx.execute(
        text(
            "UPDATE audit.log SET holder = :holder, held_until = clock_timestamp() + :lease "  # noqa: S608 - a constant
            f"WHERE (holder = :holder OR NOT {_HELD}) AND size = :size AND epoch = :epoch "
            "RETURNING CASE current_setting('synchronous_commit') WHEN 'off' "
            "THEN set_config('synchronous_commit', 'on', true) END"
        ),
        {"holder": holder, "lease": lease, "size": seen.size, "epoch": seen.epoch},
    ).one_or_none()
    return kept is not None


def let_go(tx: Connection, holder: str) -> None:
    """Give up the right to seal, so that another sealer need not wait for it."""
    tx.execute(
        text("UPDATE audit.log SET held_until = '-infinity' WHERE holder = :holder"),
        {"holder": holder},
    )


def write(tx: Connection, sealed: Sealed, tiles: Iterable[tuple[int, int, bytes]]) -> None:
    """Store a sealed batch: its tiles, its checkpoint, and how far the log is sealed now."""
    tx.execute(
        text(
            "INSERT INTO audit.tile (level, n, hashes) "
            "SELECT level, n, decode(hashes, 'hex') FROM json_to_recordset(CAST(:tiles AS json)) "
            "AS t (level smallint, n bigint, hashes text) "
            "ON CONFLICT (level, n) DO UPDATE SET hashes = excluded.hashes"
        ),
        {"tiles": rowset([{"level": lv, "n": n, "hashes": h.hex()} for lv, n, h in tiles])},
    )
    values = {
        "size": sealed.size,
        "epoch": sealed.epoch,
        "seqs": list(sealed.seqs),
        "xid": str(sealed.last.xid),
        "seq": sealed.last.seq,
        "earliest": sealed.earliest,
        "latest": sealed.latest,
        "root": sealed.root,
        "signed_at": sealed.signed_at,
        "signatures": sealed.signatures,
    }
    tx.execute(
        text(
            "INSERT INTO audit.checkpoint (size, epoch, seqs, last_xid, last_seq, earliest, "
            "latest, root, signed_at, signatures) VALUES (:size, :epoch, CAST(:seqs AS bigint[]), "
            "CAST(:xid AS xid8), :seq, :earliest, :latest, :root, :signed_at, :signatures)"
        ),
        values,
    )
    tx.execute(
        text(
            "UPDATE audit.log SET size = :size, last_xid = CAST(:xid AS xid8), last_seq = :seq, "
            "sealed_at = clock_timestamp()"
        ),
        values,
    )


def begin_epoch(
    tx: Connection, before: LogState, reason: str, *, lost: tuple[int, bytes] | None = None
) -> int:
    """Begin the next epoch where the log stands now, and return its number.

    In another server with a cut. `lost` is (size, root) of the last checkpoint that was signed and
    is gone.
    """
    values = {
        "epoch": before.epoch + 1,
        "size": before.size,
        "floor": before.floor_seq,
        "reason": reason,
        "lost_size": lost[0] if lost else None,
        "lost_root": lost[1] if lost else None,
    }
    if before.elsewhere:
        values["floor"], values["xid"] = tx.execute(
            text("SELECT last_seq, before_xid::text FROM audit.cut()")
        ).one()
    tx.execute(
        text(
            "INSERT INTO audit.epoch (epoch, size, floor_seq, reason, lost_size, lost_root) "
            "VALUES (:epoch, :size, :floor, :reason, :lost_size, :lost_root)"
        ),
        values,
    )
    behind = (
        ", floor_seq = :floor, last_xid = CAST(:xid AS xid8), last_seq = 0, left_over = true, "
        "left_at = '-infinity', left_seq = 0"
    )
    tx.execute(
        text("UPDATE audit.log SET epoch = :epoch" + (behind if before.elsewhere else "")),  # noqa: S608 - two constants
        values,
    )
    return before.epoch + 1


def tile(tx: Connection, level: int, n: int) -> bytes:
    """Return the hashes of a tile; KeyError if it is not there."""
    found = tx.execute(
        text("SELECT hashes FROM audit.tile WHERE level = :level AND n = :n"),
        {"level": level, "n": n},
    ).scalar_one_or_none()
    if found is None:
        raise KeyError((level, n))
    return bytes(found)


_CHECKPOINTS = (
    "SELECT size, epoch, seqs, last_xid::text::bigint AS last_xid, last_seq, earliest, latest, "
    "root, signed_at, signatures FROM audit.checkpoint "
)


def checkpoints(tx: Connection, *, after: int, most: int) -> list[Sealed]:
    """Return checkpoints of more than `after` events, the smallest first."""
    rows = tx.execute(
        text(_CHECKPOINTS + "WHERE size > :after ORDER BY size LIMIT :most"),
        {"after": after, "most": most},
    )
    return [_sealed(*row) for row in rows]


def newest_checkpoint(tx: Connection, *, at_most: int | None = None) -> Sealed | None:
    """Return the largest checkpoint, or the largest of at most so many events."""
    row = tx.execute(
        text(
            _CHECKPOINTS + "WHERE size <= coalesce(CAST(:at_most AS bigint), 9223372036854775807) "
            "ORDER BY size DESC LIMIT 1"
        ),
        {"at_most": at_most},
    ).one_or_none()
    return None if row is None else _sealed(*row)


def _sealed(  # noqa: PLR0917 - the columns of a checkpoint in their order
    size: int,
    epoch: int,
    seqs: list[int],
    last_xid: int,
    last_seq: int,
    earliest: datetime,
    latest: datetime,
    root: bytes,
    signed_at: datetime,
    signatures: str,
) -> Sealed:
    last = Position(last_xid, last_seq)
    return Sealed(size, epoch, seqs, last, earliest, latest, bytes(root), signed_at, signatures)


def published(tx: Connection, size: int) -> None:
    """Record that all required anchors hold the checkpoint of this size."""
    tx.execute(
        text(
            "UPDATE audit.log SET published_size = greatest(published_size, :size), "
            "published_at = clock_timestamp()"
        ),
        {"size": size},
    )
