"""Read the audit log as a stream: its newest events, or those that follow an index.

The index of an event is its place in the sealed log. It is known once the event is sealed and never
changes, so a reader that remembers the last one it has seen goes on there. Start at `newest` and
`following`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

#: So many rows are looked at by one query, at most, where a filter has no index.
_LOOKED_AT = 20_000
#: So many sealed events are gone through by one query of a follower, at most (or one batch).
_PAGE = 8_192


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event as the database stamped it; nothing of it is verified."""

    index: int | None  # None: not sealed yet
    seq: int
    at: datetime
    account_id: UUID | None
    class_: str
    action: str
    target_kind: str
    target_id: UUID
    login: str
    client: str
    body: str
    leaf: bytes


@dataclass(frozen=True, slots=True)
class Filters:
    """Which events are wanted; each that is not set lets all of them pass."""

    account_id: UUID | None = None
    principals: Sequence[str] = ()
    actions: Sequence[str] = ()
    target_kind: str | None = None
    target_id: UUID | None = None
    class_: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def wants(self, event: StoredEvent) -> bool:
        """Judge what SQL only narrows down: the body is text there, whatever stands in it."""
        return not self.principals or principal_of(event.body) in self.principals


def said(body: str) -> dict[str, Any]:
    """Return what a body says, fit for every reader of JSON.

    Whoever may insert events may insert any text: what is no JSON object is shown as `unreadable`,
    and what JSON does not have (NaN, half a surrogate pair) does not come out again.
    """
    try:
        found = json.loads(body, parse_float=str, parse_constant=str)
        if isinstance(found, dict):
            return {_whole(str(key)): _whole(value) for key, value in found.items()}
    except (ValueError, RecursionError):
        pass
    return {"unreadable": body}


def _whole(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Return a value without halves of surrogate pairs."""
    match value:
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case dict():
            return {_whole(key): _whole(inner) for key, inner in value.items()}
        case list():
            return [_whole(inner) for inner in value]
        case _:
            return value


def principal_of(body: str) -> str:
    """Return the principal that a body names; nothing if it names none."""
    return str(said(body).get("principal", ""))


_COLUMNS = (
    "e.seq, e.at, e.account_id, e.class, e.action, e.target_kind, e.target_id, e.login, e.client, "
    "e.body, e.leaf"
)
# of an event: the first checkpoint at or after its position, in whichever epoch holds it
_INDEX = (
    "SELECT c.size - cardinality(c.seqs) + array_position(c.seqs, e.seq) - 1 AS place "
    "FROM audit.epoch p CROSS JOIN LATERAL (SELECT k.size, k.seqs, k.earliest, k.latest "
    "FROM audit.checkpoint k WHERE k.epoch = p.epoch "
    "AND (k.last_xid, k.last_seq) >= (e.xid, e.seq) "
    "ORDER BY k.last_xid, k.last_seq LIMIT 1) AS c "
    "WHERE e.seq = ANY (c.seqs) AND e.at BETWEEN c.earliest AND c.latest LIMIT 1"
)


def _conditions(filters: Filters) -> tuple[list[str], list[str], dict[str, Any]]:
    """Return what an index can answer, what it cannot, and the values of both."""
    indexed = {
        "e.account_id = :account": ("account", filters.account_id),
        "e.target_id = :target": ("target", filters.target_id),
        "e.at >= :since": ("since", filters.since),
        "e.at < :until": ("until", filters.until),
    }
    other = {
        "action = ANY (:actions)": ("actions", list(filters.actions) or None),
        "target_kind = :kind": ("kind", filters.target_kind),
        "class = :class": ("class", filters.class_),
        # a quote inside a string is escaped, so that this stands nowhere but where a key does
        "EXISTS (SELECT FROM unnest(CAST(:principals AS text[])) AS p "
        "WHERE position(p IN body) > 0)": (
            "principals",
            [f'"principal":{json.dumps(p, ensure_ascii=False)}' for p in filters.principals]
            or None,
        ),
    }
    values = {name: value for name, value in [*indexed.values(), *other.values()] if value}
    return (
        [condition for condition, (_, value) in indexed.items() if value],
        [condition for condition, (_, value) in other.items() if value],
        values,
    )


def newest(tx: Connection, filters: Filters, limit: int) -> list[StoredEvent]:
    """Return the newest events, sealed or not: those that are sealed first, by their index.

    They are looked for in slices, so that no query runs long where a filter matches little.
    """
    indexed, other, values = _conditions(filters)
    found: list[StoredEvent] = []
    slice_ = _LOOKED_AT if other else limit
    before: tuple[datetime, int] | None = None
    while True:
        bound = ["(e.at, e.seq) < (:at, :seq)"] if before else []
        inside = " AND ".join([*indexed, *bound]) or "true"
        rows = tx.execute(
            text(
                f"WITH slice AS MATERIALIZED (SELECT {_COLUMNS}, e.xid FROM audit.event e "  # noqa: S608 - our own conditions
                f"WHERE {inside} ORDER BY e.at DESC, e.seq DESC LIMIT :slice), "
                "ends AS (SELECT count(*) AS looked, min(at) AS oldest, (array_agg(seq ORDER BY "
                "at, seq))[1] AS oldest_seq FROM slice), "
                f"wanted AS (SELECT * FROM slice WHERE {' AND '.join(other) or 'true'} "
                "ORDER BY at DESC, seq DESC LIMIT :limit) "
                f"SELECT ends.*, i.place, {_COLUMNS} FROM ends LEFT JOIN wanted e ON true "
                f"LEFT JOIN LATERAL ({_INDEX}) AS i ON true ORDER BY e.at DESC, e.seq DESC"
            ),
            {**values, "slice": slice_, "limit": limit}
            | ({"at": before[0], "seq": before[1]} if before else {}),
        ).all()
        stored = [_stored(row) for row in rows if row.seq is not None]
        found += [event for event in stored if filters.wants(event)]
        end = rows[0]
        # cut by the limit before `wants` judged it: go on below what was returned
        cut = len(stored) == limit
        if len(found) >= limit or (end.looked < slice_ and not cut):
            break
        before = (stored[-1].at, stored[-1].seq) if cut else (end.oldest, end.oldest_seq)
    return sorted(found[:limit], key=lambda e: (e.index is None, e.index or 0, e.at, e.seq))


@dataclass(frozen=True, slots=True)
class Page:
    """What follows an index: the events that are wanted, and up to where all were looked at."""

    events: Sequence[StoredEvent]
    end: int  # the next page begins at this index
    missing: int  # so many sealed events of the page are not in the database
    more: bool  # there are sealed events behind this page


_BATCHES = text(
    "SELECT c.size, c.seqs, c.earliest, c.latest, c.last_xid::text AS last_xid, c.epoch, "
    "(SELECT b.last_xid::text FROM audit.checkpoint b WHERE b.size < c.size AND b.epoch = c.epoch "
    "ORDER BY b.size DESC LIMIT 1) AS before FROM audit.checkpoint c WHERE c.size > :begin "
    "ORDER BY c.size LIMIT 64"
)


def following(
    tx: Connection, filters: Filters, *, begin: int, limit: int, page: int = _PAGE
) -> Page:
    """Return up to `limit` sealed events from index `begin` on, in the order of their indexes.

    Whole batches are looked at, each by the transactions that it holds: a page costs what is new,
    however large the log is and whatever the filters let pass.
    """
    places: dict[int, int] = {}  # seq -> index
    batches: list[Row[Any]] = []
    available = tx.execute(_BATCHES, {"begin": begin}).all()
    for batch in available:
        first = batch.size - len(batch.seqs)
        if batches and (len(places) + len(batch.seqs) > page or batch.epoch != batches[0].epoch):
            break
        batches.append(batch)
        places |= {
            seq: index for index, seq in enumerate(batch.seqs, start=first) if index >= begin
        }
    if not batches:
        return Page((), begin, 0, more=False)
    found = _events(tx, filters, batches, places)
    events = sorted(
        (event for event in found.events if filters.wants(event)), key=lambda e: e.index or 0
    )
    end = batches[-1].size
    more = len(batches) < len(available)
    if len(events) > limit:
        events = events[:limit]
        end, more = (events[-1].index or 0) + 1, True
    return Page(events, end, len(places) - found.present, more=more)


@dataclass(frozen=True, slots=True)
class _Found:
    events: list[StoredEvent]
    present: int


def _events(
    tx: Connection, filters: Filters, batches: Sequence[Row[Any]], places: dict[int, int]
) -> _Found:
    indexed, other, values = _conditions(filters)
    inside = ["e.at BETWEEN :earliest AND :latest", "e.seq = ANY (CAST(:seqs AS bigint[]))",
              "e.xid <= CAST(:last AS xid8)"]  # fmt: skip
    if batches[0].before is not None:  # None: the first of an epoch, which time alone bounds
        inside.append("e.xid >= CAST(:before AS xid8)")
    values |= {
        "earliest": min(batch.earliest for batch in batches),
        "latest": max(batch.latest for batch in batches),
        "seqs": list(places),
        "last": batches[-1].last_xid,
        "before": batches[0].before,
    }
    rows = tx.execute(
        text(
            f"WITH there AS MATERIALIZED (SELECT {_COLUMNS} FROM audit.event e "  # noqa: S608 - our own conditions
            f"WHERE {' AND '.join(inside)}), counted AS (SELECT count(*) AS present FROM there) "
            f"SELECT counted.present, CAST(NULL AS bigint) AS place, {_COLUMNS} FROM counted "
            "LEFT JOIN there e ON " + (" AND ".join([*indexed, *other]) or "true")
        ),
        values,
    ).all()
    events = [replace(_stored(row), index=places[row.seq]) for row in rows if row.seq is not None]
    return _Found(events, rows[0].present)


def one(tx: Connection, at: datetime, seq: int) -> StoredEvent | None:
    """Return the event of this time and number, with its index if it is sealed."""
    row = tx.execute(
        text(
            f"SELECT i.place, {_COLUMNS} FROM audit.event e LEFT JOIN LATERAL ({_INDEX}) AS i "  # noqa: S608 - our own columns
            "ON true WHERE e.at = :at AND e.seq = :seq"
        ),
        {"at": at, "seq": seq},
    ).one_or_none()
    return None if row is None else _stored(row)


@dataclass(frozen=True, slots=True)
class Sealing:
    """How far the log is sealed, and whether anybody seals it."""

    size: int
    alive: bool


def sealing(tx: Connection) -> Sealing:
    """Return how far the log is sealed; a sealer that is there renews its lease within seconds."""
    row = tx.execute(
        text(
            "SELECT size, held_until > clock_timestamp() - interval '5 seconds' AS alive "
            "FROM audit.log"
        )
    ).one()
    return Sealing(row.size, row.alive)


def _stored(row: Row[Any]) -> StoredEvent:
    return StoredEvent(
        index=row.place,
        seq=row.seq,
        at=row.at,
        account_id=row.account_id,
        class_=row._mapping["class"],  # noqa: SLF001 - the column's name is a word of Python
        action=row.action,
        target_kind=row.target_kind,
        target_id=row.target_id,
        login=row.login,
        client=row.client,
        body=row.body,
        leaf=bytes(row.leaf),
    )


def account_id(tx: Connection, name: str) -> UUID | None:
    """Return the account of this name; an auditor may know no more of it."""
    return tx.execute(
        text("SELECT id FROM accounts WHERE name = :name"), {"name": name}
    ).scalar_one_or_none()
