"""Secrets: a string that refuses to be shown, compared by accident, or pickled."""

import json
from typing import NoReturn

#: Shorter secrets cannot be looked for in texts: they would be found everywhere.
SHORTEST_KNOWN = 8


class Secret:
    """Plaintext held as late and as briefly as possible; `reveal()` is the only way out."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the plaintext; call it where it is used, and do not keep the result."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled")


#: Parts of a name that make a value look like a secret (parameters with such names are refused).
SECRET_NAMES = ("password", "passwd", "secret", "token", "api_key", "apikey", "private_key")


def looks_secret(name: str) -> bool:
    """Say whether a parameter of this name belongs into the secret field instead."""
    folded = name.lower().replace("-", "_")
    return any(part in folded for part in SECRET_NAMES)


#: Members of a JSON object that are none: where a browser ends, which every answer may name.
_PUBLIC = frozenset({"redirect_uri"})


def texts_in(secret: str) -> list[str]:
    """Return every text inside a secret that is one, too: of a JSON object, a token with its end.

    A token is stored with the time of its end before it (connectors/rest/oauth.py).
    """
    end, blank, token = secret.partition(" ")
    if blank and end.isdecimal():
        return [token]
    if not secret.lstrip().startswith("{"):
        return []
    try:
        waiting: list[object] = [json.loads(secret)]
    except (ValueError, RecursionError):
        return []
    found: list[str] = []
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, dict):
            waiting += [value for name, value in one.items() if name not in _PUBLIC]
        elif isinstance(one, list):
            waiting += one
    return found
