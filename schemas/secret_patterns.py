"""What looks like a secret though nobody knows its value: by the name before it, or by its shape.

All of it runs on RE2, whose time is linear in the text whatever the text is. A pattern whose match
may stay undecided for long stands alone, so that it is not begun anew for each match of another.
"""

import re2

from schemas.secret_escapes import BYTES
from schemas.secret_forms import Span

#: A name with one of these in it names a secret, in documents and fields of log lines.
_NAMES = (
    *("password", "passwd", "passphrase", "pwd", "secret", "token", "apikey", "api_key"),
    *("private_key", "access_key", "authorization", "cookie", "credential", "dsn", "conninfo"),
)
#: Endings of a name that, in running text, is followed by a secret.
_ENDINGS = (
    r"(?:pass(?:word|wd|phrase)|pwd|secret|token|api[_-]?key|private[_-]?key|access[_-]?key|"
    r"secret[_-]?key|authorization|cookie|credentials?|conninfo|dsn)"
)
_QUOTED = r"""(?:"(?:[^"\\]|\\(?s:.))*"?|'(?:[^'\\]|\\(?s:.))*'?)"""

#: Each has one group: what is masked.
_KEYS = tuple(
    re2.compile(pattern.encode(), BYTES)
    for pattern in (
        # a name, an equals sign or an arrow, a value
        rf"""(?i)(?:^|[^\w])[\w.-]*{_ENDINGS}\\?["']?\s{{0,8}}=>?\s{{0,8}}\\?({_QUOTED}|[^\s"'&;]+)""",
        # a name, a colon, a value in quotes
        rf"""(?i)(?:^|[^\w])[\w.-]*{_ENDINGS}\\?["']?\s{{0,8}}:\s{{0,8}}[bru]?\\?({_QUOTED})""",
        # a name, a colon, one word, then nothing or the next name; "public.token: 5 rows" is none
        rf"""(?im)(?:^|[^\w.-])[\w-]*{_ENDINGS}["']?\s{{0,8}}:\s{{0,8}}([^\s"',;&)}}\]]+)\s{{0,8}}(?:$|[,;&)}}\]])""",
        # a pair of name and value
        rf"""(?i)\([bru]?["'][\w-]*{_ENDINGS}["'],\s{{0,8}}[bru]?({_QUOTED})\s{{0,8}}\)""",
        # headers whose whole line is secret
        r"(?im)(?:^|[^\w])(?:proxy-)?(?:authorization|(?:set-)?cookie)\s{0,8}:\s{0,8}([^\r\n]+)",
    )
)

#: Tokens that name their maker, and what follows the name of a scheme.
_TOKENS = (
    r"(?i:bearer|basic)\s{1,8}([a-z]{0,200}[A-Z0-9._~+/=-][\w.~+/=-]{5,})"
    r"|\b((?:AKIA|ASIA)[0-9A-Z]{16})\b"
    r"|\b(gh[a-z]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,})"
    r"|\b(xox[a-z]-[\w-]{10,})"
    r"|\b((?:sk|rk)_(?:live|test)_\w{10,}|whsec_[\w+/=]{16,})"
    r"|\b(hvs\.[\w-]{20,}|AIza[\w-]{35}|AGE-SECRET-KEY-1\w{20,})"
)
#: (what a text must hold, what is looked for then); without it, one of the words below
_SHAPES = tuple(
    (gate, re2.compile(pattern.encode(), BYTES))
    for gate, pattern in (
        # the login of a URL, up to the last @ of the word: passwords hold / and @
        (b"://", r"""://([^\s"'<>/?#@:]*:[^\s"'<>]*|[^\s"'<>/?#@]+)@"""),
        (b"eyJ", r"(eyJ[\w-]{5,}\.[\w-]+(?:\.[\w-]*){0,3})"),
        (
            b"-----BEGIN",
            r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----((?s:.*?))(?:-----END [A-Z0-9 ]*PRIVATE KEY|\z)",
        ),
        (b"[parameters:", r"\[parameters:((?s:.*?))(?:\]\n|\]\z|\z)"),
        # what a Postgres quotes of rows
        (b"DETAIL:", r"DETAIL:((?s:.*?))(?:\n(?:HINT|CONTEXT|QUERY|LINE \d+|WHERE):|\z)"),
        (b"COPY ", r"COPY [^\n:]*, line \d+[^\n:]*: (\"(?s:.*?))(?:\n(?:HINT|QUERY):|\z)"),
        (b"for type", r"invalid input [^\n:]{0,200}for type [^\n:]{0,200}: (\"[^\n]*)"),
        (b"input_value=", r"input_value=([^\n]*?)(?:, input_type=|\n|\z)"),
        (
            b"",
            _TOKENS,
        ),
    )
)

#: Ordinary lines hold none of this; one look spares them all the others.
_WORDS = re2.compile(
    rb"(?i)pass|pwd|secret|token|key|authorization|cookie|credential|conninfo|dsn|bearer|basic"
    rb"|AKIA|ASIA|gh[a-z]_|github_pat_|glpat-|xox|[sr]k_|whsec_|hvs\.|AIza",
    BYTES,
)


def has_words(data: bytes) -> bool:
    """Say whether the text holds a word without which keys and most shapes find nothing."""
    return _WORDS.search(data) is not None


def names_a_secret(name: str) -> bool:
    """Say whether a value of this name is masked whatever it is."""
    folded = name.lower().replace("-", "_")
    return any(part in folded for part in _NAMES)


def spans_by_key(data: bytes) -> list[Span]:
    """Return the values that stand behind the name of a secret; a text without words has none."""
    return [match.span(1) for pattern in _KEYS for match in pattern.finditer(data)]


def spans_by_shape(data: bytes, *, words: bool) -> list[Span]:
    """Return what looks like a secret, and where libraries quote what they were given."""
    return [
        _group(match)
        for gate, pattern in _SHAPES
        if (gate in data if gate else words)
        for match in pattern.finditer(data)
    ]


def _group(match: "re2._Match") -> Span:
    """Return the group that matched: a pattern of several shapes has one for each."""
    spans: list[Span] = [match.span(number) for number in range(1, len(match.groups()) + 1)]
    return next(span for span in spans if span != (-1, -1))
