"""The one sink that log lines, errors, outputs and crashes pass before anybody sees them.

Three layers, each of which alone would miss something: by value (every secret that this process
holds just now, in all its forms: schemas/secret_forms.py), by the name of the key before it, and by
shape (schemas/secret_patterns.py). All spans are found in the original text and masked together.
docs/redaction.md says what is masked and what is not.
"""

from collections.abc import Callable, Mapping
from threading import Lock
from types import TracebackType
from typing import Any, Literal, Self

from schemas.secret import SHORTEST_KNOWN, texts_in
from schemas.secret_forms import KnownSecret, Text
from schemas.secret_patterns import has_words, names_a_secret, spans_by_key, spans_by_shape

Layer = Literal["value", "key", "pattern"]
LAYERS: tuple[Layer, ...] = ("value", "key", "pattern")

MASK = "***"
#: Characters of one text that are looked at; what follows is not shown at all.
TEXT_MAX = 32_768
#: Looked at beyond what is shown, so that a secret that begins there is seen whole.
BEYOND = 4_096
#: A stream holds back so many characters at least: the beginning of what has a shape.
HELD_BACK = 1_024
#: And looks at what it holds when so many more bytes have come.
STEP = 256
#: Bytes that a stream has shown and still looks at: the name before a value.
CONTEXT = 512
#: Levels of a document; deeper ones are masked.
DEPTH_MAX = 64


class Redactor:
    """Knows secrets and masks them; safe to use from many threads."""

    def __init__(self, count: Callable[[Layer, int], None] = lambda _layer, _n: None) -> None:
        self._lock = Lock()
        self._holders: dict[str, int] = {}
        self._forms: dict[str, KnownSecret] = {}
        self._known: tuple[KnownSecret, ...] = ()  # replaced, never changed: read without the lock
        self._count = count

    def count_with(self, count: Callable[[Layer, int], None]) -> None:
        """Report from now on how many places each layer masked."""
        self._count = count

    # ── what it knows ────────────────────────────────────────────────────────────────────────

    def know(self, secret: str) -> str:
        """Mask this value from now on, until it is forgotten as often as it was known."""
        if len(secret) >= SHORTEST_KNOWN:
            with self._lock:
                self._holders[secret] = self._holders.get(secret, 0) + 1
                if secret not in self._forms:
                    self._forms[secret] = KnownSecret(secret)
                    self._known = tuple(self._forms.values())
        return secret

    def forget(self, secret: str) -> None:
        """Undo one `know`."""
        with self._lock:
            left = self._holders.pop(secret, 0) - 1
            if left > 0:
                self._holders[secret] = left
            elif self._forms.pop(secret, None) is not None:
                self._known = tuple(self._forms.values())

    def holder(self) -> "Holder":
        """Return a context: what is known through it is forgotten at its end."""
        return Holder(self)

    @property
    def longest(self) -> int:
        """Length of the longest form of all that is known."""
        return max((known.longest for known in self._known), default=0)

    # ── what it masks ────────────────────────────────────────────────────────────────────────

    def text(self, text: str, *, limit: int = TEXT_MAX) -> str:
        """Return the text masked, then cut to `limit` characters.

        Bounded in time whatever the text: a little more than the limit is looked at, and a secret
        that the cut goes through is masked whole, for it was seen before the cut.
        """
        if not text:
            return text
        beyond = max(BEYOND, self.longest)
        data = text[: limit + beyond].encode("utf-8", "surrogatepass")
        spans = self.spans(data)
        if not spans:
            return text if len(text) <= limit else text[:limit]
        seen = len(data) if len(text) <= limit + beyond else len(data) - beyond
        return _masked(data[:seen], spans)[:limit]

    def spans(self, data: bytes) -> list[tuple[int, int]]:
        """Return what is to be masked, in order and without overlaps; counted by layer."""
        known = self._known
        words = has_words(data)
        by_value = _by_value(known, data) if known else []
        by_key = spans_by_key(data) if words else []
        by_shape = spans_by_shape(data, words=words)
        if not (by_value or by_key or by_shape):
            return []
        for layer, found in zip(LAYERS, (by_value, by_key, by_shape), strict=True):
            if found:
                self._count(layer, len(found))
        return _joined([*by_value, *by_key, *by_shape])

    def document(  # noqa: PLR0911 - one return per type reads as a table
        self,
        value: Any,  # noqa: ANN401 - whatever JSON can say
        depth: int = 0,
    ) -> Any:  # noqa: ANN401 - as above
        """Return a JSON-like value with every text in it masked; keys, too.

        What stands under the name of a secret is masked whole. Values that are no JSON are left to
        whoever writes them.
        """
        match value:
            case str():
                return self.text(value)
            case bool() | None:
                return value
            case int() | float():
                shown = str(value)
                return value if self.text(shown) == shown else MASK
            case _ if depth >= DEPTH_MAX:
                return MASK
            case Mapping():
                return {self._key(k): self.under(k, v, depth) for k, v in value.items()}
            case list() | tuple():
                return [self.document(item, depth + 1) for item in value]
            case _:
                return value

    def _key(self, key: Any) -> Any:  # noqa: ANN401 - as above
        return self.text(key) if isinstance(key, str) else key

    def under(self, key: object, value: object, depth: int = 0) -> object:
        """Return a value masked as one under this key: whole, if the key names a secret."""
        named = isinstance(key, str) and names_a_secret(key)
        if named and value is not None and not isinstance(value, bool) and value != MASK:
            self._count("key", 1)
            return MASK
        return self.document(value, depth + 1)

    def stream(self) -> "Stream":
        """Return what masks a text that comes in pieces."""
        return Stream(self)


class Holder:
    """Keeps secrets known for as long as whoever unsealed them may still write a line."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._lock = Lock()
        self._secrets: list[str] | None = []

    def know(self, secret: str) -> str:
        """Mask this value until the holder ends; one that has ended takes nothing any more.

        If it is a JSON object, each text in it is masked by itself, too.
        """
        with self._lock:
            if self._secrets is not None:
                parts = [secret, *texts_in(secret)]
                self._secrets += [self._redactor.know(part) for part in parts]
        return secret

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            secrets, self._secrets = self._secrets or [], None
        for secret in secrets:
            self._redactor.forget(secret)


class Stream:
    """Masks a text that comes in pieces: holds back what may be the beginning of a secret."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._data = b""  # what was shown last, as context, and what is held back
        self._shown = 0  # bytes of it that were shown
        self._swallowing = False

    def feed(self, piece: str) -> str:
        """Take a piece, return what can be shown by now."""
        shown = []
        for start in range(0, len(piece), TEXT_MAX):
            self._data += piece[start : start + TEXT_MAX].encode("utf-8", "surrogatepass")
            shown.append(self._take(max(HELD_BACK, self._redactor.longest)))
        return "".join(shown)

    def close(self) -> str:
        """Return the rest; nothing can follow that would make a secret of it."""
        return self._take(0)

    def _take(self, hold: int) -> str:
        """Show what lies before the part that is held back, and no part of a secret in between."""
        if self._swallowing:
            self._data = b""
            return ""
        data, shown = self._data, self._shown
        if hold and len(data) - shown < hold + STEP:
            return ""
        spans = [(max(start, shown), end) for start, end in self._redactor.spans(data)]
        cut = max(shown, _border(data, len(data) - hold))
        for start, end in spans:
            if start < cut < end:
                cut = start  # it may go on
        text = _masked(data[shown:cut], [(a - shown, b - shown) for a, b in spans])
        if len(data) - cut > 2 * TEXT_MAX + hold:  # a secret without an end
            self._swallowing = True
            return text + MASK
        kept = _border(data, cut - CONTEXT)
        self._data, self._shown = data[kept:], cut - kept
        return text


def _by_value(known: tuple[KnownSecret, ...], data: bytes) -> list[tuple[int, int]]:
    """Return where any of the secrets stands, in any form."""
    text = Text(data)
    return [span for one in known for span in one.spans(text)]


def _border(data: bytes, at: int) -> int:
    """Return the place, or the next one before it, at which a character begins."""
    at = max(0, at)
    while 0 < at < len(data) and data[at] & 0xC0 == 0x80:  # noqa: PLR2004 - continues a character
        at -= 1
    return at


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans in order, those that touch or overlap as one, without empty ones."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if start == end:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _masked(data: bytes, spans: list[tuple[int, int]]) -> str:
    """Put the mask in place of each span that begins in these bytes."""
    shown, at = [], 0
    for start, end in spans:
        if at <= start < len(data) and end > at:
            shown += [data[at:start].decode("utf-8", "replace"), MASK]
            at = end
    return "".join([*shown, data[at:].decode("utf-8", "replace")])


#: What this process has unsealed or read, and must not show.
REDACTOR = Redactor()
