"""The control database behind a pooler in transaction mode: each transaction says who it is.

Behind PgBouncer a session is ours for one transaction. So nothing may be left in it, and nothing
may be expected of it: no startup options, no prepared statements. The role and the limits that a
session of our own gets when it begins go along with each BEGIN, in the same round trip.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL

from schemas.errors import ConfigError

#: `?pooler=transaction` in SYNCWARD_DATABASE_URL; libpq never sees it.
_PARAMETER = "pooler"
_KNOWN = "transaction"


def split(url: URL) -> tuple[URL, bool]:
    """Return the URL as libpq takes it, and whether a pooler stands at its address."""
    chosen = url.query.get(_PARAMETER)
    if chosen not in (None, _KNOWN):
        raise ConfigError(
            f"SYNCWARD_DATABASE_URL: {_PARAMETER} can be {_KNOWN} only (right for session mode, "
            "too); without a pooler leave it out"
        )
    return url.difference_update_query([_PARAMETER]), chosen is not None


class PooledLink(psycopg.Connection[tuple[Any, ...]]):
    """An autocommit connection to a pooler, and what each of its transactions begins with."""

    opening: bytes = b""


def opening(settings: Mapping[str, str]) -> bytes:
    """Return one statement that sets all of this until the transaction ends."""
    calls = (f"set_config('{name}', '{value}', true)" for name, value in settings.items())
    return f"SELECT {', '.join(calls)}".encode()


def open_each_transaction(engine: Engine, settings: Mapping[str, str]) -> None:
    """Let every transaction of the engine begin with these settings.

    Its connections are in autocommit mode, so that the driver leaves BEGIN to us: two statements
    without parameters are one message.
    """
    statement = b"BEGIN; " + opening(settings)

    def begin(tx: Connection) -> None:
        driver = tx.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)  # noqa: S101 - the only driver we open
        try:
            driver.execute(statement)
        except psycopg.OperationalError as error:
            if driver.closed:
                tx.invalidate(error)
            raise

    event.listen(engine, "begin", begin)


@contextmanager
def together(link: psycopg.Connection[tuple[Any, ...]]) -> Iterator[None]:
    """Send several statements at once over an autocommit connection.

    Each stands alone, but behind a pooler: there they are one transaction, as the link's role.
    """
    if not isinstance(link, PooledLink):
        with link.pipeline():
            yield
        return
    with link.pipeline(), link.transaction():
        link.execute(link.opening)
        yield
