"""Opens every sealed record with the operator's keyring: the checker reads what they say."""

from collections.abc import Iterator
from pathlib import Path

from crypto import keyring as keyrings
from crypto.cache import KeyCache
from crypto.envelope import Context, take_apart
from crypto.records import open_records
from crypto.roots import Sealed, WrapContext, Wrapped
from schemas.sealed_lines import Place, line_context, output_context, unpacked
from tests.faults.history import History

_BATCH = 5_000


def opened_logs(history: History, keyring: Path | None) -> tuple[list[str], int]:
    """Return what the log lines say, and how many say nothing because they do not open."""
    rows = history.rows("SELECT account_id, run_id, at, level, stream, envelope FROM run_logs")
    items = [
        (r.envelope, line_context(r.account_id, r.run_id, r.at, r.level, r.stream)) for r in rows
    ]
    texts, lost = _opened(history, keyring, items)
    return [unpacked(text).message for text in texts], lost


def opened_outputs(history: History, keyring: Path | None) -> tuple[list[str], int]:
    """Return the documents of runs, and how many do not open."""
    rows = history.rows("SELECT account_id, run_id, envelope FROM run_outputs")
    items = [(row.envelope, output_context(row.account_id, row.run_id)) for row in rows]
    texts, lost = _opened(history, keyring, items)
    return [text.decode() for text in texts], lost


def _opened(
    history: History, keyring: Path | None, items: list[tuple[bytes | None, Place]]
) -> tuple[list[bytes], int]:
    sealed = [(bytes(envelope), place) for envelope, place in items if envelope is not None]
    if keyring is None:
        return [], len(sealed)
    keys = KeyCache(keyrings.load(str(keyring)))
    texts = [text for text in _texts(history, keys, sealed) if isinstance(text, bytes)]
    return texts, len(sealed) - len(texts)


def _texts(history: History, keys: KeyCache, sealed: list[tuple[bytes, Place]]) -> Iterator[object]:
    rows = history.rows("SELECT id, account_id, root_id, wrapped FROM keystore.dek")
    stored = {row.id: row for row in rows}
    wanted = []
    for envelope, place in sealed:
        key = stored.get(take_apart(envelope).dek_id)
        if key is not None:
            wrap = WrapContext(key.account_id, "records", key.id)
            wrapped = Wrapped(key.root_id, bytes(key.wrapped))
            wanted.append(Sealed(wrapped, wrap, envelope, Context(*place)))
    for start in range(0, len(wanted), _BATCH):
        yield from open_records(keys, wanted[start : start + _BATCH])
