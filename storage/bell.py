"""Tell schedulers that somebody asked for a run: they look at once instead of a moment later.

A notification of Postgres: it comes with the commit, and whoever asks needs no other server. It may
be lost without harm, as schedulers look again and again anyhow. Behind a pooler nobody hears it.
"""

from typing import Any

import psycopg
from sqlalchemy import Connection, text

from storage.pooler import PooledLink

_CHANNEL = "syncward_bell"

Link = psycopg.Connection[tuple[Any, ...]]


def ring(tx: Connection) -> None:
    """Wake the schedulers when `tx` commits.

    The server lets transactions that notify commit one after the other. So only what people ask for
    rings, never a due schedule or the end of a run.
    """
    tx.execute(text("SELECT pg_notify(:channel, '')"), {"channel": _CHANNEL})


def attend(link: Link) -> bool:
    """Begin to listen on a connection of its own; False behind a pooler, which takes it away."""
    if isinstance(link, PooledLink):
        return False
    link.execute(f"LISTEN {_CHANNEL}")  # a constant of ours
    return True


def heard(link: Link, seconds: float) -> bool:
    """Wait until somebody rings; False if nobody did."""
    return any(True for _ in link.notifies(timeout=seconds, stop_after=1))
