"""What both Postgres roles share: configuration, connecting, and errors in our words."""

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import psycopg
from psycopg import sql
from pydantic import BaseModel, ConfigDict, Field, field_validator

from connectors import authority
from connectors.egress import Lookup, look_up, resolve
from connectors.net import Host, validate_host
from connectors.postgres.errors import Answer, Kind, Role, answer, answer_to_text
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, CredentialsError, SyncwardError, TransientError

SECRET_FIELDS = ("password",)
#: Settings that say where the password is sent.
AIMED_BY = ("host", "port")

#: Seconds that a server has to take a request to cancel; it is sent again.
CANCEL_S = 2.0

_CAN_WATCH = 140_000

UNIQUE_VIOLATION, DUPLICATE_OBJECT = "23505", "42710"

Connection = psycopg.Connection[tuple[Any, ...]]


#: Bytes of the longest name; a server cuts longer ones off without an error.
_NAME_BYTES = 63


def fits(name: str) -> bool:
    """Say whether a server takes this name as it is: two names must never become one."""
    try:
        return "\x00" not in name and 0 < len(name.encode()) <= _NAME_BYTES
    except UnicodeEncodeError:  # half of a surrogate pair is no character
        return False


class PostgresConfig(BaseModel):
    """Clear settings of a Postgres resource."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    host: Host
    port: int = Field(5432, ge=1, le=65535)
    database: str = Field(min_length=1, max_length=63, pattern=r"^[^\x00]+$")
    user: str = Field(min_length=1, max_length=63, pattern=r"^[^\x00]+$")
    sslmode: Literal["disable", "prefer", "require", "verify-ca", "verify-full"] = "verify-full"
    sslrootcert: str | None = None
    #: Stored only where it was chosen: a worker of the version before does not know it.
    channel_binding: Literal["require", "prefer"] = Field(
        "require", exclude_if=lambda value: value == "require"
    )

    @field_validator("database", "user")
    @classmethod
    def _whole_name(cls, value: str) -> str:
        if not fits(value):
            raise ValueError("longer than the 63 bytes of a name; Postgres would cut it off")
        return value

    @field_validator("sslrootcert")
    @classmethod
    def _own_file(cls, value: str | None) -> str | None:
        return authority.named_well(value) if value else value

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
    "bytea_output": "hex",
    "xmloption": "content",
    "lc_monetary": "C",
    "array_nulls": "on",
    "quote_all_identifiers": "off",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "600s",
    # A worker whose host is gone says no more: the locks of its session are free within a minute.
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}


def check_link(config: PostgresConfig, policy: LinkPolicy) -> None:
    """Refuse a link that does not prove who answers, where the policy wants TLS."""
    if policy.tls_required and config.sslmode != "verify-full":
        raise ConfigError(
            f"{config.where}: sslmode {config.sslmode} is too weak for production, anybody could "
            "answer; set sslmode to verify-full, and sslrootcert to the authority's file",
            code="tls_too_weak",
        )


def connect(
    config: PostgresConfig,
    secrets: Mapping[str, str],
    *,
    role: Role,
    session: Mapping[str, str],
    policy: LinkPolicy,
    lookup: Lookup = look_up,
) -> Connection:
    """Return an autocommit connection from allow-listed fields only: no DSN, no options of users.

    It goes to the addresses that the egress guard has checked; the name stays for the certificate.
    The application name begins with `syncward:`; sources leave sessions named so out when they
    look for open transactions.
    """
    check_link(config, policy)
    tls = _tls(config)
    pinned = resolve(config.host, config.port, policy, lookup=lookup)
    settings = {**_SESSION, **session}
    with translated(config, role):
        return psycopg.connect(
            host=",".join([config.host] * len(pinned.addresses)),
            hostaddr=",".join(pinned.addresses),
            port=config.port,
            dbname=config.database,
            user=config.user,
            password=secrets.get("password", ""),
            passfile=os.devnull,
            **tls,
            require_auth="scram-sha-256",
            gssencmode="disable",
            target_session_attrs="any",
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


def where_it_is(conn: Connection, config: PostgresConfig) -> Lookup:
    """Return a look-up that knows one address: further sessions go where this one is."""
    name, address = validate_host(config.host), conn.info.hostaddr

    def lookup(host: str, port: int) -> Sequence[str]:
        return (address,) if host == name else look_up(host, port)

    return lookup


def _tls(config: PostgresConfig) -> dict[str, Any]:
    """Return libpq's TLS settings, all of them: none is left to files of the worker's home.

    ConfigError in the same words for every `sslrootcert` that libpq is not to open.
    """
    system = "system" if config.sslmode == "verify-full" else ""
    binding = {"disable": "disable", "prefer": "prefer"}.get(config.sslmode, config.channel_binding)
    named = config.sslrootcert if config.sslmode != "disable" else None  # then nobody reads it
    try:
        root = authority.checked(named) if named else system
    except authority.NoAuthority:
        raise authority.refused(config.where) from None
    return {
        "sslmode": config.sslmode,
        "sslrootcert": root,
        "sslcertmode": "disable",
        "ssl_min_protocol_version": "TLSv1.2",
        "channel_binding": binding,
    }


def begin_session(conn: Connection, asks: sql.Composable) -> tuple[Any, ...]:
    """Let the server notice within seconds that we died, also in the middle of a long statement.

    Servers before 14 find out when they next write; so do those on systems that cannot tell. And
    let it not take a session that waits for the other end for one that is forgotten.
    Returns the one row that `asks` selects, in the same round trip.
    """
    nothing = sql.SQL("NULL")
    query = sql.SQL("SELECT {}, {}, {}")
    if conn.info.server_version < _CAN_WATCH:
        return _row(conn, query.format(nothing, nothing, asks))
    waits = sql.SQL("set_config('idle_session_timeout', '0', false)")
    watched = sql.SQL("set_config('client_connection_check_interval', '3s', false)")
    with suppress(psycopg.errors.InvalidParameterValue):
        return _row(conn, query.format(watched, waits, asks))
    return _row(conn, query.format(nothing, waits, asks))


def _row(conn: Connection, query: sql.Composed) -> tuple[Any, ...]:
    row = conn.execute(query).fetchone()
    if row is None:
        raise RuntimeError("a question about the session returns one row")
    return row[2:]


class Line:
    """The socket beneath a session: lets other threads end what its thread waits for.

    It holds a descriptor of its own: the number of a closed one may be another session's by now.
    """

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._socket = socket.socket(fileno=os.dup(conn.fileno()))

    def cancel(self) -> None:
        """Ask the server to end what it does for this session."""
        self._conn.cancel_safe(timeout=CANCEL_S)

    def cut(self) -> None:
        """Shut the socket down, so that a thread that waits on it sees the end of the link."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the session; the server rolls back what was open."""
        self._conn.close()
        self._socket.close()


@contextmanager
def translated(config: PostgresConfig, role: Role) -> Iterator[None]:
    """Turn driver errors into ours. Their text may quote rows or passwords, ours never does.

    A misuse of the driver itself passes: that is our bug, and shown to nobody as such.
    """
    try:
        yield
    except psycopg.Error as error:
        found = explain(error, config, role)
        if found is None:
            raise
        raise found from error


def explain(error: psycopg.Error, config: PostgresConfig, role: Role) -> SyncwardError | None:
    """Say in our words who can act and what to do; None if no server or link is to blame."""
    if error.sqlstate is not None:
        known = _answer(error, error.sqlstate, role)
    elif isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        known = answer_to_text(str(error))  # looked at, never shown
    else:
        return None
    says = known.says.format(
        user=config.user,
        host=config.host,
        sslmode=config.sslmode,
        state=error.sqlstate,
        object=_object(error),
    )
    text = f"{config.where}: {says}"
    match known.kind:
        case Kind.CREDENTIALS:
            return CredentialsError(text, code=known.code)
        case Kind.CONFIG:
            return ConfigError(text, code=known.code)
        case Kind.TRANSIENT:
            return TransientError(text, code=known.code)


def _answer(error: psycopg.Error, state: str, role: Role) -> Answer:
    """Look the state up; a key held twice in the catalog is a race of two runs, not of rows."""
    if state == UNIQUE_VIOLATION and error.diag.schema_name == "pg_catalog":
        return answer(DUPLICATE_OBJECT, role)
    return answer(state, role)


#: Places in the server that name objects truly. Functions there can fill these fields with rows.
_TRUSTED_FILES = frozenset(
    {"aclchk.c", "execMain.c", "nbtinsert.c", "tuplesortvariants.c", "tuplesort.c", "ri_triggers.c"}
    | {"execIndexing.c", "execExprInterp.c", "domains.c"}
)
_DENIED = re.compile(r"permission denied for ([a-z ]+ \S.*)")


def beside_values(conn: Connection, part: sql.Composable) -> sql.SQL:
    """Return a part of a statement that also has values: a % in a name of the part is none."""
    return sql.SQL(part.as_string(conn).replace("%", "%%"))


def named(error: psycopg.Error) -> psycopg.errors.Diagnostic | None:
    """Return what the server complained about, if the server itself said so."""
    trusted = (error.diag.source_file or "").rsplit("/", 1)[-1] in _TRUSTED_FILES
    return error.diag if trusted else None


def _object(error: psycopg.Error) -> str:
    """Name what the server complained about, if the server itself said so."""
    diag = named(error)
    if diag is None:
        return ""
    denied = _DENIED.fullmatch(diag.message_primary or "")
    if denied:
        return f" for {denied[1]}"
    names = [diag.schema_name, diag.table_name or diag.datatype_name, diag.column_name]
    table = ".".join(name for name in names if name)
    by = f" ({diag.constraint_name})" if diag.constraint_name and table else ""
    return f" {table}{by}" if table else ""
