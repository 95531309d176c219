"""A secret as it may stand in a text: raw, URL-, JSON- and repr-escaped, base64 and hex.

Each form is searched for as bytes of UTF-8, in a view of the text that takes away what does not
matter: case, and what may stand between the units of base64 and hex. Nothing that a line without
a secret needs is compiled: a usual line costs a few searches for plain bytes per secret.
"""

import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from urllib.parse import quote, quote_plus

import re2

from schemas.secret import SHORTEST_KNOWN
from schemas.secret_escapes import (
    BACKSLASH,
    BYTES,
    ESCAPED_MAX,
    PART_MAX,
    has_escaped_letters,
    has_escapes,
    longest_word,
    parts,
    pattern,
)

_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_")
#: What a parser of addresses splits at: its error quotes what it took for a host or a port.
_SPLITS = str.maketrans(dict.fromkeys("@:/?#&", "\n"))
_WHITE = b" \t\r\n\v\f"
#: What stands between bytes in hex: `68:75`, `68-75`, `68, 75`.
_BETWEEN_HEX = _WHITE + b":-,;._"
#: Letters without their case, both alphabets of base64 as one.
_FOLDED = bytes(range(256)).lower().translate(bytes.maketrans(b"-_", b"+/"))
#: What others make of an end of a line, and of the characters of base64 that are no letters.
_BEHIND = rf"(?:%(?:25)*|{BACKSLASH}(?:u00|x))"
_IN_BASE64 = re2.compile(
    rf"(?i)((?:{BACKSLASH}[nrt]|{_BEHIND}(?:0[9ad]|20)|&(?:amp;)*#(?:9|10|13|x0*[9ad]);)+[ \t]*)"
    rf"|({_BEHIND}2[bd])|({_BEHIND}(?:2f|5f)|{BACKSLASH}/)".encode(),
    BYTES,
)
_MEANT = (b"", b"", b"+", b"/")  # by each of the groups
#: Base64 of the shortest secret is so long; most words are not.
_LONG_WORD = re.compile(rb"[A-Za-z0-9+/_-]{10,}")
#: A unit of base64 or hex takes so many bytes with what stands between; more is not awaited.
_SPREAD = 3

Span = tuple[int, int]


class _View:
    """A text without what does not matter, and where in the text each byte of it comes from."""

    def __init__(self, seen: bytes, origins: Callable[[], Sequence[int]]) -> None:
        self.seen = seen
        self._find_origins = origins

    @cached_property
    def _origins(self) -> Sequence[int]:
        return self._find_origins()

    def spans(self, form: bytes) -> list[Span]:
        """Return where the form stands in the text itself."""
        origins, last = self._origins, len(form) - 1
        return [(origins[at], origins[at + last] + 1) for at in _places(form, self.seen)]


class Text:
    """One text and the views of it, for all secrets; views are made when they are needed."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.folded = data.lower()
        self.escaped = has_escapes(data)
        self.spaced = b"+" in data
        self.hex = _View(data.translate(_FOLDED, _BETWEEN_HEX), lambda: _left(data, _BETWEEN_HEX))
        self.base64 = _base64_views(data, escaped=self.escaped)

    @cached_property
    def escaped_letters(self) -> bool:
        """Whether letters or digits are escaped."""
        return has_escaped_letters(self.data)


class KnownSecret:
    """Everything by which one secret is recognised."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._spaced = " " in secret

    @cached_property
    def longest(self) -> int:
        """Length of the longest form that can begin before a border and end after it."""
        mixed = ESCAPED_MAX * min(len(self._secret), PART_MAX)
        packed = _SPREAD * max(len(self._hex), *map(len, self._base64))
        return max(mixed, packed, *map(len, self._plain))

    @cached_property
    def _plain(self) -> tuple[bytes, ...]:
        return _plain_forms(self._secret)

    @cached_property
    def _hex(self) -> bytes:
        return self._secret.encode("utf-8", "surrogatepass").hex().encode()

    @cached_property
    def _base64(self) -> tuple[bytes, ...]:
        return _base64_forms(self._secret)

    @cached_property
    def _mixed(self) -> list["_Mixed"]:
        return [_Mixed(part) for part in parts(self._secret)]

    def spans(self, text: Text) -> list[Span]:
        """Return where the secret stands in the text, in any form."""
        found: list[Span] = []
        for form in self._plain:
            if form in text.folded:
                found += [(at, at + len(form)) for at in _places(form, text.folded)]
        if self._hex in text.hex.seen:
            found += text.hex.spans(self._hex)
        for view in text.base64:
            seen = view.seen
            for form in self._base64:
                if form in seen:
                    found += [_widened(text.data, *span) for span in view.spans(form)]
        if text.escaped or (self._spaced and text.spaced):
            part: list[Span] = []
            for mixed in self._mixed:
                part = mixed.spans(text, [end for _, end in part])
                found += part
        return found


class _Mixed:
    """A secret, or a part of a long one, with any of its characters escaped in any way."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._word = longest_word(part).lower().encode()

    @cached_property
    def _pattern(self) -> "re2._Regexp":
        return pattern(self._part)

    def spans(self, text: Text, after: list[int]) -> list[Span]:
        """Return where it stands; its longest word is there, or letters of it are escaped.

        Where the part before it ends it is looked for in any case: in a secret that repeats itself
        it may have been found earlier, over that place.
        """
        if self._word not in text.folded and not text.escaped_letters:
            return []
        found = [match.span() for match in self._pattern.finditer(text.data)]
        follows = (self._pattern.match(text.data, at) for at in after)
        return found + [match.span() for match in follows if match]


def _plain_forms(secret: str) -> tuple[bytes, ...]:
    """Return the secret, and telling parts of it, as they are without escapes and case."""
    forms = {secret}
    if len(secret) > PART_MAX:
        forms |= {line for line in secret.splitlines() if len(line) >= 2 * SHORTEST_KNOWN}
    else:
        pieces = secret.translate(_SPLITS).split("\n")
        forms |= {p for p in pieces if len(p) >= SHORTEST_KNOWN and not p.isalpha()}
    cases = {case for form in forms for case in (form, form.lower(), form.upper())}
    as_bytes = {case.encode("utf-8", "surrogatepass").lower() for case in cases}
    return tuple(sorted(as_bytes, key=len, reverse=True))


def _base64_forms(secret: str) -> tuple[bytes, ...]:
    """Return what base64 makes of it, and of what URLs and JSON make of it, without case.

    That is, wherever it begins: the characters that it alone decides.
    """
    raw = secret.encode("utf-8", "surrogatepass")
    inner = {raw}
    inner |= {each.encode() for each in (quote(raw, safe=""), quote(raw), quote_plus(raw))}
    for ascii_only in (True, False):
        escaped = json.dumps(secret, ensure_ascii=ascii_only)[1:-1]
        inner.add(escaped.encode("utf-8", "surrogatepass"))
    forms = set()
    for each in inner:
        for shift, start in ((0, 0), (1, 2), (2, 3)):
            end = (shift + len(each)) * 8 // 6
            forms.add(b64encode(b"\0" * shift + each)[start:end].translate(_FOLDED))
    return tuple(forms)


def _left(data: bytes, deleted: bytes) -> list[int]:
    """Return the places of the bytes that are not deleted."""
    gone = frozenset(deleted)
    return [at for at, byte in enumerate(data) if byte not in gone]


def _base64_views(data: bytes, *, escaped: bool) -> list[_View]:
    """Return the text as base64 can stand in it: none if it has no word that is long enough."""
    views = []
    if b"\n" in data or b"\r" in data:
        views.append(_View(data.translate(_FOLDED, _WHITE), lambda: _left(data, _WHITE)))
    elif _LONG_WORD.search(data):
        views.append(_View(data.translate(_FOLDED), lambda: range(len(data))))
    if escaped and _IN_BASE64.search(data):
        views += _unescaped(data)
    return views


def _unescaped(data: bytes) -> list[_View]:
    """Return a text without escaped ends of lines, its base64 as it was before it was escaped."""
    pieces = list(_pieces(data))
    seen = b"".join(data[at:end] if meant is None else meant for at, end, meant in pieces)
    if not (b"\n" in seen or b"\r" in seen or _LONG_WORD.search(seen)):
        return []
    deleted = _WHITE if b"\n" in seen or b"\r" in seen else b""

    def origins() -> list[int]:
        found: list[int] = []
        for at, end, meant in pieces:
            found += range(at, end) if meant is None else [at] * len(meant)
        return [found[at] for at in _left(seen, deleted)]

    return [_View(seen.translate(_FOLDED, deleted), origins)]


def _pieces(data: bytes) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield where pieces begin and end, and what was meant by them if it is not what stands."""
    done = 0
    for match in _IN_BASE64.finditer(data):
        start, end = match.span()
        yield done, start, None
        yield start, end, _MEANT[match.lastindex or 0]
        done = end
    yield done, len(data), None


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
