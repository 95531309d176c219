"""What a stream's target must hold after each run, worked out in Python from docs/streams.md.

Start at `Model.run`. Nothing here looks at the program: a difference is a mistake there, or here,
or a sentence that the page lacks. Rows are told apart by their text, exact for every type here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

#: The types a column may have, and values of them, the plainest first.
VALUES: Mapping[str, Sequence[str | None]] = {
    "integer": ("1", "0", "-2147483648", None),
    "bigint": ("1", "7", "-3", None),
    "numeric(10,2)": ("1.00", "-0.50", "12345678.90", None),
    "numeric": ("1", "1.0", "1.00", "NaN", "-0.000001", None),
    "double precision": ("1", "-0", "NaN", "Infinity", "0.1", None),
    "text": ("a", "", " ", "\\N", "\t\n\r\\", "'\"%s{}$1", "é", "e\u0301", "🙂\u202e", None),
    "character varying(10)": ("a", "", "a ", "\\.", None),
    "boolean": ("true", "false", None),
    "timestamp with time zone": (
        "2020-02-29 12:00+00", "infinity", "0044-03-15 00:00+00 BC",
        "2021-01-01 00:00:00.000001+05", None,
    ),
    "date": ("2020-01-01", "-infinity", "0001-01-01 BC", None),
    "jsonb": ("{}", "null", '{"b": [1, 1.0], "a": "\\u00e9"}', None),
    "json": ('{"b":1, "a":2, "a":3}', "null", None),
    "bytea": ("\\x", "\\x00ff", None),
    "uuid": ("00000000-0000-0000-0000-000000000001", None),
    "integer[]": ("{1}", "{}", "{NULL,2}", "[0:1]={1,2}", "{{1,2},{3,4}}", None),
    "text[]": ("{a}", '{"",NULL,"NULL","a,b"}', None),
}  # fmt: skip
#: To which wider type a column may be changed without a change of its values.
WIDER = {
    "integer": "bigint",
    "numeric(10,2)": "numeric(14,2)",
    "numeric(14,2)": "numeric",
    "character varying(10)": "character varying(20)",
    "character varying(20)": "text",
}
#: And to which narrower one, where the values allow it.
NARROWER = {"bigint": "integer", "numeric": "numeric(10,2)", "text": "character varying(10)"}

Values = dict[str, str | None]


def values_of(type_: str) -> Sequence[str | None]:
    """Return values of a type, also of one that a column was changed to."""
    base = {"character varying(20)": "character varying(10)", "numeric(14,2)": "numeric(10,2)"}
    return VALUES[base.get(type_, type_)]


@dataclass(frozen=True)
class Found:
    """One row at the source: its values, and where it stands for each kind of cursor."""

    values: Values
    position: Any = None
    dead: bool = False


@dataclass(frozen=True)
class Columns:
    """The source's columns: their types, and a number that another column of that name lacks."""

    types: dict[str, str]
    numbers: dict[str, int]


@dataclass(frozen=True)
class Seen:
    """The source as a run finds it; `upper` is where its window ends (None: it has no cursor)."""

    columns: Columns
    rows: Sequence[Found]
    upper: Any = None


@dataclass(frozen=True)
class Stream:
    """What a test says of a stream. The key is () for a table that has none."""

    mode: str
    key: tuple[str, ...] = ()
    cursor: str | None = None
    deletes: str | None = None
    tombstone: str | None = None
    key_sweep: int | None = None
    full_every: int | None = None
    drift: str = "evolve"
    ratio: float = 0.2
    floor: int = 100

    @property
    def deletion(self) -> str:
        return self.deletes or ("hard" if self.mode == "replace" else "ignore")

    def yaml(self) -> str:
        """Write it as a document has it."""
        said = {
            "mode": self.mode, "cursor": self.cursor, "deletes": self.deletes,
            "tombstone": self.tombstone, "key_sweep": self.key_sweep,
            "full_every": self.full_every, "drift": self.drift,
        }  # fmt: skip
        if self.mode in {"merge", "history"}:
            said["key"] = f"[{', '.join(self.key)}]"
        said["guards"] = f"{{delete_ratio: {self.ratio}, floor: {self.floor}}}"
        return "{" + ", ".join(f"{k}: {v}" for k, v in said.items() if v is not None) + "}"


@dataclass(frozen=True)
class Row:
    """A row of the target; `stamped` says that it is shown as deleted."""

    values: Values
    stamped: bool = False


class Refused(Exception):  # noqa: N818 - an answer more than an error
    """The stream fails, and the target stays as it was."""


class Stopped(Exception):  # noqa: N818 - an answer more than an error
    """Guards stop the stream, and the target stays as it was; `args[0]` is their names."""


@dataclass(frozen=True)
class Model:
    """The target and what is remembered of the stream. A run makes another one."""

    stream: Stream
    rows: tuple[Row, ...] = ()
    #: of a history, whose `rows` are the current versions: those that have ended
    ended: tuple[Values, ...] = ()
    types: dict[str, str] = field(default_factory=dict)
    known: Columns | None = None  # of the source, when it was loaded last
    lower: Any = None
    since_full: int = 0
    since_sweep: int = 0
    #: columns in which rows that are equal otherwise may differ, as it is open which of them stay
    loose: frozenset[str] = frozenset()

    def run(
        self, seen: Seen, *, refresh: bool = False, approved: frozenset[str] = frozenset()
    ) -> "Model":
        """Return what is there after one more run; Refused or Stopped if it changes nothing."""
        stream, loaded = self.stream, self.known is not None
        full = self._reads_all(seen, refresh=refresh)
        sweeps = self._sweeps(full=full)
        after = self._with_columns(seen.columns)
        stops = self._narrowed(seen.columns)
        read = [
            row for row in seen.rows
            if stream.cursor is None
            or (row.position < seen.upper and (full or row.position >= self.lower))
        ]  # fmt: skip
        taken = [
            replace(r, values={n: v for n, v in r.values.items() if n in after.types}) for r in read
        ]
        if stream.mode == "append":
            after, gone = after._appended(taken, rewrite=full)
        elif not stream.key:
            after, gone = after._replaced(taken)
        else:
            alive = None
            if full and stream.cursor is None:
                alive = {self._key(r) for r in read if not r.dead}
            elif sweeps:
                alive = {self._key(r) for r in seen.rows if not r.dead}
            follow = after._versioned if stream.mode == "history" else after._merged
            after, gone = follow(taken, alive)
        if loaded:
            counted = len(seen.rows if sweeps and stream.cursor else read)
            if sweeps and stream.cursor:  # its keys are of rows that do not say they are deleted
                counted = sum(not row.dead for row in seen.rows)
            stops |= self._losses(counted if full or sweeps else None, gone)
        if "zero_rows" in approved:
            stops -= {"delete_ratio"}
        if stops - approved:
            raise Stopped(stops - approved)
        return replace(
            after,
            known=seen.columns,
            lower=seen.upper,
            since_full=0 if full else self.since_full + 1,
            since_sweep=0 if full or sweeps else self.since_sweep + 1,
        )

    # ── what is read ─────────────────────────────────────────────────────────────────────────

    def _reads_all(self, seen: Seen, *, refresh: bool) -> bool:
        """Without a cursor always; by request, by `full_every`, and where drift asks for it."""
        stream = self.stream
        if self.known is None or stream.cursor is None or refresh:
            return True
        if stream.full_every and self.since_full + 1 >= stream.full_every:
            return True
        return stream.mode in {"merge", "history"} and self._differs(seen.columns)

    def _differs(self, columns: Columns) -> bool:
        """Say whether older rows may differ where no cursor shows it: any change of the table.

        Where the stream ignores or freezes it, only another column under a name of the target.
        """
        known = self.known
        assert known is not None
        if self.stream.drift == "evolve" and [*known.types.items()] != [*columns.types.items()]:
            return True
        return any(
            name in self.types and known.numbers.get(name) != number
            for name, number in columns.numbers.items()
        )

    def _sweeps(self, *, full: bool) -> bool:
        """Say whether the keys of all rows are compared."""
        stream = self.stream
        if self.known is None or stream.deletion == "ignore":
            return False
        due = stream.key_sweep is not None and self.since_sweep + 1 >= stream.key_sweep
        return full or due

    # ── drift ────────────────────────────────────────────────────────────────────────────────

    def _with_columns(self, columns: Columns) -> "Model":
        if self.known is None:
            return replace(self, types=dict(columns.types))
        new = {n: t for n, t in columns.types.items() if n not in self.types}
        gone = set(self.known.types) - set(columns.types)
        wider = {
            n: t for n, t in columns.types.items()
            if n in self.types and t != self.types[n] and not self._is_narrower(n, t)
        }  # fmt: skip
        if self.stream.drift == "freeze" and (new or gone or wider):
            raise Refused
        if self.stream.drift != "evolve":
            return self
        rows = tuple(replace(r, values={**r.values, **dict.fromkeys(new)}) for r in self.rows)
        ended = tuple({**values, **dict.fromkeys(new)} for values in self.ended)
        return replace(self, rows=rows, ended=ended, types={**self.types, **new, **wider})

    def _is_narrower(self, name: str, type_: str) -> bool:
        """Say whether the target's column holds all that the source's can."""
        here: str | None = type_
        while here is not None:
            here = WIDER.get(here)
            if here is not None and here == self.types.get(name):
                return True
        return NARROWER.get(self.types.get(name, "")) == type_

    def _narrowed(self, columns: Columns) -> set[str]:
        """Ask where a column begins to hold less; what was loaded once is known."""
        if self.known is None:
            return set()
        begins = any(
            type_ != self.known.types.get(name) and self._is_narrower(name, type_)
            for name, type_ in columns.types.items()
            if name in self.types
        )
        return {"narrowed_type"} if begins else set()

    # ── rows ─────────────────────────────────────────────────────────────────────────────────

    def _key(self, row: Row | Found) -> tuple[str | None, ...]:
        return tuple(row.values[name] for name in self.stream.key)

    def _appended(self, read: Sequence[Found], *, rewrite: bool) -> tuple["Model", int]:
        """Add rows as they are; a full read rewrites the table."""
        if rewrite:
            return self._replaced(read)
        empty = dict.fromkeys(self.types)
        rows = (*self.rows, *(Row({**empty, **row.values}) for row in read))
        return replace(self, rows=rows), 0

    def _replaced(self, read: Sequence[Found]) -> tuple["Model", int]:
        """Make the content that of the source, without a key to say which row is which."""
        alive = [row for row in read if not row.dead]
        empty = dict.fromkeys(self.types)
        rows = tuple(Row({**empty, **row.values}) for row in alive)
        loose = self.loose
        if alive and self.rows:
            loose |= set(self.types) - set(alive[0].values)
        return replace(self, rows=rows, loose=loose), max(0, len(self.rows) - len(rows))

    def _merged(
        self, read: Sequence[Found], alive: set[tuple[str | None, ...]] | None
    ) -> tuple["Model", int]:
        """Update, insert, and delete or stamp; return how many served rows are gone by it."""
        stream, empty = self.stream, dict.fromkeys(self.types)
        rows = {self._key(row): row for row in self.rows}
        served = {key for key, row in rows.items() if not row.stamped}
        gone = set() if alive is None or stream.deletion == "ignore" else set(rows) - alive
        if stream.tombstone:
            gone |= {self._key(row) for row in read if row.dead}
        if alive is not None and stream.deletion == "soft":
            rows = {k: replace(r, stamped=r.stamped and k not in alive) for k, r in rows.items()}
        for row in read:
            key = self._key(row)
            old = rows[key].values if key in rows else empty
            if not (row.dead and stream.deletion == "hard"):
                rows[key] = Row({**old, **row.values})
        for key in gone & set(rows):
            if stream.deletion == "soft":
                rows[key] = replace(rows[key], stamped=True)
            else:
                del rows[key]
        return replace(self, rows=tuple(rows.values())), len(gone & served)

    def _versioned(
        self, read: Sequence[Found], alive: set[tuple[str | None, ...]] | None
    ) -> tuple["Model", int]:
        """End the versions of rows that are gone or differ, and begin those that are missing.

        A new version has no value in a column that the source does not have any more.
        """
        rows, ended = {self._key(row): row for row in self.rows}, list(self.ended)
        gone = set() if alive is None or self.stream.deletion == "ignore" else set(rows) - alive
        gone |= {self._key(row) for row in read if row.dead} & set(rows)
        ended += [rows.pop(key).values for key in gone]
        for row in read:
            old = rows.get(self._key(row))
            if row.dead or (old and all(old.values[n] == v for n, v in row.values.items())):
                continue
            if old:
                ended.append(old.values)
            rows[self._key(row)] = Row({**dict.fromkeys(self.types), **row.values})
        return replace(self, rows=tuple(rows.values()), ended=tuple(ended)), len(gone)

    # ── guards ───────────────────────────────────────────────────────────────────────────────

    def _losses(self, read: int | None, gone: int) -> set[str]:
        """Return the guards that a loss of rows trips; `read` is None for a window."""
        stops: set[str] = set()
        served = sum(not row.stamped for row in self.rows)
        if served < max(self.stream.floor, 1):
            return stops
        if read == 0:
            stops.add("zero_rows")
        if self.stream.ratio < 1 and gone > self.stream.ratio * served:
            stops.add("delete_ratio")
        return stops

    # ── what is compared ─────────────────────────────────────────────────────────────────────

    def content(self) -> Counter[tuple[Any, ...]]:
        """Return the rows as a multiset of (column, text) pairs and their stamps.

        Of a history a version that has ended is a stamped one.
        """
        rows = (*self.rows, *(Row(values, stamped=True) for values in self.ended))
        return Counter((*((n, row.values[n]) for n in self.compared), row.stamped) for row in rows)

    @property
    def compared(self) -> list[str]:
        """Return the columns whose values are not left open."""
        return sorted(set(self.types) - self.loose)
