"""Guards of a load: what would harm the target stops the transaction, with a preview for a person.

Each is asked where the answer costs nothing in the usual case. What was done is undone up to a
savepoint, and only then are a few keys looked up for the preview.
"""

import math
from collections.abc import Sequence

from psycopg import sql

from connectors.postgres import rejects
from connectors.postgres.batch import Load
from connectors.postgres.link import Connection
from connectors.postgres.refusals import RowsRefused
from schemas.guards import SAMPLE_CHARS, SAMPLE_KEYS, Finding, Guard, Preview, covered, stop
from schemas.records import Change, SchemaChange
from schemas.streams import Deletes

_MARK = sql.SQL("SAVEPOINT syncward_before")
_UNDO = sql.SQL("ROLLBACK TO SAVEPOINT syncward_before")


def marked(conn: Connection, statement: sql.Composed) -> int:
    """Execute a statement that a guard may undo, in the same round trip as its savepoint."""
    cursor = conn.execute(sql.SQL("{}; {}").format(_MARK, statement))
    cursor.nextset()
    return cursor.rowcount


def undo(conn: Connection) -> None:
    """Undo everything since `marked`."""
    conn.execute(_UNDO)


# ── rows that would go ───────────────────────────────────────────────────────────────────────


def check_zero_rows(load: Load, rows: int) -> None:
    """Stop where the source has no row and many are served."""
    guards = load.request.stream.guards
    if rows or not guards.zero_rows:
        return
    many = max(guards.floor, 1)
    if _served(load, limit=many) < many:
        return
    before = _served(load)
    gone = 0 if load.deletion is Deletes.IGNORE else before
    found = Finding(
        guard=Guard.ZERO_ROWS,
        stream=load.request.stream.name,
        amount=before,
        before=before,
        after=0,
        to_delete=gone,
    )
    would = "end" if load.is_history else "be deleted"
    then = f"all {gone:,} rows would {would}" if gone else "they would stay as they are"
    sentence = (
        f"{found.stream}: the source has no rows and {before:,} are served; {then}. Nothing was "
        "changed: approve or reject the run"
    )
    stop(Preview(found, sentence), load.request.approvals)


def check_deletes(
    load: Load,
    deleted: int,
    source_rows: int,
    gone: Sequence[sql.Composable] = (),
    key: Sequence[str] = (),
) -> None:
    """Stop where more of the served rows were just deleted than the stream's ratio allows."""
    guards = load.request.stream.guards
    if deleted <= guards.delete_ratio * guards.floor or guards.delete_ratio >= 1:
        return
    enough = guards.floor
    if guards.delete_ratio:
        enough = max(enough, math.ceil(deleted / guards.delete_ratio))
    before = deleted + _served(load, limit=enough)
    if before < guards.floor or deleted <= guards.delete_ratio * before:
        return
    found = _delete_finding(load, deleted, source_rows)
    if covered(found, load.request.approvals) or _emptied_by_approval(load, found):
        return
    undo(load.conn)
    share = math.floor(100 * found.share)
    would = "be stamped as deleted" if load.deletion is Deletes.SOFT else "be deleted"
    would = "end" if load.is_history else would
    sentence = (
        f"{found.stream}: {deleted:,} of {found.before:,} rows would {would} "
        f"({share} %, allowed are {100 * guards.delete_ratio:g} %). Nothing was "
        "changed: approve or reject the run"
    )
    stop(Preview(found, sentence, _keys_of(load, gone, key)), load.request.approvals)


def _delete_finding(load: Load, deleted: int, source_rows: int) -> Finding:
    return Finding(
        guard=Guard.DELETE_RATIO,
        stream=load.request.stream.name,
        amount=deleted,
        before=deleted + _served(load),
        after=source_rows,
        to_delete=deleted,
    )


def _emptied_by_approval(load: Load, found: Finding) -> bool:
    """Say whether a person has approved that all rows go, and the source is still empty."""
    all_rows = found.model_copy(update={"guard": Guard.ZERO_ROWS})
    return found.after == 0 and covered(all_rows, load.request.approvals)


def _served(load: Load, *, limit: int | None = None) -> int:
    """Count the rows that readers see, no further than asked."""
    end = sql.SQL("") if limit is None else sql.SQL(" LIMIT {}").format(sql.Literal(limit))
    row = load.conn.execute(
        sql.SQL("SELECT count(*) FROM (SELECT FROM {} WHERE {}{}) AS served").format(
            load.table, load.served, end
        )
    ).fetchone()
    return int(row[0]) if row else 0


def _keys_of(
    load: Load, conditions: Sequence[sql.Composable], key: Sequence[str]
) -> tuple[str, ...]:
    names = sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(k)) for k in key)
    found: list[str] = []
    for condition in conditions:
        rows = load.conn.execute(
            sql.SQL("SELECT left(ROW({})::text, {}) FROM {} t WHERE {} AND {} LIMIT {}").format(
                names,
                sql.Literal(SAMPLE_CHARS),
                load.table,
                load.served,
                condition,
                sql.Literal(SAMPLE_KEYS - len(found)),
            )
        )
        found += [str(row[0]) for row in rows]
    return tuple(found)


# ── keys that are none ───────────────────────────────────────────────────────────────────────


def make_unique(load: Load, key: Sequence[str], table: sql.Composable) -> int:
    """Refuse keys that repeat or are NULL; return the rows rejected where that is allowed.

    Which row should win is not ours to guess. A person may allow it: then it is the row with the
    largest cursor, and of equal ones the row that was read last. Where rows may be rejected, those
    with NULL are.
    """
    repeated, nulls = _repeated(load, key, table)
    named = f"{load.request.stream.name}: key ({', '.join(key)})"
    if nulls and (load.refusals is None or not load.request.stream.rejected_max):
        raise RowsRefused(
            f"{named} is no key: {repeated} values repeat, {nulls} rows have NULL in it"
        )
    if nulls:
        rejects.drop_keyless(load, key, nulls)
        repeated, _ = _repeated(load, key, table)
    if not repeated:
        return 0
    if load.request.stream.guards.duplicate_keys:
        found = Finding(
            guard=Guard.DUPLICATE_KEYS, stream=load.request.stream.name, amount=repeated
        )
        if not covered(found, load.request.approvals):
            sentence = (
                f"{named} is no key: {repeated:,} values repeat. Nothing was changed: approve, and "
                "one row of each is kept; or reject the run"
            )
            keys = _repeating(load, key, table)
            stop(Preview(found, sentence, keys), load.request.approvals)
    return _keep_last(load, key, table)


def _repeated(load: Load, key: Sequence[str], table: sql.Composable) -> tuple[int, int]:
    columns = sql.SQL(", ").join(map(sql.Identifier, key))
    missing = sql.SQL(" OR ").join(sql.SQL("{} IS NULL").format(sql.Identifier(k)) for k in key)
    row = load.conn.execute(
        sql.SQL(
            "SELECT (SELECT count(*) FROM (SELECT FROM {t} GROUP BY {k} "
            "HAVING count(*) > 1) AS d), "
            "(SELECT count(*) FROM {t} WHERE {m})"
        ).format(t=table, k=columns, m=missing)
    ).fetchone()
    return (int(row[0]), int(row[1])) if row else (0, 0)


def _repeating(load: Load, key: Sequence[str], table: sql.Composable) -> tuple[str, ...]:
    columns = sql.SQL(", ").join(map(sql.Identifier, key))
    rows = load.conn.execute(
        sql.SQL(
            "SELECT left(ROW({k})::text, {c}) FROM {t} GROUP BY {k} HAVING count(*) > 1 LIMIT {n}"
        ).format(c=sql.Literal(SAMPLE_CHARS), k=columns, t=table, n=sql.Literal(SAMPLE_KEYS))
    )
    return tuple(str(row[0]) for row in rows)


def _keep_last(load: Load, key: Sequence[str], table: sql.Composable) -> int:
    cursor = load.request.stream.cursor
    by_cursor = cursor is not None and any(c.name == cursor for c in load.columns)
    order: sql.Composable = sql.SQL("ctid DESC")
    if by_cursor:
        order = sql.SQL("{} DESC NULLS LAST, ctid DESC").format(sql.Identifier(cursor or ""))
    doomed = sql.SQL(
        "ctid IN (SELECT ctid FROM (SELECT ctid, row_number() OVER "
        "(PARTITION BY {k} ORDER BY {order}) AS place FROM {t}) AS numbered WHERE place > 1)"
    ).format(t=table, k=sql.SQL(", ").join(map(sql.Identifier, key)), order=order)
    return rejects.drop_repeated(load, table, doomed)


# ── types ────────────────────────────────────────────────────────────────────────────────────


def check_narrowed(load: Load, changes: Sequence[SchemaChange]) -> None:
    """Stop where columns hold less at the source than here, the first time that is so."""
    known = load.seen or {}
    narrowed = [
        c
        for c in changes
        if c.change is Change.NARROWED and known.get(c.column, (0, ""))[1] != c.after
    ]
    if not narrowed or not load.request.stream.guards.narrowed_type:
        return
    what = ", ".join(f"{c.column} {c.before} -> {c.after}" for c in narrowed)
    found = Finding(
        guard=Guard.NARROWED_TYPE, stream=load.request.stream.name, amount=len(narrowed), what=what
    )
    sentence = (
        f"{found.stream}: the source's types became narrower ({what}). Nothing was changed: "
        "approve, and the rows are loaded into the wider columns; or reject the run"
    )
    stop(Preview(found, sentence), load.request.approvals)
