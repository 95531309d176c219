"""Looks for a secret in everything that a run leaves behind. Shares no code with the redaction."""

import html
import json
import re
import shlex
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, quote_plus

from tests.world import Control


def forms_of(secret: str) -> dict[str, str]:
    """What somebody else's encoders make of it: written without a look at ours."""
    raw = secret.encode()
    found = {
        "raw": secret,
        "url": quote(secret, safe=""),
        "url_path": quote(secret),
        "url_plus": quote_plus(secret),
        "url_lower": re.sub("%..", lambda m: m[0].lower(), quote(secret, safe="")),
        "url_every_byte": "".join(f"%{byte:02X}" for byte in raw),
        "url_twice": quote(quote(secret, safe=""), safe=""),
        "json": json.dumps(secret)[1:-1],
        "json_unicode": json.dumps(secret, ensure_ascii=False)[1:-1],
        "json_slash": json.dumps(secret)[1:-1].replace("/", "\\/"),
        "json_in_json": json.dumps(json.dumps(secret))[3:-3],
        "repr": repr(secret)[1:-1],
        "repr_of_bytes": repr(raw)[2:-1],
        "html": html.escape(secret),
        "hex": raw.hex(),
        "hex_upper": raw.hex().upper(),
        "bytea": f"\\x{raw.hex()}",
        "url_of_json": quote(json.dumps(secret)[1:-1], safe=""),
        "sql": secret.replace("'", "''"),
        "sql_identifier": secret.replace('"', '""'),
        "sql_in_sql": secret.replace("'", 4 * "'"),
        "format": secret.replace("%", "%%"),
        "shell": shlex.quote(f" {secret}")[2:-1],
        "lower": secret.lower(),
        "upper": secret.upper(),
        "octal": "".join(f"\\{byte:03o}" if byte > ord("~") else chr(byte) for byte in raw),
        "octal_every_byte": "".join(f"\\{byte:03o}" for byte in raw),
        "hex_colons": raw.hex(":"),
        "hex_dashes": raw.hex("-").upper(),
        "hex_groups": raw.hex(" ", 2),
    }
    for name, inner in (("url", quote(secret, safe="")), ("json", json.dumps(secret)[1:-1])):
        found[f"base64_of_{name}"] = b64encode(b"user:" + inner.encode() + b"!!").decode()
    line = b64encode(b"user:" + raw + b"!!").decode()
    found["base64_in_url"] = quote(line, safe="")
    for name, end in (("lf", "\n"), ("crlf", "\r\n "), ("escaped", "\\n"), ("url", "%0D%0A")):
        found[f"base64_lines_{name}"] = end.join(line[i : i + 8] for i in range(0, len(line), 8))
    for shift in range(3):
        for name, encode in (("base64", b64encode), ("base64url", urlsafe_b64encode)):
            found[f"{name}_{shift}"] = encode(b"user:"[: 3 + shift] + raw + b"!!").decode()
    return found


def hits(text: str, secret: str) -> list[str]:
    """Name the forms in which the secret stands in the text."""
    forms = forms_of(secret)
    for name in forms:
        if name.startswith("base64"):  # without what its neighbours decide
            forms[name] = forms[name][6:-6]
    return [name for name, form in forms.items() if form in text]


def tables(control: Control) -> str:
    """Return every value of every table of the control database, bytes also as text."""
    names = control.all(
        "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables "
        "WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
    )
    values = [
        value
        for (name,) in names
        for (row,) in control.all(f"SELECT to_jsonb(t) FROM {name} t")
        for value in _leaves(row)
    ]
    return "\n".join(values)


def _leaves(value: object) -> Iterator[str]:
    match value:
        case dict():
            for key, item in value.items():
                yield key
                yield from _leaves(item)
        case list():
            for item in value:
                yield from _leaves(item)
        case str():
            yield value
            if value.startswith("\\x"):
                yield bytes.fromhex(value[2:]).decode("utf-8", "replace")
            if value.startswith(("{", "[")):
                yield from _leaves(json.loads(value)) if _is_json(value) else ()
        case _:
            yield json.dumps(value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def redis(client: Any) -> str:
    """Return every key and value of a Redis."""
    found: list[bytes] = []
    for key in client.keys("*"):
        match client.type(key):
            case b"string":
                found += [key, client.get(key)]
            case b"list":
                found += [key, *client.lrange(key, 0, -1)]
            case b"set":
                found += [key, *client.smembers(key)]
            case b"zset":
                found += [key, *client.zrange(key, 0, -1)]
            case b"hash":
                found += [key, *client.hkeys(key), *client.hvals(key)]
            case other:
                raise AssertionError(other)
    return "\n".join(part.decode("utf-8", "replace") for part in found)
