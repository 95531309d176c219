"""Small languages of a manifest: `{{ config.owner }}` in texts, dotted places in JSON.

Neither computes anything. A value that is put into a URL cannot change where the URL leads.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

#: Values by name: `config` are the resource's parameters, `partition` is of the parent's record,
#: `stream_interval` the window, `schema` the fields that are read, `creation_response` a job.
Names = Mapping[str, Mapping[str, object]]

_HOLE = re.compile(
    r"\{\{\s*(config|partition|stream_interval|schema|creation_response)"
    r"\.([A-Za-z_][A-Za-z0-9_]{0,62})\s*\}\}"
)
_HOST_PART = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


def holes(text: str) -> set[tuple[str, str]]:
    """Return the names that a text uses; ValueError for braces that are none of ours."""
    left = _HOLE.sub("", text)
    if "{{" in left or "}}" in left:
        raise ValueError(
            "write {{ config.NAME }} for a parameter, {{ partition.NAME }} for a parent's field, "
            "or a name of stream_interval, schema or creation_response"
        )
    return {(space, name) for space, name in _HOLE.findall(text)}


def filled(text: str, names: Names) -> str:
    """Return the text with its values as they are."""
    return _HOLE.sub(lambda m: _text(names[m[1]].get(m[2], "")), text)


def listed(text: str, names: Names) -> list[str] | None:
    """Return the parts of a value with commas, where a text is one hole and nothing else."""
    match = _HOLE.fullmatch(text)
    if match is None:
        return None
    return [part for part in _text(names[match[1]][match[2]]).split(",") if part]


def filled_path(text: str, names: Names) -> str:
    """Return a path whose values stay inside their segment; ValueError where one would climb."""

    def segment(match: re.Match[str]) -> str:
        value = _text(names[match[1]].get(match[2], ""))
        if not value or value in {".", ".."}:
            raise ValueError(f"{match[1]}.{match[2]} is empty or no part of a path")
        return quote(value, safe="")

    return _HOLE.sub(segment, text)


def filled_base(text: str, names: Names) -> str:
    """Return the URL of an API.

    A value is all of it, or all but a path behind it, or only letters, digits, dots and dashes.
    """
    begin = _HOLE.match(text.strip())
    behind = text.strip()[begin.end() :] if begin else ""
    if begin and (not behind or (behind.startswith("/") and not _HOLE.search(behind))):
        whole = filled(begin[0], names)
        return f"{whole.rstrip('/')}{behind}" if behind else whole

    def part(match: re.Match[str]) -> str:
        value = _text(names[match[1]][match[2]])
        if not _HOST_PART.fullmatch(value):
            raise ValueError(f"{match[1]}.{match[2]}: letters, digits, dots and dashes only")
        return value

    return _HOLE.sub(part, text)


def route_of(url: str) -> str:
    """Return the path of a URL as it is written, with its holes; of one that is a hole, that."""
    bare = re.split(r"[?#]", url, maxsplit=1)[0].strip()
    _, scheme, rest = bare.partition("://")
    return f"/{rest.partition('/')[2]}" if scheme else bare


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def place(written: str | Sequence[str]) -> tuple[str, ...]:
    """Return the steps of a dotted place; names that hold a dot are written as a list."""
    if isinstance(written, str):
        return tuple(written.split(".")) if written else ()
    if not isinstance(written, list | tuple) or not all(isinstance(one, str) for one in written):
        raise ValueError("write a place as names with dots, paging.next, or as a list of names")
    return tuple(written)


class Missing:
    """Stands for what is not there; JSON's null is."""


MISSING = Missing()


def found(document: Any, steps: Sequence[str]) -> Any:  # noqa: ANN401 - JSON
    """Return what lies at a place, or MISSING; a number steps into a list."""
    for step in steps:
        if isinstance(document, dict):
            document = document.get(step, MISSING)
        elif isinstance(document, list) and step.isdecimal() and int(step) < len(document):
            document = document[int(step)]
        else:
            return MISSING
    return document


def is_nothing(value: object) -> bool:
    """Say whether a value says nothing: it is not there, null, false or an empty text."""
    return value is MISSING or value is None or value is False or value == ""
