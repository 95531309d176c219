"""A secret as it may stand in a text: raw, URL-, JSON- and repr-escaped, base64 and hex.

Each form is searched for as bytes of UTF-8. Escapes can be mixed freely (`%2F` beside `%2f`, one
character escaped and the next one not, one escape inside another): for that there is one linear
pattern per secret, tried only on texts that hold an escape.
"""

import json
from base64 import b64encode, urlsafe_b64encode
from functools import cached_property
from urllib.parse import quote, quote_plus

import re2

from schemas.secret import SHORTEST_KNOWN

#: Longer ones (keys, certificates) are searched for in their forms and lines, not escape by escape.
MIXED_MAX = 128

_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_")
#: What a parser of addresses splits at: its error quotes what it took for a host or a port.
_SPLITS = str.maketrans(dict.fromkeys("@:/?#&", "\n"))
#: Patterns are about bytes.
BYTES = re2.Options()
BYTES.encoding = re2.Options.Encoding.LATIN1
BYTES.log_errors = False  # it would write patterns to stderr, which are made of secrets
#: One backslash or more, as it is or URL-encoded by whoever had the text later.
_BACKSLASH = r"(?:\\|%(?:25)*5[Cc])+"
_NAMED = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}
_SHORT_ESCAPES = {"\n": "n", "\r": "r", "\t": "t", "\b": "b", "\f": "f"}

Span = tuple[int, int]


class KnownSecret:
    """Everything by which one secret is recognised."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._spaced = " " in secret
        self._plain = _plain_forms(secret)
        self._base64 = _base64_forms(secret.encode("utf-8", "surrogatepass"))

    @cached_property
    def longest(self) -> int:
        """Length of the longest form that can begin before a border and end after it."""
        mixed = 16 * len(self._secret) if len(self._secret) <= MIXED_MAX else 0
        return max(mixed, *map(len, self._plain), *map(len, self._base64))

    @cached_property
    def _mixed(self) -> "re2._Regexp | None":
        if len(self._secret) > MIXED_MAX:
            return None
        return re2.compile("".join(map(_any_escape, self._secret)).encode(), BYTES)

    def spans(self, data: bytes, *, escaped: bool) -> list[Span]:
        """Return where the secret stands in the text, in any form."""
        found = [
            (at, at + len(form))
            for form in self._plain
            if form in data
            for at in _places(form, data)
        ]
        found += [
            _widened(data, at, at + len(form))
            for form in self._base64
            if form in data
            for at in _places(form, data)
        ]
        if (escaped or (self._spaced and b"+" in data)) and self._mixed is not None:
            found += [match.span() for match in self._mixed.finditer(data)]
        return found


def has_escapes(data: bytes) -> bool:
    """Say whether the slower search for mixed escapes can find anything in this text."""
    return b"%" in data or b"\\" in data or b"&" in data


def _plain_forms(secret: str) -> tuple[bytes, ...]:
    """Return the forms without escapes, and telling parts; with escapes where they do not mix."""
    raw = secret.encode("utf-8", "surrogatepass")
    forms = {secret, raw.hex(), raw.hex().upper()}
    if len(secret) > MIXED_MAX:
        forms |= _escaped_forms(secret)
        forms |= {line for line in secret.splitlines() if len(line) >= 2 * SHORTEST_KNOWN}
    else:
        parts = secret.translate(_SPLITS).split("\n")
        forms |= {p for p in parts if len(p) >= SHORTEST_KNOWN and not p.isalpha()}
    as_bytes = {form.encode("utf-8", "surrogatepass") for form in forms}
    return tuple(sorted(as_bytes, key=len, reverse=True))


def _escaped_forms(secret: str) -> set[str]:
    """Return what common encoders make of it."""
    raw = secret.encode("utf-8", "surrogatepass")
    forms = {repr(secret)[1:-1]}
    for encoded in (quote(raw, safe=""), quote(raw), quote_plus(raw), quote(raw, safe="!'()*~")):
        forms |= {encoded, _lower_escapes(encoded)}
    for ascii_only in (True, False):
        escaped = json.dumps(secret, ensure_ascii=ascii_only)[1:-1]
        forms |= {escaped, escaped.replace("/", "\\/")}
    return forms


def _lower_escapes(text: str) -> str:
    """Return a URL-encoded text with %2f instead of %2F."""
    head, *rest = text.split("%")
    return "%".join([head, *(part[:2].lower() + part[2:] for part in rest)])


def _base64_forms(raw: bytes) -> tuple[bytes, ...]:
    """Return what base64 makes of it wherever it begins: the characters that it alone decides."""
    forms = set()
    for shift, start in ((0, 0), (1, 2), (2, 3)):
        end = (shift + len(raw)) * 8 // 6
        for encode in (b64encode, urlsafe_b64encode):
            forms.add(encode(b"\0" * shift + raw)[start:end])
    return tuple(forms)


def _any_escape(char: str) -> str:
    """Return a pattern for one character however it is escaped, also more than once."""
    raw = char.encode("utf-8", "surrogatepass")
    units = char.encode("utf-16-be", "surrogatepass")
    points = [units[i : i + 2].hex() for i in range(0, len(units), 2)]
    ways = [
        "".join(f"\\x{byte:02x}" for byte in raw),
        "".join(f"%(?:25)*(?i:{byte:02x})" for byte in raw),
        "".join(rf"{_BACKSLASH}(?i:u{point})" for point in points),
        "".join(rf"{_BACKSLASH}(?i:x{byte:02x})" for byte in raw),
        f"&(?:amp;)*#(?:0*{ord(char)}|(?i:x0*{ord(char):x}));",
    ]
    whole = ord(char)
    ways.append(rf"{_BACKSLASH}(?:U{whole:08x}|U{whole:08X}|(?i:u\{{0*{whole:x}\}}))")
    if len(raw) > 1 and whole < 256:  # noqa: PLR2004 - what repr() writes as \xNN
        ways.append(rf"{_BACKSLASH}(?i:x{whole:02x})")
    if char in "\"'/\\":
        ways.append(rf"{_BACKSLASH}(?:\x{ord(char):02x}|%(?:25)*(?i:{ord(char):02x}))")
    if char in _SHORT_ESCAPES:
        ways.append(rf"{_BACKSLASH}{_SHORT_ESCAPES[char]}")
    if char in _NAMED:
        ways.append(f"&(?:amp;)*{_NAMED[char]};")
    if char == " ":
        ways.append(r"\+")
    return f"(?:{'|'.join(ways)})"


def _places(form: bytes, data: bytes) -> list[int]:
    places, at = [], data.find(form)
    while at >= 0:
        places.append(at)
        at = data.find(form, at + len(form))
    return places


def _widened(data: bytes, start: int, end: int) -> Span:
    """Take the neighbours along: a few of their bits are the secret's, too."""
    if start and data[start - 1] in _BASE64:
        start -= 1
    if end < len(data) and data[end] in _BASE64:
        end += 1
    while end < len(data) and data[end] == ord("="):
        end += 1
    return start, end
