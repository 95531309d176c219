"""Escapes: whether a text has them, and patterns for a secret with any of its characters escaped.

Escapes can be mixed freely: `%2F` beside `%2f`, one character escaped and the next one not, one
escape inside another, quotes doubled as SQL does. For that there is one linear pattern per 128
characters of a secret.
"""

import re2

#: Longer secrets get a pattern for each part of this size at most.
PART_MAX = 128
#: A character takes so many bytes when it is escaped, also more than once; more is not awaited.
ESCAPED_MAX = 16

#: Patterns are about bytes.
BYTES = re2.Options()
BYTES.encoding = re2.Options.Encoding.LATIN1
BYTES.log_errors = False  # it would write patterns to stderr, which are made of secrets
#: One backslash or more, as it is or URL-encoded by whoever had the text later.
BACKSLASH = r"(?:\\|%(?:25)*5[Cc])+"
_NAMED = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}
_SHORT_ESCAPES = {"\n": "n", "\r": "r", "\t": "t", "\b": "b", "\f": "f"}
#: What is written twice to be meant once, each as it is or escaped.
_DOUBLED = "'\"%"

#: Any escape; `50 % of` and `a & b` are none.
_ESCAPE = re2.compile(rb"\\|%[0-9A-Fa-f%]|&[#A-Za-z]|''|\"\"|'\"'", BYTES)
#: Of a letter or a digit: rare, most encoders leave those alone.
_HEX_LETTER = r"(?:3[0-9]|[46][1-9a-f]|[57][0-9a])"
_LETTER = re2.compile(
    rf"(?i)%(?:25)*{_HEX_LETTER}|&(?:amp;)*#|"
    rf"{BACKSLASH}(?:x{_HEX_LETTER}|u00{_HEX_LETTER}|u000000{_HEX_LETTER}|u\{{|0*(?:[67][0-7]|1[0-7][0-7]))".encode(),
    BYTES,
)


def has_escapes(data: bytes) -> bool:
    """Say whether the slower search for escapes can find anything in this text."""
    some = b"%" in data or b"\\" in data or b"&" in data or b"'" in data or b'"' in data
    return some and _ESCAPE.search(data) is not None


def has_escaped_letters(data: bytes) -> bool:
    """Say whether letters or digits are escaped; if none is, words stand as they are."""
    return _LETTER.search(data) is not None


def parts(secret: str) -> list[str]:
    """Return the secret in parts of about the same size, each for one pattern."""
    count = -(-len(secret) // PART_MAX)
    size = -(-len(secret) // count)
    return [secret[i : i + size] for i in range(0, len(secret), size)]


def longest_word(text: str) -> str:
    """Return the longest part of ASCII letters and digits only."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text).split()
    return max(words, key=len, default="")


def pattern(text: str) -> "re2._Regexp":
    """Return what finds the text however its characters are escaped."""
    return re2.compile(f"(?i){''.join(map(_any_escape, text))}".encode(), BYTES)


def _any_escape(char: str) -> str:
    """Return a pattern for one character however it is escaped, also more than once."""
    raw = char.encode("utf-8", "surrogatepass")
    units = char.encode("utf-16-be", "surrogatepass")
    points = [units[i : i + 2].hex() for i in range(0, len(units), 2)]
    whole = ord(char)
    behind = [f"u{points[0]}", f"U{whole:08x}", rf"u\{{0*{whole:x}\}}"]
    ways = [
        "".join(f"\\x{byte:02x}" for byte in raw),
        "".join(f"%(?:25)*{byte:02x}" for byte in raw),
        "".join(f"{BACKSLASH}0*{byte:o}" for byte in raw),
        f"&(?:amp;)*#(?:0*{whole}|x0*{whole:x});",
    ]
    if len(raw) == 1:
        behind.append(f"x{raw[0]:02x}")
    else:
        ways.append("".join(f"{BACKSLASH}x{byte:02x}" for byte in raw))
        ways += ["".join(f"{BACKSLASH}u{point}" for point in points)] if points[1:] else []
        if whole < 256:  # noqa: PLR2004 - what repr() writes as \xNN
            behind.append(f"x{whole:02x}")
    if char in "\"'/\\":
        behind.append(f"(?:\\x{whole:02x}|%(?:25)*{whole:02x})")
    if char in _SHORT_ESCAPES:
        behind.append(_SHORT_ESCAPES[char])
    ways.append(f"{BACKSLASH}(?:{'|'.join(behind)})")
    if char == "'":  # as shells quote it between single quotes
        ways += [r"""'"'"'""", rf"'{BACKSLASH}''"]
    if char in _NAMED:
        ways.append(f"&(?:amp;)*{_NAMED[char]};")
    if char == " ":
        ways.append(r"\+")
    return f"(?:{'|'.join(ways)}){'+' if char in _DOUBLED else ''}"
