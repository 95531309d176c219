"""Rows that the target refuses: the others are loaded, and those are kept with key and reason.

A stream with `rejected_max` is loaded as every other, as one set; it costs nothing. Only where a
row is refused the load is undone and the stream read once more in the same run, carefully: through
the staging table, from which `write` takes the rows in halves until the bad ones are alone. So
nothing relies on two reads of the source being alike. `settle` writes down what was refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import psycopg
from psycopg import sql

from connectors.postgres import refusals as pg_refusals
from connectors.postgres import waiting as pg_waiting
from connectors.postgres.batch import (
    GONE,
    KEYS,
    REFUSED,
    Load,
    as_it_came,
    copy_into,
    key_digest,
    key_text,
    make_refused,
    names,
    same,
    typed,
)
from connectors.postgres.link import beside_values
from connectors.postgres.refusals import (
    UNSETTLED,
    Care,
    Reason,
    Refusals,
    Refused,
    depends,
    is_of_a_row,
    may_wait,
    reason_of,
    unless_refused,
)
from schemas.records import LoadCounts

#: What a statement did: rows inserted and updated, say.
Done = tuple[int, int]
#: Does something with a set of staged rows, which it is given as a table expression.
Statement = Callable[[sql.Composable], Done]


def write(load: Load, statement: Statement) -> tuple[Done, int]:
    """Write all staged rows into the target; return what was done, and how many were refused.

    Without care that is one statement, and a row that is refused ends the load.
    """
    if load.refusals is None:
        return statement(load.staging), 0

    def checked(rows: sql.Composable) -> Done:
        done = statement(rows)
        load.conn.execute("SET CONSTRAINTS ALL IMMEDIATE")  # those of the commit, too
        return done

    search = _Search(load, load.refusals, checked, _suspects(load))
    return search.run(), search.note()


def _suspects(load: Load) -> list[str]:
    """Return the places of staged rows that the table has refused before."""
    key = [c for c in load.columns if c.name in {k.name for k in load.key}]
    if not key or len(key) < len(load.key):
        return []
    typed_key = sql.SQL(", ").join(
        sql.SQL("(r.key ->> {})::{} AS {}").format(
            sql.Literal(c.name), sql.SQL(c.type), sql.Identifier(c.name)
        )
        for c in key
    )
    query = sql.SQL("SELECT s.ctid::text FROM {} s JOIN ({}) t ON {} LIMIT {}").format(
        load.staging,
        pg_refusals.MARKED.format(beside_values(load.conn, typed_key)),
        beside_values(load.conn, same(load, [c.name for c in key])),
        sql.Literal(_SUSPECTS_MAX + 1),
    )
    rows = []
    with unless_refused(load.conn):  # the key was of another type then
        rows = load.conn.execute(query, pg_refusals.marked(load.request)).fetchall()
    return [] if len(rows) > _SUSPECTS_MAX else [row[0] for row in rows]


def prepare(load: Load, staged: int) -> int:
    """Get staged rows ready for `write`; return how many are left.

    Those whose text is no value of its column are taken out: they are no rows of the target's, and
    nothing may be compared with them. What was refused before and comes again is marked.
    """
    if load.refusals is None:
        return staged
    load.refusals.rows = load.batch.rows()  # known from now on
    load.refusals.check()
    if load.needs_reading or tuple(load.columns) != load.shape.columns:
        query = sql.SQL("SELECT count(ROW({})) FROM {} s")

        def read(rows: sql.Composable) -> Done:
            load.conn.execute(query.format(typed(load), rows))
            return 0, 0

        search = _Search(load, load.refusals, read)
        search.run()
        staged -= search.remove()
    if load.refusals.before and load.key:
        pg_refusals.fill(load.conn, load.refusals, REFUSED, load.key)
    load.refusals.left_out += load.refusals.before
    come = sql.SQL("r.digest IN (SELECT {} FROM {} s)").format(key_digest(load), load.staging)
    which = sql.SQL("true") if load.batch.full else come
    pg_refusals.mark(load.conn, load.refusals, which)
    return staged


def swept(load: Load, *, keys: bool, named: bool) -> None:
    """Mark rows that were refused before and are gone: all keys are here, or theirs are named."""
    if load.refusals is None:
        return
    # As a join: NOT IN would go through all keys for each row once they outgrow memory.
    gone = sql.SQL("r.readable AND {}EXISTS (SELECT FROM {} s WHERE {} = r.digest)")
    for wanted, without, table in ((keys, "NOT ", KEYS), (named, "", GONE)):
        if wanted:
            with unless_refused(load.conn):  # a key may be none here
                which = gone.format(sql.SQL(without), table, key_digest(load))
                pg_refusals.mark(load.conn, load.refusals, which)


def left_out(load: Load) -> int:
    """Return how many rows were refused before they were staged, or taken out again."""
    return 0 if load.refusals is None else load.refusals.left_out


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The staged rows of some blocks of the staging table."""

    first: int
    last: int  # the one after


@dataclass(frozen=True, slots=True)
class _Units:
    """Staged rows that stand in an order in which they can be taken (waiting.py)."""

    first: int
    last: int  # the one after


#: Sets that may wait for rows of other sets, at one time.
_WAITING_MAX = 500
#: So many tries rows that wait have in all. What was not settled then says so in its reason.
_AGAIN_MAX = 30_000
#: Parts into which a set of many blocks is cut.
_PARTS = 8
#: Rows that are suspected at most; more than these are found as if nothing were known.
_SUSPECTS_MAX = 1_000
#: Staged rows by their place, or all of some blocks.
_Piece = _Blocks | _Units | list[str]


class _Search:
    """Does something with all staged rows but those that are refused.

    Sets that are refused are cut into smaller ones, all of one size before any of the next, and a
    load of bad rows ends as soon as more sets are bad than rows may be. Where rows refer to others
    of the same table, the sets are cut in the order in which rows can be taken. What waited for
    another row is tried again at the end, until that changes nothing. `suspects` were refused
    before, and are done one by one.
    """

    def __init__(
        self,
        load: Load,
        refusals: Refusals,
        statement: Statement,
        suspects: Sequence[str] = (),
    ) -> None:
        self._load = load
        self._refusals = refusals
        self._statement = statement
        self._suspects = list(suspects)
        self._refused: dict[str, psycopg.Error] = {}
        self._unsettled: frozenset[str] = frozenset()
        self._done: Done = (0, 0)

    def run(self) -> Done:
        whole = _Blocks(0, self._blocks())
        sets: list[_Piece] = self._parts(whole) if self._refusals.met else [whole]
        sets += [[place] for place in self._suspects]
        if self._suspects or self._refusals.met:
            # Many small sets follow, of a table that was just read: its index serves them best.
            self._load.conn.execute("SET LOCAL random_page_cost = 1")
        self._cut(sets)
        self._settle()
        return self._done

    # ── first all rows, in ever smaller sets ─────────────────────────────────────────────────

    def _cut(self, sets: Sequence[_Piece]) -> None:
        """Cut the sets that are refused, all of one size before any of the next."""
        backwards = False  # by turns: whichever way rows depend on each other
        while sets:
            bad: list[list[_Piece]] = []
            errors = list(self._refused.values())
            todo = list(reversed(sets)) if backwards else sets
            for n, piece in enumerate(todo):
                error = self._try(piece)
                if error is None:
                    continue
                rule = self._order_of(error)
                if rule is not None:
                    self._cut_in_order([rule], [*chain.from_iterable(bad), *todo[n:]])
                    return
                if isinstance(piece, list) and len(piece) == 1:
                    self._refused[piece[0]] = error
                else:
                    bad.append(self._parts(piece))
                errors.append(error)
                self._check_room(errors)  # each of these sets has a bad row
            sets = [part for parts in (reversed(bad) if backwards else bad) for part in parts]
            backwards = not backwards

    def _order_of(self, error: psycopg.Error) -> pg_waiting.Rule | None:
        """Return by what the rows of the table refer to each other, if that is what is wrong."""
        return pg_waiting.rule_of(self._load, error) if pg_waiting.is_reference(error) else None

    def _cut_in_order(self, rules: list[pg_waiting.Rule], left: Sequence[_Piece]) -> None:
        """Go through what is left in the order of the references: who is needed is tried before.

        So a row that is refused here refers to one that is refused. Another constraint of the kind
        that shows up orders the rows anew.
        """
        places = sql.SQL(" UNION ALL ").join(
            self._rows(piece, sql.SQL("y.ctid AS place")) for piece in left
        )
        units = pg_waiting.ordered(self._load, rules, places)
        sets = list(reversed(self._parts(_Units(0, units))))
        while sets:
            piece = sets.pop()
            error = self._try(piece)
            if error is None:
                continue
            rule = self._order_of(error)
            if rule is not None and rule not in rules:
                self._cut_in_order([*rules, rule], [piece, *sets])
                return
            if isinstance(piece, list) and len(piece) == 1:
                self._refused[piece[0]] = error
                self._check_room(list(self._refused.values()))
            else:
                sets += reversed(self._parts(piece))

    def _check_room(self, errors: Sequence[psycopg.Error]) -> None:
        """Fail where so many sets are bad that it is too many rows, or too many wait at a time."""
        room, waiting = self._refusals.room, sum(map(depends, errors))
        if len(errors) - waiting > room or waiting > max(room, _WAITING_MAX):
            self._check_before()
            columns = [c.name for c in self._load.columns]
            self._refusals.too_many([reason_of(e, columns) for e in errors], errors[-1])

    def _check_before(self) -> None:
        """Fail as the server says if what was removed before the rows is to blame, not they."""
        self._load.conn.execute("SET CONSTRAINTS ALL IMMEDIATE")

    # ── then those that wait for another one ─────────────────────────────────────────────────

    def _settle(self) -> None:
        """Try the rows that may have waited once more, until that takes none of them."""
        tries = 0
        while waited := [place for place, e in self._refused.items() if may_wait(e)]:
            if tries > _AGAIN_MAX:
                self._unsettled = frozenset(waited)
                return
            before = len(self._refused)
            tries += self._again(waited)
            if len(self._refused) == before:
                return

    def _again(self, waited: list[str]) -> int:
        """Try rows in the order in which they need each other; return how many tries it took.

        First all of them at once: some are taken only together. Those that need what is nowhere are
        not tried: they stay refused, and for the reason that is known.
        """
        found = (pg_waiting.rule_of(self._load, self._refused[place]) for place in waited)
        rules = {rule for rule in found if rule is not None}
        units = pg_waiting.ordered(self._load, rules, _among(waited), but_lost=True)
        sets: list[_Piece] = [_Units(0, units)] if units else []
        tries = 0
        while sets:
            piece = sets.pop()
            places, error = self._places_of(piece), self._try(piece)
            tries += 1
            if error is None:
                for place in places:
                    del self._refused[place]
            elif len(places) == 1:
                self._refused[places[0]] = error
            elif isinstance(piece, _Units) and piece.last - piece.first > 1:
                sets += (_Units(n, n + 1) for n in reversed(range(piece.first, piece.last)))
            else:  # a ring
                sets += ([place] for place in reversed(places))
        return tries

    def _try(self, piece: _Piece) -> psycopg.Error | None:
        """Do it under a savepoint; return the error if one of the rows is to blame."""
        conn = self._load.conn
        try:
            with conn.transaction():
                inserted, updated = self._statement(self._rows(piece))
        except psycopg.Error as error:
            if not is_of_a_row(error):
                raise
            return error
        self._done = self._done[0] + inserted, self._done[1] + updated
        return None

    def _rows(self, piece: _Piece, columns: sql.Composable | None = None) -> sql.Composed:
        of = sql.SQL("{} y").format(self._load.staging)
        if isinstance(piece, _Units):
            of = sql.SQL(
                "{} JOIN (SELECT place FROM {} WHERE unit >= {} AND unit < {}) o "
                "ON o.place = y.ctid"
            ).format(of, pg_waiting.ORDERED, sql.Literal(piece.first), sql.Literal(piece.last))
            where: sql.Composable = sql.SQL("true")
        elif isinstance(piece, list):
            where = sql.SQL("y.ctid = ANY({}::tid[])").format(sql.Literal(piece))
        else:
            where = sql.SQL("y.ctid >= {}::tid AND y.ctid < {}::tid").format(
                sql.Literal(f"({piece.first},0)"), sql.Literal(f"({piece.last},0)")
            )
            if self._suspects:
                others = sql.SQL(" AND y.ctid <> ALL({}::tid[])")
                where += others.format(sql.Literal(self._suspects))
        return sql.SQL("(SELECT {} FROM {} WHERE {})").format(columns or sql.SQL("y.*"), of, where)

    def _blocks(self) -> int:
        table = sql.Literal(self._load.staging.as_string(self._load.conn))
        row = self._load.conn.execute(
            sql.SQL(
                "SELECT pg_relation_size({}::regclass) / current_setting('block_size')::int"
            ).format(table)
        ).fetchone()
        return int(row[0]) if row else 0

    def _parts(self, piece: _Piece) -> list[_Piece]:
        """Cut a set: a large one into many parts, as each round costs what its bad sets have."""
        if isinstance(piece, _Blocks) and piece.last - piece.first > 1:
            blocks = piece.last - piece.first
            step = max(1, -(-blocks // _PARTS))
            firsts = range(piece.first, piece.last, step)
            return [_Blocks(first, min(first + step, piece.last)) for first in firsts]
        if isinstance(piece, _Units) and piece.last - piece.first > 1:
            step = max(1, -(-(piece.last - piece.first) // _PARTS))
            firsts = range(piece.first, piece.last, step)
            return [_Units(first, min(first + step, piece.last)) for first in firsts]
        places = self._places_of(piece)
        if isinstance(piece, _Units):  # one row, or a ring of them
            return [[place] for place in places]
        middle = len(places) // 2
        return [half for half in (places[:middle], places[middle:]) if half]

    def _places_of(self, piece: _Piece) -> list[str]:
        if isinstance(piece, list):
            return piece
        rows = self._rows(piece, sql.SQL("y.ctid::text AS place"))
        found = self._load.conn.execute(sql.SQL("SELECT place FROM {} AS s").format(rows))
        return [place for (place,) in found]

    def note(self) -> int:
        """Note the rows that were refused, in our own words; return how many."""
        if not self._refused:
            return 0
        self._check_before()
        load = self._load
        key = key_text(load) if load.key else sql.SQL("NULL::jsonb")
        rows = load.conn.execute(
            sql.SQL("SELECT s.ctid::text, {}, {} FROM {} s WHERE {}").format(
                key_digest(load), key, load.staging, self._places()
            )
        ).fetchall()
        noted = [Refused(digest, key, self._reason(at), Care.SETS) for at, digest, key in rows]
        self._refusals.add(noted, next(iter(self._refused.values())))
        return len(noted)

    def remove(self) -> int:
        """Note the rows that could not be read and take them out; return how many."""
        if not self._refused:
            return 0
        noted = [self._unread(place) for place in self._refused]
        self._load.conn.execute(
            sql.SQL("DELETE FROM {} s WHERE {}").format(self._load.staging, self._places())
        )
        self._refusals.add(noted, next(iter(self._refused.values())))
        self._refusals.left_out += len(noted)
        return len(noted)

    def _unread(self, place: str) -> Refused:
        """Describe a staged row that is none of the target's by its key, if that can be read."""
        load, reason = self._load, self._reason(place)
        here = self._rows([place])
        if not load.key:
            image = sql.SQL("SELECT sha256(convert_to(s::text, 'UTF8')) FROM {} s").format(here)
            return Refused(_one(load, image)[0], None, reason, Care.SETS)
        columns = names(load.key)
        known: tuple[Any, ...] = ()
        with unless_refused(load.conn):
            load.conn.execute(
                sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {} s").format(
                    REFUSED, columns, columns, here
                )
            )
            found = sql.SQL("SELECT {}, {} FROM {} s")
            known = _one(load, found.format(key_digest(load), key_text(load), here))
        if known:
            return Refused(known[0], known[1], reason, Care.SETS)
        key = _one(load, sql.SQL("SELECT {} FROM {} s").format(as_it_came(load), here))[0]
        return Refused(pg_refusals.digest_of(key), key, reason, Care.SETS, readable=False)

    def _reason(self, place: str) -> Reason:
        reason = reason_of(self._refused[place], [c.name for c in self._load.columns])
        return (
            replace(reason, words=reason.words + UNSETTLED) if place in self._unsettled else reason
        )

    def _places(self) -> sql.Composed:
        return sql.SQL("s.ctid = ANY({}::tid[])").format(sql.Literal(list(self._refused)))


def _among(places: list[str]) -> sql.Composed:
    return sql.SQL("SELECT unnest({}::tid[]) AS place").format(sql.Literal(places))


def _one(load: Load, query: sql.Composed) -> tuple[Any, ...]:
    row = load.conn.execute(query).fetchone()
    if row is None:
        raise RuntimeError("a staged row is not there any more")
    return row


def keep_range(load: Load, table: sql.Identifier) -> tuple[int, int, int]:
    """Copy a range into its table; return (rows, bytes, rows refused), which are written down."""
    if load.refusals is None:
        return (*copy_into(load, table), 0)
    make_refused(load)
    before = load.refusals.count
    rows, size = copy_into(load, table)
    pg_refusals.keep(load.conn, load.refusals, of_range=True)
    return rows, size, load.refusals.count - before


# ── rows that repeat a key ───────────────────────────────────────────────────────────────────


def drop_repeated(load: Load, table: sql.Composable, doomed: sql.Composable) -> int:
    """Delete rows that repeat a key and keep what they were in the table of refused ones."""
    row = load.conn.execute(
        sql.SQL(pg_refusals.KEEP_REPEATED).format(
            table=beside_values(load.conn, table),
            doomed=beside_values(load.conn, doomed),
            digest=beside_values(load.conn, key_digest(load, "d.")),
            key=beside_values(load.conn, key_text(load, "d.")),
            again=sql.SQL(pg_refusals.AGAIN),
        ),
        pg_refusals.repeated(load.request),
    ).fetchone()
    return int(row[0]) if row else 0


def drop_keyless(load: Load, key: Sequence[str], rows: int) -> None:
    """Take the staged rows out that have NULL in their key: no row here can be theirs."""
    refusals = load.refusals
    if refusals is None or rows > refusals.room:
        raise pg_refusals.over(
            load.request.stream.name, load.request.stream.rejected_max, [_KEYLESS]
        )
    missing = sql.SQL(" OR ").join(sql.SQL("s.{} IS NULL").format(sql.Identifier(k)) for k in key)
    found = load.conn.execute(
        sql.SQL(
            "WITH gone AS (DELETE FROM {} s WHERE {} RETURNING {} AS digest, {} AS key) "
            "SELECT digest, min(key::text)::jsonb, count(*) FROM gone GROUP BY digest"
        ).format(load.staging, missing, key_digest(load), key_text(load))
    ).fetchall()
    noted = [Refused(digest, key, _KEYLESS, Care.SETS, rows=n) for digest, key, n in found]
    refusals.add(noted, None)
    refusals.left_out += rows


_KEYLESS = Reason("23502", "its key may not be NULL")


# ── the end of a load ────────────────────────────────────────────────────────────────────────


def settle(load: Load, counts: LoadCounts) -> LoadCounts:
    """Write down what was refused, and forget what is taken now; return the counts with both."""
    refusals, request = load.refusals, load.request
    rejected = counts.rejected
    if refusals is not None:
        pg_refusals.keep(load.conn, refusals)
        pg_refusals.forget_marked(load.conn, refusals)
        rejected += refusals.count
    if not rejected:
        return counts
    sample = pg_refusals.sample(load.conn, request)
    return replace(counts, rejected=rejected, refused=sample)
