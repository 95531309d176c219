"""How far a running run is: its stream, and how many rows that stream will likely have."""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text


@dataclass(frozen=True, slots=True)
class Progress:
    """As of the last heartbeat. `rows_expected` is an estimate; None where there is none."""

    stream: str
    number: int  # of this stream among those of the run
    streams: int
    rows: int
    bytes: int
    rows_expected: int | None


#: The estimate comes from the last comparable read of the stream: a whole one if this one reads it
#: whole, a window if this one reads a window. Else from the source's own, as discovered last.
_PROGRESS = text(
    "WITH me AS (SELECT a.subject_id, a.source_id, a.options, l.stream, l.rows, l.bytes, "
    "coalesce(CAST(a.options ->> 'full_refresh' AS boolean), false) OR NOT EXISTS (SELECT "
    "FROM cursors c WHERE c.connection_id = a.subject_id AND c.stream = l.stream "
    "AND c.cursor IS NOT NULL) AS whole "
    "FROM active_runs a JOIN leases l ON l.run_id = a.run_id WHERE a.run_id = :run), "
    "wanted AS (SELECT t.name, row_number() OVER (ORDER BY t.position) AS number, "
    "count(*) OVER () AS streams FROM streams t, me WHERE t.connection_id = me.subject_id "
    "AND (coalesce(me.options -> 'streams', '[]') = '[]' OR me.options -> 'streams' ? t.name)), "
    "before AS (SELECT t.rows_extracted AS n FROM me CROSS JOIN LATERAL ("
    "SELECT run_id, finished_at FROM runs r WHERE r.subject_id = me.subject_id "
    "AND r.kind = 'sync' ORDER BY finished_at DESC LIMIT 20) AS r "
    "JOIN run_streams t ON t.run_id = r.run_id AND t.stream = me.stream "
    "AND t.state = 'succeeded' AND (t.cursor_from IS NULL) = me.whole "
    "ORDER BY r.finished_at DESC LIMIT 1), "
    "discovered AS (SELECT CAST(s ->> 'rows_estimated' AS bigint) AS n FROM me CROSS JOIN LATERAL ("
    "SELECT run_id, finished_at FROM runs r WHERE r.subject_id = me.source_id "
    "AND r.kind = 'discover' ORDER BY finished_at DESC LIMIT 1) AS r "
    "JOIN run_outputs o ON o.run_id = r.run_id "
    "CROSS JOIN LATERAL jsonb_array_elements(o.document -> 'streams') AS s "
    "WHERE me.whole AND s ->> 'name' = me.stream) "
    "SELECT me.stream, me.rows, me.bytes, coalesce(w.number, 1) AS number, "
    "coalesce(w.streams, 1) AS streams, nullif(greatest(coalesce((SELECT n FROM before), "
    "(SELECT n FROM discovered)), 0), 0) AS rows_expected "
    "FROM me LEFT JOIN wanted w ON w.name = me.stream WHERE me.stream IS NOT NULL"
)


def read(tx: Connection, run_id: UUID) -> Progress | None:
    """Return the progress of a running run; None before its first stream or after its end.

    `tx` has entered the run's account.
    """
    row = tx.execute(_PROGRESS, {"run": run_id}).one_or_none()
    return None if row is None else Progress(**row._mapping)  # noqa: SLF001 - its public name
