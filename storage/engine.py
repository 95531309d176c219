"""Connect to the control database as one process's role, and say clearly when that fails."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Literal, TypeVar

import psycopg
from psycopg import errors as pg
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry

from schemas.errors import AuditUnavailable, ConfigError, SyncwardError, TransientError
from storage import pooler
from storage.silence import WATCH

Process = Literal["migrator", "scheduler", "worker", "operator", "sealer", "auditor"]
Database = Literal["control database", "keystore"]

#: What a person corrects when a database cannot be used.
_SETTINGS_OF: dict[Database, str] = {
    "control database": "SYNCWARD_DATABASE_URL",
    "keystore": "SYNCWARD_KEYSTORE_URL",
}
_DATABASE = "syncward_database"

_Driver = psycopg.Connection[tuple[Any, ...]]

#: libpq options of every control link: notice a dead peer in seconds, not in hours.
_LINK: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "gssencmode": "disable",
    "ssl_min_protocol_version": "TLSv1.2",
}

#: A pooled connection that was used so recently is taken to be alive.
FRESH_S = 1.0


def parse_url(url: str) -> URL:
    """Return the URL for psycopg; ConfigError (which never quotes it) if it is none."""
    return _parse(url)[0]


def _parse(url: str) -> tuple[URL, bool]:
    """Return the URL for psycopg, and whether it leads to a pooler."""
    try:
        made = make_url(url).set(drivername="postgresql+psycopg")
    except (ArgumentError, ValueError):
        raise ConfigError(
            "SYNCWARD_DATABASE_URL: not a URL; write postgresql://login:password@host:5432/database"
        ) from None
    return pooler.split(made)


#: Tables of run control are empty at times, and a plan that was made then would read them whole
#: when they are full; such a plan lives as long as its session. Everything that schedulers and
#: workers ask has an index. Without `jit` the price tag of a scan that has none compiles nothing.
_BY_INDEX = {"enable_seqscan": "off", "jit": "off"}


def _link(url: URL) -> dict[str, Any]:
    """Return the link's options without what the URL says itself.

    A password is shown to nobody who does not prove that he knows it (`require_auth=` in the URL
    says otherwise, for a pooler with md5). A login without one is by certificate or by socket.
    """
    proof = {"require_auth": "scram-sha-256"} if url.password else {}
    return {name: value for name, value in {**_LINK, **proof}.items() if name not in url.query}


def _settings(process: Process, statement_timeout_ms: int) -> dict[str, str]:
    """Return what holds in each transaction of a process; its role comes first."""
    role = "owner" if process == "migrator" else process
    return {
        "role": f"syncward_{role}",
        "search_path": "public",
        "TimeZone": "UTC",
        # somebody waits at a prompt; a process does not mind
        "lock_timeout": "5s" if process in {"operator", "auditor"} else "10s",
        "statement_timeout": f"{statement_timeout_ms}ms",
        "idle_in_transaction_session_timeout": "60s",
        **(_BY_INDEX if process in {"scheduler", "worker", "sealer"} else {}),
    }


def _options(settings: dict[str, str]) -> str:
    """Return the startup options that give a session of our own these settings."""
    return " ".join(f"-c {name}={value}" for name, value in settings.items())


def open_engine(
    url: str, process: Process, *, pool_size: int = 5, database: Database = "control database"
) -> Engine:
    """Return an engine whose transactions have the least role of this process; connects lazily."""
    parsed, pooled = _parse(url)
    settings = _settings(process, 300_000 if process == "migrator" else 30_000)
    own: dict[str, Any] = {"options": _options(settings)}
    if pooled:
        own = {"prepare_threshold": None, "autocommit": True}  # see pooler.open_each_transaction
    engine = create_engine(
        parsed,
        pool_size=pool_size,
        max_overflow=pool_size,
        hide_parameters=True,  # parameters may hold what people typed
        execution_options={_DATABASE: database},
        connect_args={**_link(parsed), "application_name": f"syncward-control:{process}", **own},
    )
    if process != "migrator":  # migrations may take their time
        WATCH.over(engine)  # first: the question of `_refuse_dead` may stay unanswered, too
    if pooled:
        pooler.open_each_transaction(engine, settings)
    else:
        event.listen(engine, "connect", _refuse_another_role(settings["role"]))
    event.listen(engine, "checkin", _note_use)
    event.listen(engine, "checkout", _refuse_dead)
    return engine


def setting_of(engine: Engine) -> tuple[Database, str]:
    """Return which database an engine leads to, and the setting that says where it is."""
    database: Database = engine.get_execution_options().get(_DATABASE, "control database")
    return database, _SETTINGS_OF[database]


def _refuse_another_role(role: str) -> Callable[[_Driver, ConnectionPoolEntry], None]:
    """Return a check that a new session has our role: a pooler may drop options in silence."""

    def check(link: _Driver, _: ConnectionPoolEntry) -> None:
        row = link.execute("SELECT current_user").fetchone()
        link.rollback()
        if row != (role,):
            link.close()
            raise ConfigError(
                f"control database: something between dropped the role {role}; "
                "if it is a pooler, add ?pooler=transaction to SYNCWARD_DATABASE_URL"
            )

    return check


def _note_use(_: object, record: ConnectionPoolEntry) -> None:
    record.info["used_at"] = monotonic()


def _refuse_dead(link: _Driver, record: ConnectionPoolEntry, _: object) -> None:
    """Ask a connection that was idle whether it lives; one used just now is not worth a round trip.

    The pool replaces one that is refused, as `pool_pre_ping` would.
    """
    if monotonic() - record.info.get("used_at", 0.0) < FRESH_S:
        return
    try:
        link.execute("SELECT")
        link.rollback()
    except psycopg.Error:
        raise DisconnectionError from None


def open_link(url: str, process: Process) -> _Driver:
    """Return one autocommit connection outside any pool, for a thread that must not wait.

    What it says, it says within `pooler.together`.
    """
    parsed, pooled = _parse(url)
    settings = _settings(process, 5_000)
    known: dict[str, Any] = {
        "host": parsed.host,
        "port": parsed.port or 5432,
        "dbname": parsed.database,
        "user": parsed.username,
        "password": parsed.password,
        "autocommit": True,
        "application_name": f"syncward-control:{process}-heartbeat",
        **_link(parsed),
        **parsed.query,
    }
    with explained(parsed):
        if not pooled:
            return psycopg.connect(**known, options=_options(settings))
        link = pooler.PooledLink.connect(**known, prepare_threshold=None)
    link.opening = pooler.opening(settings)
    return link


def run_script(tx: Connection, sql: str) -> None:
    """Execute several statements without parameters, percent signs and all."""
    driver = tx.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)  # noqa: S101 - the only driver we open
    driver.execute(sql.encode())


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction: commit at the end, roll back on any exception, explain a dead database."""
    database = engine.get_execution_options().get(_DATABASE, "control database")
    with explained(engine.url, database), engine.begin() as tx:
        yield tx


@contextmanager
def explained(url: URL, database: Database = "control database") -> Iterator[None]:
    """Turn a driver's failure into one of ours; its text may quote parameters, ours never does."""
    try:
        yield
    except DBAPIError as error:
        original = error.orig if isinstance(error.orig, psycopg.Error) else psycopg.Error()
        raise _explain(original, url, database) from error
    except psycopg.Error as error:
        raise _explain(error, url, database) from error


_TRANSIENT = (
    pg.AdminShutdown,
    pg.CrashShutdown,
    pg.CannotConnectNow,
    pg.QueryCanceled,
    pg.TooManyConnections,
    pg.IdleInTransactionSessionTimeout,
    pg.DiskFull,
    pg.OutOfMemory,
)


#: The server has undone the transaction and would take the same one again: after a deadlock, behind
#: a lock, or where the columns of a prepared statement have become more (an upgrade, 0A000).
_ROLLED_BACK = (
    pg.SerializationFailure,
    pg.DeadlockDetected,
    pg.LockNotAvailable,
    pg.FeatureNotSupported,
)
ROLLED_BACK = "rolled_back"
_T = TypeVar("_T")


def again(work: Callable[[], _T]) -> _T:
    """Do a transaction's worth of work, a second time if the server has undone it."""
    try:
        return work()
    except TransientError as error:
        if error.code not in {ROLLED_BACK, AuditUnavailable.code}:
            raise
    return work()


def _explain(  # noqa: C901, PLR0911 - one return per reason reads as a table
    error: psycopg.Error, url: URL, database: Database
) -> SyncwardError:
    where = f"{database} {url.host}:{url.port or 5432}/{url.database}"
    match error:
        case pg.InvalidPassword() | pg.InvalidAuthorizationSpecification():
            return ConfigError(
                f"{where}: login {url.username} was refused; check {_SETTINGS_OF[database]}"
            )
        case pg.InvalidCatalogName():
            return ConfigError(f"{where}: no such database; create it, then: syncward db upgrade")
        case pg.UndefinedTable() | pg.UndefinedColumn() | pg.UndefinedFunction():
            return ConfigError(f"{where}: not migrated to this version; run: syncward db upgrade")
        case pg.DiskFull():
            return TransientError(f"{where}: its disk is full; free space, then try again")
        case pg.ReadOnlySqlTransaction() if database == "control database":
            return AuditUnavailable(
                f"{where}: it is read-only, so no event can be written and nothing was done; "
                "point SYNCWARD_DATABASE_URL at the primary, or make it writable, then try again"
            )
        case pg.InvalidParameterValue() | pg.UndefinedObject() if error.sqlstate in {
            "22023",
            "42704",
        }:
            return ConfigError(
                f"{where}: role missing, or not granted to login {url.username}; "
                "run: syncward db upgrade"
            )
        case pg.InsufficientPrivilege():
            detail = error.diag.message_primary or "permission denied"
            return ConfigError(
                f"{where}: {detail}; the login lacks a syncward_* role (docs/profiles.md says "
                "which for what), or the change was unaudited"
            )
        case _ if isinstance(error, _ROLLED_BACK):
            return TransientError(
                f"{where}: undone by the server (SQLSTATE {error.sqlstate}); try again",
                code=ROLLED_BACK,
            )
        case _ if isinstance(error, _TRANSIENT):
            return TransientError(
                f"{where}: busy or shutting down (SQLSTATE {error.sqlstate}); try again"
            )
        case psycopg.OperationalError() if error.sqlstate is None:
            return _unreachable(error, where, url, _SETTINGS_OF[database])
        case _:
            return SyncwardError(f"{where}: unexpected answer (SQLSTATE {error.sqlstate})")


def _unreachable(error: psycopg.Error, where: str, url: URL, setting: str) -> SyncwardError:
    """Libpq gives no SQLSTATE before the session stands: tell a refusal from an absence."""
    text = str(error)  # looked at, never shown
    if "password authentication failed" in text or "no password supplied" in text:
        return ConfigError(f"{where}: login {url.username} was refused; check {setting}")
    if "does not exist" in text and "database" in text:
        return ConfigError(f"{where}: no such database; create it, then: syncward db upgrade")
    if "role" in text or "permission denied to set" in text:
        return ConfigError(
            f"{where}: role missing or not granted to login {url.username}; "
            "run: syncward db upgrade"
        )
    if "unsupported startup parameter" in text:
        return ConfigError(f"{where}: a pooler answers; add ?pooler=transaction to {setting}")
    if "certificate" in text or "SSL" in text:
        return ConfigError(f"{where}: TLS refused; check sslmode and sslrootcert in the URL")
    return TransientError(
        f"{where}: not reachable; start it (development: syncward up --dev), or check {setting}"
    )
