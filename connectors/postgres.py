"""What both Postgres roles share: configuration, connecting, and errors in our words."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from time import monotonic, sleep
from typing import Any, Literal

import psycopg
from psycopg import errors as pg
from pydantic import BaseModel, ConfigDict, Field, field_validator

from connectors.net import validate_host
from schemas.errors import ConfigError, CredentialsError, SyncwardError, TransientError

#: Seconds a server has for a request to cancel, and the session to come back after it.
CANCEL_S = 3.0
HANG_UP_AFTER_S = 2.0

SECRET_FIELDS = ("password",)

Connection = psycopg.Connection[tuple[Any, ...]]


class PostgresConfig(BaseModel):
    """Clear settings of a Postgres resource."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str
    port: int = Field(5432, ge=1, le=65535)
    database: str = Field(min_length=1, max_length=63, pattern=r"^[^\x00]+$")
    user: str = Field(min_length=1, max_length=63, pattern=r"^[^\x00]+$")
    sslmode: Literal["disable", "prefer", "require", "verify-ca", "verify-full"] = "verify-full"
    sslrootcert: str | None = None

    @field_validator("host")
    @classmethod
    def _one_host(cls, value: str) -> str:
        return validate_host(value)

    @property
    def where(self) -> str:
        """Name the server and database for people."""
        return f"{self.host}:{self.port}/{self.database}"


#: Pinned on every session, so that values mean the same on both ends whatever a role's defaults.
_SESSION = {
    "search_path": "pg_catalog",
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "lc_monetary": "C",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "600s",
}


def connect(
    config: PostgresConfig,
    secrets: Mapping[str, str],
    *,
    role: Literal["source", "destination"],
    session: Mapping[str, str],
) -> Connection:
    """Return an autocommit connection from allow-listed fields only: no DSN, no options of users.

    The application name begins with `syncward:`; sources leave sessions named so out when they
    look for open transactions.
    """
    settings = {**_SESSION, **session}
    with translated(config):
        return psycopg.connect(
            host=config.host,
            port=config.port,
            dbname=config.database,
            user=config.user,
            password=secrets.get("password", ""),
            sslmode=config.sslmode,
            sslrootcert=config.sslrootcert or ("system" if config.sslmode == "verify-full" else ""),
            require_auth="scram-sha-256",
            gssencmode="disable",
            connect_timeout=10,
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=30_000,
            client_encoding="utf8",
            application_name=f"syncward:{role}",
            options=" ".join(f"-c {name}={value}" for name, value in settings.items()),
            autocommit=True,
            prepare_threshold=None,
        )


class Line:
    """The socket beneath a session: lets another thread end a wait for a server that is silent."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._socket = socket.socket(fileno=os.dup(conn.fileno()))

    def cancel(self) -> None:
        """End what the server does for this session; hang up if that does not end the wait."""
        with suppress(psycopg.Error):
            self._conn.cancel_safe(timeout=CANCEL_S)
        until = monotonic() + HANG_UP_AFTER_S
        while self._waits():
            if monotonic() > until:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                return
            sleep(0.02)

    def _waits(self) -> bool:
        return self._conn.info.transaction_status == psycopg.pq.TransactionStatus.ACTIVE

    def close(self) -> None:
        """Close the session; the server rolls back what was open."""
        self._conn.close()
        self._socket.close()


@contextmanager
def translated(config: PostgresConfig) -> Iterator[None]:
    """Turn driver errors into ours. Their text may quote rows or passwords, ours never does."""
    try:
        yield
    except psycopg.Error as error:
        raise _explain(error, config) from error


_TRANSIENT_CLASSES = ("08", "40", "53", "55", "57", "58", "XX")


def _explain(  # noqa: C901, PLR0911 - one return per reason reads as a table
    error: psycopg.Error, config: PostgresConfig
) -> SyncwardError:
    where, state = config.where, error.sqlstate
    table = ".".join(filter(None, (error.diag.schema_name, error.diag.table_name)))
    match error:
        case pg.InvalidPassword() | pg.InvalidAuthorizationSpecification():
            return _refused(config)
        case pg.InvalidCatalogName():
            return ConfigError(f"{where}: no such database; correct the resource's `database`")
        case pg.InsufficientPrivilege():
            return ConfigError(_privilege(error, config))
        case pg.DiskFull():
            return TransientError(f"{where}: its disk is full; free space there", code="disk_full")
        case pg.UndefinedTable() | pg.UndefinedColumn() | pg.UndefinedObject():
            return ConfigError(
                f"{where}: a table, column or type is missing (SQLSTATE {state}); "
                "see: syncward resource discover"
            )
        case pg.UniqueViolation():
            return ConfigError(
                f"{where}: {table or 'the table'} would hold a key twice; the key of the stream "
                "is not unique"
            )
        case pg.NotNullViolation():
            return ConfigError(f"{where}: {table}.{error.diag.column_name} would be NULL")
        case pg.QueryCanceled():
            return TransientError(f"{where}: the query was cancelled there", code="cancelled_there")
        case _ if state is None:
            return _unreachable(error, config)
        case _ if state.startswith(_TRANSIENT_CLASSES):
            return TransientError(f"{where}: busy or shutting down (SQLSTATE {state})")
        case _:
            return ConfigError(f"{where}: refused what was asked (SQLSTATE {state})")


def _refused(config: PostgresConfig) -> CredentialsError:
    return CredentialsError(
        f"{config.where}: login {config.user} was refused; "
        "store the right password with: syncward resource rotate NAME"
    )


def _privilege(error: psycopg.Error, config: PostgresConfig) -> str:
    """Postgres names the object in its primary message, which quotes identifiers only."""
    what = error.diag.message_primary or "permission denied"
    return f"{config.where}: {what}; GRANT it to {config.user}, see docs/connectors.md"


def _unreachable(  # noqa: PLR0911 - as above
    error: psycopg.Error, config: PostgresConfig
) -> SyncwardError:
    """Tell failures to connect apart; libpq has no SQLSTATE for them. Its text is never shown."""
    text = str(error)
    where = config.where
    if "password authentication failed" in text or "no password supplied" in text:
        return _refused(config)
    if "authentication method requirement" in text or "server did not complete auth" in text:
        return ConfigError(f"{where}: it asked for another login method than scram-sha-256")
    if "does not exist" in text and "database" in text:
        return ConfigError(f"{where}: no such database; correct the resource's `database`")
    if "could not translate host name" in text or "failed to resolve host" in text:
        return ConfigError(f"{where}: no host of this name; correct the resource's `host`")
    if "SSL" in text or "certificate" in text:
        return ConfigError(
            f"{where}: TLS failed under sslmode {config.sslmode}; check the server's certificate "
            "and the resource's sslmode and sslrootcert"
        )
    if "Connection refused" in text:
        return TransientError(f"{where}: nothing listens there; check host and port, or start it")
    return TransientError(f"{where}: the connection failed or was lost")
