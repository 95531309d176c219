"""Open sealed records: log bodies and outputs. For operators; each use leaves an audit event.

Nothing but records opens here: a key of another purpose is refused before it is unwrapped.
"""

from collections.abc import Iterable, Iterator, Sequence

from crypto.envelope import Context
from crypto.errors import CryptoError, UnsealError
from crypto.opening import open_all
from crypto.roots import Sealed, Unwraps, WrapContext, Wrapped
from crypto.streams import open_stream


def open_records(keys: Unwraps, items: Sequence[Sealed]) -> list[bytes | CryptoError]:
    """Open records with one unwrapping of their keys; one that does not open is its error."""
    return open_all(keys, "records", items)


def open_record_stream(
    keys: Unwraps,
    wrapped: Wrapped,
    wrap: WrapContext,
    chunks: Iterable[bytes],
    context: Context,
) -> Iterator[bytes]:
    """Open a record that was sealed as a stream; as `open_stream`, it may fail at the very end."""
    if wrap.purpose != "records" or wrap.account_id != context.account_id:
        raise UnsealError
    (dek,) = keys.unwrap_many([(wrapped, wrap)])
    if isinstance(dek, CryptoError):
        raise dek
    return open_stream(dek, wrap.dek_id, chunks, context)
