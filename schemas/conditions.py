"""The condition of a stream's `where`: a small language, parsed here and written as SQL elsewhere.

    status IN ('paid', 'sent') AND NOT (amount < 10.5 OR "Deleted At" IS NOT NULL)

Start at `parse`. A document never holds SQL: what is not in this grammar is refused, and a
connector writes each name as a name and each literal as a literal of its own language.

    condition   = both { OR both }
    both        = one { AND one }
    one         = NOT one | "(" condition ")" | column test
    test        = ( = | <> | != | < | <= | > | >= ) literal | IS [NOT] NULL
                | [NOT] IN "(" literal { "," literal } ")"
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LENGTH_MAX = 2_000
DEPTH_MAX = 20

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>'(?:[^']|'')*')
    | (?P<quoted>"(?:[^"]|"")+")
    | (?P<number>[-+]?[0-9]+(?:\.[0-9]+)?(?![\w.]))
    | (?P<word>[^\W\d]\w*)
    | (?P<sign><>|!=|<=|>=|=|<|>|\(|\)|,)
    )""",
    re.VERBOSE,
)
_OPERATORS = {"=": "=", "<>": "<>", "!=": "<>", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
_RESERVED = frozenset({"AND", "OR", "NOT", "IS", "IN", "NULL", "TRUE", "FALSE"})


@dataclass(frozen=True, slots=True)
class Compare:
    """A column beside a literal; `operator` is one of = <> < <= > >=."""

    column: str
    operator: str
    literal: str


@dataclass(frozen=True, slots=True)
class Among:
    """A column that has one of some values."""

    column: str
    literals: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IsNull:
    column: str


@dataclass(frozen=True, slots=True)
class Not:
    part: "Condition"


@dataclass(frozen=True, slots=True)
class All:
    parts: tuple["Condition", ...]


@dataclass(frozen=True, slots=True)
class Any:
    parts: tuple["Condition", ...]


Test = Compare | Among | IsNull
Condition = Test | Not | All | Any


def parse(text: str) -> Condition:
    """Read a condition; ValueError says what was expected, and where."""
    if len(text) > LENGTH_MAX:
        raise ValueError(f"where: longer than {LENGTH_MAX} characters; read a view instead")
    if "\x00" in text:
        raise ValueError("where: holds a character that no database stores")
    parser = _Parser(list(_tokens(text)))
    found = parser.condition(0)
    parser.expect("", "AND, OR or the end")
    return found


def tests(condition: Condition) -> Iterator[Test]:
    """Yield every test of a column, in their order."""
    match condition:
        case Not(part):
            yield from tests(part)
        case All(parts) | Any(parts):
            for part in parts:
                yield from tests(part)
        case _:
            yield condition


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    at: int


def _tokens(text: str) -> Iterator[_Token]:
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            at = position + len(text[position:]) - len(text[position:].lstrip())
            raise ValueError(f"where: cannot read on at character {at + 1}")
        yield _Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup))
        position = match.end()
    yield _Token("end", "", end)


class _Parser:
    def __init__(self, tokens: Sequence[_Token]) -> None:
        self._tokens = tokens
        self._next = 0

    def condition(self, depth: int) -> Condition:
        if depth > DEPTH_MAX:
            raise ValueError(f"where: nested deeper than {DEPTH_MAX}; read a view instead")
        parts = [self._both(depth)]
        while self._take("OR"):
            parts.append(self._both(depth))
        return parts[0] if len(parts) == 1 else Any(tuple(parts))

    def _both(self, depth: int) -> Condition:
        parts = [self._one(depth)]
        while self._take("AND"):
            parts.append(self._one(depth))
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _one(self, depth: int) -> Condition:
        negated = False
        while self._take("NOT"):
            negated = not negated
        if self._take("("):
            found = self.condition(depth + 1)
            self.expect(")", "a closing parenthesis")
        else:
            found = self._test(self._column())
        return Not(found) if negated else found

    def _test(self, column: str) -> Condition:
        token = self._tokens[self._next]
        if token.kind == "sign" and token.text in _OPERATORS:
            self._next += 1
            return Compare(column, _OPERATORS[token.text], self._literal())
        if self._take("IS"):
            negated = self._take("NOT")
            self.expect("NULL", "NULL")
            return Not(IsNull(column)) if negated else IsNull(column)
        negated = self._take("NOT")
        self.expect("IN", "=, <>, <, <=, >, >=, IS or IN")
        self.expect("(", "an opening parenthesis")
        literals = [self._literal()]
        while self._take(","):
            literals.append(self._literal())
        self.expect(")", "a comma or a closing parenthesis")
        among = Among(column, tuple(literals))
        return Not(among) if negated else among

    def _column(self) -> str:
        token = self._tokens[self._next]
        if token.kind == "quoted":
            self._next += 1
            return token.text[1:-1].replace('""', '"')
        if token.kind == "word" and token.text.upper() not in _RESERVED:
            self._next += 1
            return token.text
        raise self._expected("the name of a column")

    def _literal(self) -> str:
        token = self._tokens[self._next]
        self._next += 1
        if token.kind == "string":
            return token.text[1:-1].replace("''", "'")
        if token.kind == "number":
            return token.text
        if token.kind == "word" and token.text.upper() in {"TRUE", "FALSE"}:
            return token.text.lower()
        self._next -= 1
        raise self._expected("a literal: 'text', a number, true or false")

    def _take(self, wanted: str) -> bool:
        token = self._tokens[self._next]
        if token.kind not in {"word", "sign"} or token.text.upper() != wanted:
            return False
        self._next += 1
        return True

    def expect(self, wanted: str, what: str) -> None:
        """Go on behind a word or sign ("" is the end); ValueError if it is not there."""
        if not wanted and self._tokens[self._next].kind == "end":
            return
        if not wanted or not self._take(wanted):
            raise self._expected(what)

    def _expected(self, what: str) -> ValueError:
        token = self._tokens[self._next]
        where = "its end" if token.kind == "end" else f"character {token.at + 1}"
        return ValueError(f"where: expected {what} at {where}")
