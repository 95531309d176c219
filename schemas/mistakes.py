"""What is wrong with something that a person wrote, in words: of pydantic's errors, and of names.

Values are never quoted: one may be a secret that stands in the wrong place.
"""

import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import AfterValidator, BaseModel

#: What pydantic says of a type, and what a person is told to write.
_WORDS = {
    "missing": "is missing",
    "model_type": "must be a mapping: keys with values below it, or {key: value}",
    "model_attributes_type": "must be a mapping: keys with values below it, or {key: value}",
    "dict_type": "must be a mapping: keys with values below it, or {key: value}",
    "tuple_type": "must be a list, e.g. [id]",
    "list_type": "must be a list, e.g. [id]",
    "string_type": "must be a text; put it in quotes",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
}


def in_words(mistake: Mapping[str, Any], known: Iterable[str] = ()) -> str:
    """Say what is wrong with one value; `known` are the keys that there are beside a wrong one."""
    kind, text = str(mistake["type"]), str(mistake["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        other = "remove it or correct its spelling"
        return f"unknown key; {meant(str(mistake['loc'][-1]), known, else_=other)}"
    if kind in _WORDS:
        return _WORDS[kind]
    return re.sub(r"^[A-Z][a-z]+ should ", "must ", text)


def meant(name: str, known: Iterable[str], *, else_: str) -> str:
    """Return `did you mean X?` where a known name is near, else what is said otherwise."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else else_


def matching(pattern: str, words: str) -> AfterValidator:
    """Return a check of a text that says in words what it must be."""
    wanted = re.compile(pattern)

    def check(value: str) -> str:
        if wanted.search(value) is None:
            raise ValueError(words)
        return value

    return AfterValidator(check)


def first_causes(mistakes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Leave out what only follows from others: a list counts as empty when its items are wrong."""
    places = [tuple(one["loc"]) for one in mistakes]
    return [
        one
        for one, place in zip(mistakes, places, strict=True)
        if one["type"] != "too_short"
        or not any(other[: len(place)] == place and other != place for other in places)
    ]


def keys_beside(model: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """Return the keys that a model takes where the last part of `place` is one that it does not."""
    at: Any = model
    for part in place[:-1]:
        at = _below(at, part)
    if not (isinstance(at, type) and issubclass(at, BaseModel)):
        return []
    return [field.alias or name for name, field in at.model_fields.items()]


def _below(at: Any, part: int | str) -> Any:  # noqa: ANN401 - annotations have no better type
    """Follow one part of a place through the types of fields."""
    if isinstance(at, type) and issubclass(at, BaseModel):
        by_name = {field.alias or name: field for name, field in at.model_fields.items()}
        field = by_name.get(str(part))
        return None if field is None else _model_in(field.annotation)
    inside = typing.get_args(at)
    return _model_in(inside[-1 if typing.get_origin(at) is dict else 0]) if inside else None


def _model_in(annotation: Any) -> Any:  # noqa: ANN401 - as above
    """Return what an annotation means but for `Annotated` and `| None`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _model_in(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in {typing.Union, types.UnionType}:
        some = [one for one in typing.get_args(annotation) if one is not type(None)]
        return _model_in(some[0]) if len(some) == 1 else None
    return annotation
