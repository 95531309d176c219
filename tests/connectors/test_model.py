"""Random tables, changes, drift and crashes between two real databases, against `model.py`.

Hypothesis writes a story: a table with a stream over it, then rounds of changes of its rows and
columns, each with a run, that is killed here and there. After each run the target must be what the
model says, to the last character. A failing story is printed as its table and its rounds.
"""

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from time import sleep
from typing import Any, NoReturn
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from scheduler import ticks
from schemas.errors import TransientError
from schemas.runs import Run, RunState
from storage import runs
from tests.connectors.model import (
    NARROWER,
    VALUES,
    WIDER,
    Columns,
    Found,
    Model,
    Refused,
    Seen,
    Stopped,
    Stream,
    values_of,
)
from tests.faults.crash_points import POINTS, arm
from tests.world import OPERATOR, World

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

#: Column names, plain and not.
NAMES = ("v", "w", 'odd "name"; --', "select")
KEYS = {"one": ("id",), "two": ("id", "part"), "none": ()}
PARTS = ("a", "", "A ", "\t'\\")

#: Where a run may die: on its way, before its rows are committed at the destination and after. A
#: session that was just opened would stay so here: a process that is gone takes it along.
ON_THE_WAY = [
    p for p in POINTS
    if p.act == "execute" and p.nth == 1 and ":record_stream" not in p.function
    and "connectors.registry:" not in p.function
]  # fmt: skip
_LOADED = next(i for i, p in enumerate(ON_THE_WAY) if p.means == "committed at the destination")
DEATHS = {str(p): p for p in ON_THE_WAY}
COMMITTED = {str(p) for p in ON_THE_WAY[_LOADED:]}
#: The destination has committed, and the worker does not hear it.
UNHEARD = "answer to the commit is lost"


class Died(BaseException):
    """A process that is gone: nothing of it goes on, and no broad except may keep it."""


def _die() -> NoReturn:
    raise Died


def _lose_answer() -> NoReturn:
    raise TransientError("the connection was lost", code="connection_lost")


@contextmanager
def ending(how: str | None) -> Iterator[None]:
    """Make the run that is executed inside die at a point; what was patched is put back."""
    if how is None:
        yield
        return
    point = DEATHS[how] if how != UNHEARD else ON_THE_WAY[_LOADED]
    module, _, path = point.function.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for attribute in outer:
        owner = getattr(owner, attribute)
    original = getattr(owner, name)
    arm(point, _lose_answer if how == UNHEARD else _die)
    try:
        yield
    finally:
        setattr(owner, name, original)


# ── how a story may go ───────────────────────────────────────────────────────────────────────────

#: Mode and cursor of a story's stream; each is told as often.
KINDS = (
    ("merge", None), ("merge", "xmin"), ("merge", "at"),
    ("replace", None), ("append", "xmin"), ("append", "at"),
)  # fmt: skip
HISTORIES = (("history", None), ("history", "xmin"), ("history", "at"))


@st.composite
def _streams(draw: st.DrawFn, kind: tuple[str, str | None], keyed: tuple[str, ...]) -> Stream:
    """A stream of this kind that the documents allow over a table with such a key."""
    mode, cursor = kind
    allowed = ["hard", "soft", "ignore"] if keyed else ["hard"]
    if mode == "history":
        allowed = ["soft", "ignore"]
    deletes = None if mode == "append" else draw(st.sampled_from(allowed))
    finds = deletes in {"soft", "hard"}
    often = st.sampled_from([None, 1, 2, 3])
    return Stream(
        mode=mode,
        key=() if mode == "append" else keyed,
        cursor=cursor,
        deletes=deletes,
        tombstone="gone" if finds and draw(st.booleans()) else None,
        key_sweep=draw(often) if finds and mode in {"merge", "history"} and cursor else None,
        full_every=draw(often) if cursor else None,
        drift=draw(st.sampled_from(["evolve", "evolve", "evolve", "freeze", "ignore"])),
        ratio=draw(st.sampled_from([1.0, 0.3])),
        floor=draw(st.sampled_from([100, 2])),
    )


#: A method of Story and what it is given.
Act = tuple[str, dict[str, Any]]

_IDS, _PICKS, _WHICH = st.integers(1, 6), st.integers(0, 8), st.integers(0, 3)
#: What a database takes for a character.
_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=4)


def _act(act: str, /, **values: st.SearchStrategy[Any]) -> st.SearchStrategy[Act]:
    """Make a call of a method of Story."""
    return st.fixed_dictionaries(values).map(lambda given: (act, given))


_CHANGE = st.one_of(
    _act("insert", number=_IDS, pick=_PICKS),
    _act("update", number=_IDS, which=_WHICH, pick=_PICKS, text=_TEXT),
    _act("move_key", number=_IDS, to=_IDS),
    _act("delete", numbers=st.sets(_IDS, min_size=1, max_size=6)),
    _act("bury", number=_IDS, gone=st.booleans()),
    _act("add_column", name=st.sampled_from(NAMES), type_=st.sampled_from(list(VALUES)),
         pick=_PICKS),
    _act("drop_column", which=_WHICH),
    _act("widen", which=_WHICH),
    _act("narrow", which=_WHICH),
    _act("hold", writes=st.booleans()),
    _act("release", commits=st.booleans()),
)  # fmt: skip
_SYNC = _act("sync", approve=st.booleans(), refresh=st.sampled_from([False, False, False, True]))
_CRASH = _act(
    "crash",
    where=st.sampled_from([UNHEARD, *DEATHS]),
    approve=st.booleans(),
    between=st.sampled_from(["", "insert", "delete"]),
    number=_IDS,
)
_RUN = st.one_of(_SYNC, _SYNC, _CRASH)
_ROUNDS = st.lists(st.tuples(st.lists(_CHANGE, max_size=4), _RUN), min_size=2, max_size=4)


@st.composite
def _tables(draw: st.DrawFn, kind: tuple[str, str | None]) -> tuple[str, dict[str, str], Stream]:
    key = draw(
        st.sampled_from([k for k in KEYS if k != "none" or kind[0] not in {"merge", "history"}])
    )
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    columns = {name: draw(st.sampled_from(list(VALUES))) for name in names}
    return key, columns, draw(_streams(kind, KEYS[key]))


class Story:
    """One table and its stream in a world that many stories share."""

    def __init__(self, world: World, table: str) -> None:
        self.world = world
        self.table = table
        self.here = self.world.pair.session("source")
        self.held: psycopg.Connection | None = None
        self.held_since: Any = None
        self.model = Model(Stream("replace"))
        self.key: tuple[str, ...] = ()

    def forget(self) -> None:
        if self.held is not None:
            self.held.close()
        self.world.control.act("DELETE FROM leases")
        self.world.pair.session("destination").execute(
            sql.SQL("DROP TABLE IF EXISTS acme.{}").format(sql.Identifier(self.table))
        )
        self._source("DROP TABLE IF EXISTS {t}")

    def _source(self, statement: str, *values: object, **names: str) -> int:
        """Execute a statement at the source; {t} is the table, other braces are names."""
        parts = {"t": self.table, **names}
        made = sql.SQL(statement).format(
            **{k: sql.Identifier(*(("public", v) if k == "t" else (v,))) for k, v in parts.items()}
        )
        return self.here.execute(made, values).rowcount

    def _types(self) -> Columns:
        rows = self.here.execute(
            "SELECT attname, format_type(atttypid, atttypmod), attnum FROM pg_attribute "
            "WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped",
            (f"public.{self.table}",),
        ).fetchall()
        return Columns({r[0]: r[1] for r in rows}, {r[0]: r[2] for r in rows})

    def _free(self) -> list[str]:
        """Name the columns that a story may change."""
        return [n for n in self._types().types if n in NAMES]

    # ── the table and its rows ───────────────────────────────────────────────────────────────

    def begin(self, made: tuple[str, dict[str, str], Stream], rows: list[int]) -> None:
        key, columns, stream = made
        self.key = KEYS[key]
        self._source("CREATE TABLE {t} (id integer NOT NULL, part text NOT NULL, "
                     "at timestamptz NOT NULL DEFAULT clock_timestamp())")  # fmt: skip
        if stream.tombstone:
            self._source("ALTER TABLE {t} ADD COLUMN gone boolean")
        if self.key:
            quoted = ", ".join(self.key)
            self._source(f"ALTER TABLE {{t}} ADD PRIMARY KEY ({quoted})")
        for name, type_ in columns.items():
            self._source(f"ALTER TABLE {{t}} ADD COLUMN {{c}} {type_}", c=name)
        self.world.pair.source()
        for number, pick in enumerate(rows, 1):
            self.insert(number=number, pick=pick)
        self.model = Model(stream)
        self.world.apply({f"public.{self.table}": stream.yaml()})

    def insert(self, *, number: int, pick: int) -> None:
        types = self._types().types
        said: dict[str, str | None] = {"id": str(number), "part": PARTS[pick % len(PARTS)]}
        for name in self._free():
            values = values_of(types[name])
            said[name] = values[pick % len(values)]
        names = [*said]
        columns = ", ".join(f"{{c{i}}}" for i in range(len(names)))
        marks = ", ".join(f"%s::{types[name]}" for name in names)
        self._source(
            f"INSERT INTO {{t}} ({columns}) VALUES ({marks}) ON CONFLICT DO NOTHING",
            *said.values(),
            **{f"c{i}": name for i, name in enumerate(names)},
        )

    def update(self, *, number: int, which: int, pick: int, text: str) -> None:
        free = self._free()
        if not free:
            return
        name = free[which % len(free)]
        type_ = self._types().types[name]
        value = text if type_ == "text" and text else values_of(type_)[pick % len(values_of(type_))]
        self._source(
            f"UPDATE {{t}} SET {{c}} = %s::{type_}, at = clock_timestamp() WHERE id = %s",
            value, number, c=name,
        )  # fmt: skip

    def move_key(self, *, number: int, to: int) -> None:
        try:
            self._source("UPDATE {t} SET id = %s, at = clock_timestamp() WHERE id = %s", to, number)
        except psycopg.errors.UniqueViolation:
            return

    def delete(self, *, numbers: set[int]) -> None:
        self._source("DELETE FROM {t} WHERE id = ANY(%s)", sorted(numbers))

    def bury(self, *, number: int, gone: bool) -> None:
        if not self.model.stream.tombstone:
            return
        self._source("UPDATE {t} SET gone = %s, at = clock_timestamp() WHERE id = %s", gone, number)

    # ── drift ────────────────────────────────────────────────────────────────────────────────

    def add_column(self, *, name: str, type_: str, pick: int) -> None:
        if self.held is not None:
            return
        if name in self._types().types:
            return
        type_ = self.model.types.get(name, type_)  # another type is refused: see test_drift.py
        default = sql.Literal(values_of(type_)[pick % len(values_of(type_))])
        told = default.as_string(self.here).replace("{", "{{").replace("}", "}}")
        self._source(f"ALTER TABLE {{t}} ADD COLUMN {{c}} {type_} DEFAULT {told}::{type_}", c=name)

    def drop_column(self, *, which: int) -> None:
        if self.held is not None:
            return
        free = self._free()
        if free:
            self._source("ALTER TABLE {t} DROP COLUMN {c}", c=free[which % len(free)])

    def widen(self, *, which: int) -> None:
        if self.held is not None or self.model.stream.drift == "ignore":
            return
        self._retype(WIDER, which)

    def narrow(self, *, which: int) -> None:
        if self.held is not None or self.model.stream.drift != "evolve":
            return
        self._retype(NARROWER, which)

    def _retype(self, to: dict[str, str], which: int) -> None:
        types = self._types().types
        free = [name for name in self._free() if types[name] in to]
        if not free:
            return
        name = free[which % len(free)]
        try:
            self._source(
                f"ALTER TABLE {{t}} ALTER COLUMN {{c}} DROP DEFAULT, "
                f"ALTER COLUMN {{c}} TYPE {to[types[name]]}",
                c=name,
            )
        except psycopg.DataError:
            return  # a value that does not fit

    # ── somebody else's transaction ──────────────────────────────────────────────────────────

    def hold(self, *, writes: bool) -> None:
        """Open a transaction that stays open across runs, and write in it now or at its end."""
        if self.held is not None:
            return
        sleep(0.12)
        self.held = self.world.pair.connect("source", autocommit=False)
        (since,) = self.held.execute("SELECT clock_timestamp()").fetchall()[0]
        self.held_since = {"at": since, "xmin": None}
        if writes:
            self._write_held()

    def _write_held(self) -> None:
        assert self.held is not None
        made = sql.SQL("INSERT INTO public.{} (id, part) SELECT coalesce(max(id), 0) + 100, 'held' "
                       "FROM public.{}").format(*[sql.Identifier(self.table)] * 2)  # fmt: skip
        self.held.execute(made)
        (xid,) = self.held.execute("SELECT pg_current_xact_id()::text::bigint").fetchall()[0]
        self.held_since["xmin"] = xid

    def release(self, *, commits: bool) -> None:
        if self.held is None:
            return
        if commits:
            if self.held_since["xmin"] is None:
                self._write_held()
            self.held.commit()
        self.held.close()
        self.held = self.held_since = None

    # ── runs ─────────────────────────────────────────────────────────────────────────────────

    def sync(self, *, approve: bool, refresh: bool) -> None:
        seen = self._seen()
        run, _ = self.world.sync(full_refresh=refresh)
        self._expect(run, seen, approve=approve, refresh=refresh)

    def crash(self, *, where: str, approve: bool, between: str, number: int) -> None:
        """A worker dies, rows change, and another worker goes on."""
        before = self._seen()
        asked = self.world.enqueue()
        died = False
        try:
            with ending(where):
                self.world.step()
        except Died:
            died = True
        run = self.world.run(asked.run_id)
        if not died and run.state is not RunState.QUEUED:  # it did not come so far
            self._expect(run, before, approve=approve)
            return
        if between == "insert":
            self.insert(number=number, pick=number)
        elif between == "delete":
            self.delete(numbers={number})
        late = where == UNHEARD or where in COMMITTED
        seen = before if late and self._committed(asked.run_id) else self._seen()
        self._recover()
        self._expect(self.world.run(asked.run_id), seen, approve=approve)

    def _committed(self, run_id: UUID) -> bool:
        """Whether the destination has the rows of a run; where a guard stopped it, it has not."""
        query = sql.SQL("SELECT FROM _syncward.state WHERE run_id = {}").format(str(run_id))
        return self.world.pair.rows("destination", query) != []

    def _recover(self) -> None:
        """Let time pass: leases end, what was told to wait has waited."""
        world = self.world
        for _ in range(3):
            if world.control.all("SELECT FROM active_runs") == []:
                return
            world.expire_leases()
            world.control.act(
                "UPDATE active_runs SET not_before = now() - interval '1 s', "
                "dispatch_deadline = dispatch_deadline - interval '1 min'"
            )
            ticks.reap_tick(world.scheduler)
            world.step()

    def _seen(self) -> Seen:
        """Look at the source as the next run will, after a pause that time cursors need."""
        if self.model.stream.cursor == "at":
            sleep(0.12)
        columns, tombstone = self._types(), self.model.stream.tombstone
        names = list(columns.types)
        texts = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(n)) for n in names)
        dead = sql.SQL("{} IS TRUE").format(sql.Identifier(tombstone)) if tombstone else sql.SQL(
            "false")  # fmt: skip
        found = self.here.execute(
            sql.SQL("SELECT xmin::text::bigint, at, {}, {} FROM public.{}").format(
                dead, texts, sql.Identifier(self.table)
            )
        ).fetchall()
        place = 0 if self.model.stream.cursor == "xmin" else 1
        rows = [Found(dict(zip(names, row[3:], strict=True)), row[place], row[2]) for row in found]
        return Seen(columns, rows, self._upper())

    def _upper(self) -> Any:
        cursor = self.model.stream.cursor
        if cursor is None:
            return None
        (now,) = self.here.execute(
            "SELECT clock_timestamp()" if cursor == "at"
            else "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
        ).fetchall()  # fmt: skip
        held = self.held_since and self.held_since[cursor]
        return now[0] if held is None else held

    def _expect(self, run: Run, seen: Seen, *, approve: bool, refresh: bool = False) -> None:
        """Compare how the run ended, and the target, with what the model says; decide if asked."""
        approved: frozenset[str] = frozenset()
        while True:
            stops: frozenset[str] = frozenset()
            after = self.model
            try:
                after = self.model.run(seen, refresh=refresh, approved=approved)
            except Refused:
                assert (run.state, run.error_code) == (RunState.FAILED, "streams"), run.error
                break
            except Stopped as stop:
                stops = frozenset(stop.args[0])
            if stops:
                assert run.state is RunState.AWAITING_APPROVAL, f"{run.error}; {stops}"
                assert run.error_code in stops, run.error
                self._compare()
                with self.world.cli.inside() as (tx, _, _name):
                    decide = runs.approve if approve else runs.reject
                    decide(tx, run.run_id, OPERATOR)
                if not approve:
                    break
                approved |= {str(run.error_code)}
                self.world.step()
                run = self.world.run(run.run_id)
                continue
            assert run.state is RunState.SUCCEEDED, f"{run.state} {run.error_code} {run.error}"
            self.model = after
            break
        self._compare()

    def _compare(self) -> None:
        model = self.model
        if model.known is None:
            return
        there = self.world.pair.session("destination")
        types: dict[str, str] = dict(
            there.execute(
                "SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute "
                "WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped "
                "AND attname NOT LIKE '\\_syncward%%'",
                (f"acme.{self.table}",),
            ).fetchall()
        )
        assert types == model.types
        names = model.compared
        stamp = "_syncward_deleted_at" if model.stream.deletion == "soft" else None
        if model.stream.mode == "history":
            stamp = "_syncward_valid_to"
            self._check_versions(there)
        found = there.execute(
            sql.SQL("SELECT {}, {} FROM acme.{}").format(
                sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(n)) for n in names),
                sql.SQL(f"{stamp} IS NOT NULL" if stamp else "false"),
                sql.Identifier(self.table),
            )
        ).fetchall()
        rows = Counter((*zip(names, row[:-1], strict=True), row[-1]) for row in found)
        wanted = model.content()
        assert rows == wanted, (
            f"{model.stream.yaml()}: missing {wanted - rows}, too many {rows - wanted}"
        )

    def _check_versions(self, there: psycopg.Connection) -> None:
        """No two versions of a key overlap, and each begins before it ends."""
        wrong = there.execute(
            sql.SQL(
                "SELECT * FROM (SELECT {key}, _syncward_valid_from AS f, _syncward_valid_to AS t, "
                "lead(_syncward_valid_from) OVER (PARTITION BY {key} ORDER BY _syncward_valid_from)"
                " AS n FROM acme.{table}) AS v WHERE f >= t OR n < coalesce(t, 'infinity')"
            ).format(
                key=sql.SQL(", ").join(map(sql.Identifier, self.key)),
                table=sql.Identifier(self.table),
            )
        ).fetchall()
        assert wrong == []


# ── telling them ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def quiet(world: World, admin: psycopg.Connection) -> Iterator[World]:
    """A world without autovacuum, whose transactions would hold cursors back now and then."""
    admin.execute("ALTER SYSTEM SET autovacuum = off")
    admin.execute("SELECT pg_reload_conf()")
    for role in ("source", "destination"):
        world.pair.session(role).execute("SET TimeZone = 'UTC'")
    yield world
    admin.execute("ALTER SYSTEM RESET autovacuum")
    admin.execute("SELECT pg_reload_conf()")


def _tell(world: World, kind: tuple[str, str | None], examples: int) -> None:
    numbers = count()

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(made=_tables(kind), rows=st.lists(_PICKS, max_size=6), rounds=_ROUNDS)
    def tell(
        made: tuple[str, dict[str, str], Stream],
        rows: list[int],
        rounds: list[tuple[list[Act], Act]],
    ) -> None:
        story = Story(world, f"t{next(numbers)}")
        try:
            story.begin(made, rows)
            for changes, run in rounds:
                for name, values in [*changes, run]:
                    getattr(story, name)(**values)
        finally:
            story.forget()

    tell()


@pytest.mark.parametrize("kind", KINDS)
def test_after_each_run_the_destination_is_what_the_page_of_connectors_says(quiet, kind):
    _tell(quiet, kind, examples=5)


def test_after_each_run_a_history_holds_every_version_that_a_run_saw(quiet):
    _tell(quiet, ("history", "xmin"), examples=3)


@pytest.mark.full
@pytest.mark.parametrize("kind", [*KINDS, *HISTORIES])
def test_after_each_run_of_many_stories_the_destination_is_what_the_page_says(quiet, kind):
    _tell(quiet, kind, examples=34)
