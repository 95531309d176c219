"""Search what an installation leaves behind for secrets, in every form that they commonly take.

Used by the demo and by `make canary`. It knows nothing of how the product masks: it is its check.
"""

import json
import subprocess
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, quote_plus

import re2

from embedded.postgres import Cluster

#: Files are read in pieces of this size; pieces overlap, so that nothing hides at a border.
_PIECE = 16 * 1024 * 1024
_OVERLAP = 4_096
_LAST_ASCII = 126
#: For the states of the search for all forms at once.
_MEMORY = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Place:
    """Somewhere to look: its bytes, in pieces that overlap."""

    name: str
    pieces: Iterable[bytes]


@dataclass(frozen=True, slots=True)
class Hit:
    """A secret that was found: which, where, and in what form. Never the secret itself."""

    secret: int
    place: str
    form: str


@dataclass(slots=True)
class Searched:
    """What a search found, and how much it looked at."""

    hits: list[Hit]
    bytes: int


def forms(secret: str) -> dict[str, bytes]:
    """Return the bytes that a secret would be: raw, base64 at three offsets, hex, URL and more."""
    raw = secret.encode()
    found = {
        "raw": raw,
        "lower": secret.lower().encode(),
        "upper": secret.upper().encode(),
        "hex": raw.hex().encode(),
        "HEX": raw.hex().upper().encode(),
        "url": quote(secret, safe="").encode(),
        "url url": quote(quote(secret, safe=""), safe="").encode(),
        "url+": quote_plus(secret, safe="").encode(),
        "json": json.dumps(secret)[1:-1].encode(),
        "json unicode": json.dumps(secret, ensure_ascii=False)[1:-1].encode(),
        "repr": repr(secret)[1:-1].encode(),
        "sql": secret.replace("'", "''").encode(),
        "sql identifier": secret.replace('"', '""').encode(),
        "octal": b"".join(b"\\%03o" % b if b > _LAST_ASCII else b"%c" % b for b in raw),
        "utf-16": secret.encode("utf-16-le"),
    }
    for between in (":", "-", " "):
        found[f"hex {between}"] = raw.hex(between).encode()
        found[f"HEX {between}"] = raw.hex(between).upper().encode()
    inner = {"": raw, " of url": found["url"], " of json": found["json"]}
    for what, content in inner.items():
        found |= {f"{name}{what}": form for name, form in _base64(content)}
    return found


def _base64(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield base64 without what neighbours take part in: the first characters and the last ones."""
    for offset in range(3):
        start, end = (0, 2, 3)[offset], -4 if (len(content) + offset) % 3 else None
        for name, encode in (("base64", b64encode), ("base64url", urlsafe_b64encode)):
            yield f"{name} +{offset}", encode(b"\0" * offset + content)[start:end]


def search(places: Iterable[Place], secrets: Sequence[str]) -> Searched:
    """Look for every form of every secret in every place."""
    wanted = [(n, _distinct(forms(secret))) for n, secret in enumerate(secrets)]
    anything = _any_of(pattern for _, by_form in wanted for pattern in by_form.values())
    result = Searched([], 0)
    for place in places:
        seen: set[Hit] = set()
        for piece in place.pieces:
            result.bytes += len(piece)
            if anything.search(piece):
                seen.update(_hits(place.name, piece, wanted))
            joined = _without_breaks(piece)
            if anything.search(joined):
                seen.update(_hits(place.name, joined, wanted, of="base64"))
        result.hits += sorted(seen, key=lambda hit: (hit.secret, hit.form))
    return result


def _any_of(patterns: Iterable[bytes]) -> "re2._Regexp":
    """Return what finds any of them in one pass: there are hundreds, and gigabytes to search."""
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.log_errors = False
    options.max_mem = _MEMORY
    found = ("".join(f"\\x{byte:02x}" for byte in pattern) for pattern in patterns)
    return re2.compile("|".join(found).encode(), options)


def _hits(
    place: str, piece: bytes, wanted: Sequence[tuple[int, dict[str, bytes]]], *, of: str = ""
) -> Iterator[Hit]:
    """Yield which secrets are in the bytes, in any form, or in those whose name begins so."""
    for n, by_form in wanted:
        for form, pattern in by_form.items():
            if form.startswith(of) and pattern in piece:
                yield Hit(n, place, form)


def _distinct(by_form: dict[str, bytes]) -> dict[str, bytes]:
    """Leave out forms that are the same bytes as one before: many secrets need no escape."""
    first = {pattern: form for form, pattern in reversed(by_form.items())}
    return {form: pattern for form, pattern in by_form.items() if first[pattern] == form}


def _without_breaks(piece: bytes) -> bytes:
    """Return the bytes without ends of lines, also escaped ones: base64 is broken into lines."""
    for escaped in (b"\\r", b"\\n", b"%0D", b"%0A"):
        piece = piece.replace(escaped, b"")
    return piece.translate(None, b" \t\r\n")


def files_below(directory: Path, name: str) -> Iterator[Place]:
    """Yield a place for each file below a directory that can be read."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield Place(f"{name}/{path.relative_to(directory)}", _pieces(path))


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            tail = b""
            while piece := file.read(_PIECE):
                yield tail + piece
                tail = piece[-_OVERLAP:]
    except (FileNotFoundError, PermissionError):  # a server that is alive removes files
        return


def dump(cluster: Cluster, database: str) -> Place:
    """Return a whole dump of a database, as a thief of backups would have it."""
    command = cluster.tool("pg_dump", "--no-owner", database=database)
    done = subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - the wheel's pg_dump
    return Place(f"pg_dump of {database}", (done.stdout,))


def processes(pids: Iterable[int]) -> Iterator[Place]:
    """Yield the environments and arguments of processes (Linux; elsewhere there is nothing)."""
    for pid in pids:
        for what in ("environ", "cmdline"):
            try:
                content = Path(f"/proc/{pid}/{what}").read_bytes()
            except OSError:
                continue
            yield Place(f"process {pid} {what}", (content,))
