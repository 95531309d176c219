"""What changed between the columns of a source and those of its copy: start at `changes`.

What is done about it is each destination's own (postgres/drift.py, files/layout.py).
"""

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from schemas.records import Change, Column, SchemaChange

_TYPE = re.compile(
    r"(?P<base>[a-z][a-z ]*?)(?:\((?P<sizes>[0-9]+(?:,-?[0-9]+)?)\))?"
    r"(?P<tail> with(?:out)? time zone)?(?P<dims>(?:\[\])*)"
)
#: Digits before the point that a type of whole numbers needs.
_DIGITS = {"smallint": 5, "integer": 10, "bigint": 19}
_ORDER = ("smallint", "integer", "bigint")
#: Types whose size is an upper bound on what they hold; without a size there is none.
_BOUNDED = {"character varying", "bit varying", "time", "timestamp"}


@dataclass(frozen=True, slots=True)
class _Type:
    base: str
    sizes: tuple[int, ...]
    tail: str
    dims: str

    @property
    def numeric(self) -> tuple[int, int] | None:
        """Digits before and after the point of a numeric that has a size; None has no bound."""
        if not self.sizes:
            return None
        precision, scale = (*self.sizes, 0)[:2]
        return precision - scale, scale


def _parsed(type_: str) -> _Type | None:
    match = _TYPE.fullmatch(type_)
    if match is None:
        return None
    sizes = tuple(int(size) for size in (match["sizes"] or "").split(",") if size)
    return _Type(match["base"], sizes, match["tail"] or "", match["dims"])


def widens(old: str, new: str) -> bool:
    """Say whether `new` holds every value of `old` exactly, so that a column may be changed to it.

    Both are types as Postgres writes them. False for types that this list does not know: a change
    that is not known to be safe is a person's to make.
    """
    a, b = _parsed(old), _parsed(new)
    if a is None or b is None or a == b or (a.tail, a.dims) != (b.tail, b.dims):
        return False
    if b.base == "numeric":
        return _holds(b.numeric, a)
    if a.base in _DIGITS and b.base in _DIGITS:
        return _ORDER.index(a.base) < _ORDER.index(b.base)
    if a.base == b.base:
        return a.base in _BOUNDED and (not b.sizes or (bool(a.sizes) and a.sizes <= b.sizes))
    return (a.base, b.base) in {("real", "double precision"), ("character varying", "text")}


def _holds(digits: tuple[int, int] | None, old: _Type) -> bool:
    """Say whether a numeric of so many digits before and after the point holds another type."""
    needed = (_DIGITS[old.base], 0) if old.base in _DIGITS else old.numeric
    if old.base not in _DIGITS and old.base != "numeric":
        return False
    if digits is None or needed is None:
        return digits is None
    return needed[0] <= digits[0] and needed[1] <= digits[1]


def changes(
    there: Mapping[str, Column], here: Sequence[Column], key: AbstractSet[str] = frozenset()
) -> tuple[SchemaChange, ...]:
    """Compare the target's columns with the source's, in the source's order.

    Columns of the target's key stay NOT NULL; a row without its key is refused as such.
    """
    found = []
    for column in here:
        old = there.get(column.name)
        if old is None:
            found.append(SchemaChange(column.name, Change.ADDED, None, column.type))
            continue
        if old.type != column.type:
            found.append(
                SchemaChange(column.name, _kind(old.type, column.type), old.type, column.type)
            )
        if column.nullable and not old.nullable and column.name not in key:
            kind = Change.NULLABLE
            found.append(SchemaChange(column.name, kind, f"{old.type} NOT NULL", column.type))
    names = {column.name for column in here}
    found += [
        SchemaChange(name, Change.REMOVED, old.type, None)
        for name, old in there.items()
        if name not in names
    ]
    return tuple(found)


def _kind(old: str, new: str) -> Change:
    if widens(old, new):
        return Change.WIDENED
    return Change.NARROWED if widens(new, old) else Change.CHANGED
