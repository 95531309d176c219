"""A session with a MariaDB server: pinned, under TLS whose name is checked, with a way to end it.

The driver is given a socket of ours to a checked address; the name stays for the certificate. A
server that offers no TLS is left before anything is said, and a login that would send the password
itself is refused, also under TLS.
"""

import os
import re
import socket
import ssl
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any, NoReturn

import pymysql
from pymysql import converters, cursors

from connectors import authority
from connectors.egress import Lookup, Pinned, look_up, resolve
from connectors.mariadb.tables import MariadbConfig
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, CredentialsError, SyncwardError, TransientError

_CONNECT_S = 10.0
#: Seconds that a server has to take a request to cancel; it is sent again.
_CANCEL_S = 2.0
_OLDEST = (10, 6)

#: Pinned on every session, so that values mean the same whatever the server's defaults are. A
#: slow destination must not end the read, and a lock must not hold a worker for a day.
_SESSION = (
    "SET SESSION time_zone = '+00:00', sql_mode = '', max_statement_time = 0, "
    "sql_select_limit = 18446744073709551615, net_write_timeout = 600, net_read_timeout = 600, "
    "wait_timeout = 600, lock_wait_timeout = 60, idle_transaction_timeout = 0, "
    "tx_isolation = 'REPEATABLE-READ', autocommit = 1"
)


class _Refused:
    """In the place of a login that would send the password to whoever asks."""

    def __init__(self, _connection: object) -> None:
        return

    def authenticate(self, _packet: object) -> NoReturn:
        raise _LoginMethod

    prompt = authenticate


class _LoginMethod(pymysql.OperationalError):
    """The server wants a login that we do not do."""


_NEVER = ("mysql_clear_password", "mysql_old_password", "dialog", "sha256_password")


class Session:
    """One session, used by one thread; `cancel` and `cut` come from others."""

    def __init__(self, config: MariadbConfig, secrets: Mapping[str, str], pinned: Pinned) -> None:
        self._config = config
        self._secrets = secrets
        self._pinned = pinned
        self._context = authority.context(config.sslrootcert, config.where)
        self._lock = Lock()
        self._unread: Any = None
        self._open()

    def _open(self) -> None:
        self._conn, self._socket = self._connect(_CONNECT_S)
        try:
            self.version = self._checked_version()
            self.thread = self._conn.thread_id()
            self.act(_SESSION)
        except BaseException:
            self.close()
            raise

    def _connect(self, seconds: float) -> tuple[Any, socket.socket]:
        """Return the driver's session after its login; it waits without an end from then on."""
        made: Any = pymysql.Connection(
            host=self._config.host,
            port=self._config.port,
            user=self._config.user,
            password=self._secrets.get("password", ""),
            database=self._config.database,
            charset="utf8mb4",
            conv={k: v for k, v in converters.conversions.items() if not isinstance(k, int)},
            ssl=self._context,
            auth_plugin_map=dict.fromkeys(_NEVER, _Refused),
            local_infile=False,
            read_default_file=None,
            read_timeout=seconds,
            write_timeout=seconds,
            autocommit=None,
            defer_connect=True,
        )
        with translated(self._config):
            plain = self._reach(seconds)
            own = socket.socket(fileno=os.dup(plain.fileno()))
            try:
                made.connect(plain)
            except BaseException as error:
                own.close()
                plain.close()
                if isinstance(error, struct.error | IndexError | ValueError | AssertionError):
                    raise ConfigError(
                        f"{self._config.where}: what answers there is no MariaDB; correct host and "
                        "port",
                        code="unsupported",
                    ) from None
                raise
        made._read_timeout = None  # noqa: SLF001 - a query may be silent for long; TCP watches
        return made, own

    def _reach(self, seconds: float) -> socket.socket:
        """Connect to the first of the checked addresses that answers."""
        last: OSError | None = None
        for address in self._pinned.addresses:
            try:
                made = socket.create_connection((address, self._config.port), seconds)
            except OSError as error:
                last = error
                continue
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
            return made
        raise _explain_os(last or OSError(), self._config) from last

    def _checked_version(self) -> str:
        text = str(self._conn.get_server_info())
        found = re.search(r"(\d+)\.(\d+)\.\d+-MariaDB", text)
        if found is None or (int(found[1]), int(found[2])) < _OLDEST:
            raise ConfigError(
                f"{self._config.where}: this is not MariaDB 10.6 or later; other servers and "
                "versions are not supported",
                code="unsupported",
            )
        return f"MariaDB {found[0].removesuffix('-MariaDB')}"

    @property
    def tls(self) -> str:
        """Name the version of TLS."""
        link = self._conn._sock  # noqa: SLF001 - the driver does not tell
        return str(link.version()) if isinstance(link, ssl.SSLSocket) else "none"

    def act(self, statement: str) -> None:
        """Run a statement without an answer."""
        self.all(statement)

    def all(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return all rows of a small answer, each value as the server writes it."""
        with translated(self._config), self._conn.cursor() as cursor:
            cursor.execute(query, values)
            return list(cursor.fetchall())

    def stream(self, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
        """Yield rows as the server sends them."""
        with translated(self._config):
            cursor = self._unread = cursors.SSCursor(self._conn)
            cursor.execute(query, values)
            while (row := cursor.fetchone()) is not None:
                yield row
            self._unread = None

    def undo(self) -> None:
        """End the transaction, and the session under an answer that nobody reads to its end."""
        if self._unread is not None:
            self._forsake(self._unread)
        elif self._conn.open:
            with suppress(pymysql.MySQLError, OSError):
                self._conn.rollback()

    def _forsake(self, cursor: Any) -> None:  # noqa: ANN401 - its inside has no types
        """Drop the link: the driver would read what is left of the answer, however much it is."""
        self._unread = None
        result = self._conn._result  # noqa: SLF001 - the driver has no other way
        if result is not None:
            result.unbuffered_active = False
        self._conn._result = None  # noqa: SLF001 - as above
        cursor._result = None  # noqa: SLF001 - as above
        self._conn._force_close()  # noqa: SLF001 - as above
        cursor.close()

    def ready(self) -> None:
        """Connect again, to the same addresses, if a read was left early."""
        if not self._conn.open:
            with self._lock:
                self._socket.close()
                self._open()

    def cancel(self) -> None:
        """End what the server does for this session, through a session of its own."""
        thread = self.thread
        conn, own = self._connect(_CANCEL_S)
        try:
            conn._read_timeout = _CANCEL_S  # noqa: SLF001 - nobody waits for it longer
            with translated(self._config), conn.cursor() as cursor:
                cursor.execute(f"KILL QUERY {int(thread)}")
        finally:
            own.close()
            conn._force_close()  # noqa: SLF001 - says no goodbye that could wait

    def cut(self) -> None:
        """Shut the socket down, so that a thread that waits on it sees the end of the link."""
        with self._lock:
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the session; the server rolls back what was open."""
        if self._unread is not None:
            self._forsake(self._unread)
        self._conn._force_close()  # noqa: SLF001 - says no goodbye that could wait
        self._socket.close()


def open_session(
    config: MariadbConfig,
    secrets: Mapping[str, str],
    policy: LinkPolicy,
    lookup: Lookup = look_up,
) -> Session:
    """Return a session at an address that the egress guard has checked."""
    return Session(config, secrets, resolve(config.host, config.port, policy, lookup=lookup))


_CREDENTIALS = "login {user} was refused; store the right password with: syncward resource rotate"
_CONFIG: dict[int, tuple[str, str]] = {
    1044: ("permission", "login {user} may not use this database; GRANT SELECT on it to {user}"),
    1049: ("no_database", "no such database; correct the resource's `database`"),
    1054: ("missing_object", "a column is gone; see: syncward resource discover"),
    1103: ("missing_object", "no such table; see: syncward resource discover"),
    1130: ("not_let_in", "it lets nobody in from this host; CREATE USER for the workers' hosts"),
    1142: ("permission", "login {user} may not read this; GRANT SELECT on it to {user}"),
    1143: ("permission", "login {user} may not read a column; GRANT SELECT on it to {user}"),
    1146: ("missing_object", "a table is gone; see: syncward resource discover"),
    1193: ("unsupported", "it lacks a setting of MariaDB 10.6"),
    1227: ("permission", "login {user} lacks a privilege; docs/mariadb.md shows the GRANTs"),
    1251: ("login_method", "it wants a login that is refused here; use mysql_native_password"),
    1356: ("refused_there", "a view there uses what is gone, or what its definer may not read"),
    1370: ("permission", "login {user} may not run a routine that a view uses"),
    1034: ("corrupted", "a table is damaged; CHECK TABLE says how much"),
    1194: ("corrupted", "a table is damaged; CHECK TABLE says how much"),
    1226: ("server_limit", "login {user} has reached a limit of its own; raise it there"),
    1820: ("refused_at_login", "the password of {user} has expired; set a new one there"),
    1862: ("refused_at_login", "the password of {user} has expired; set a new one there"),
    2026: ("tls_missing", "the server offers no TLS; turn it on there: ssl_cert, ssl_key"),
    2059: ("login_method", "it wants a login that is refused here; use mysql_native_password"),
    3159: ("tls_refused", "it refuses the link; look at require_secure_transport there"),
    4151: ("refused_at_login", "login {user} is locked there"),
}
_TRANSIENT: dict[int, tuple[str, str]] = {
    1021: ("disk_full", "its disk is full"),
    1037: ("out_of_memory", "it is short of memory"),
    1038: ("out_of_memory", "it is short of memory to sort"),
    1040: ("too_many_connections", "it takes no more connections; tried again"),
    1041: ("out_of_memory", "it is short of memory"),
    1053: ("server_restarting", "it is stopping; tried again"),
    1129: ("connection_refused", "it bars this host after failed links; FLUSH HOSTS there"),
    1203: ("too_many_connections", "{user} has no more connections; tried again"),
    1205: ("lock_timeout", "a lock was not given in time; tried again"),
    1213: ("deadlock", "it ended the read in favour of another transaction; tried again"),
    1317: ("cancelled_there", "the query was cancelled there"),
    1412: ("serialization", "a table was changed while the snapshot was taken; tried again"),
    1927: ("session_ended", "the session was ended there; tried again"),
    1969: ("cancelled_there", "the query was cancelled there by a time limit"),
    4166: ("too_many_connections", "{user} is barred for a while; tried again"),
}


#: A link that broke; the driver's own numbers are 2,000 and more.
_LOST = {0, 1152, 1153, 1158, 1159, 1160, 1161}


@contextmanager
def translated(config: MariadbConfig) -> Iterator[None]:
    """Turn the driver's errors into ours. Their text may quote rows, ours never does."""
    try:
        yield
    except pymysql.MySQLError as error:
        raise _explain(error, config) from error
    except OSError as error:
        raise _explain_os(error, config) from error


def _explain(error: pymysql.MySQLError, config: MariadbConfig) -> SyncwardError:
    """Say in our words who can act; the number tells, the text is not looked at."""
    if isinstance(error, _LoginMethod):
        return ConfigError(f"{config.where}: {_CONFIG[1251][1]}", code="login_method")
    under = getattr(error, "original_exception", None)
    if isinstance(under, OSError):
        return _explain_os(under, config)
    number = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    if number in {1045, 1698}:
        return CredentialsError(f"{config.where}: {_CREDENTIALS.format(user=config.user)}")
    for table, kind in ((_CONFIG, ConfigError), (_TRANSIENT, TransientError)):
        if number in table:
            code, says = table[number]
            return kind(f"{config.where}: {says.format(user=config.user)}", code=code)
    if number in {0, 1152, 1153, 1158, 1159, 1160, 1161} or (number >= 2000 and number < 3000):  # noqa: PLR2004 - the driver's own
        return TransientError(
            f"{config.where}: the connection was lost; it is tried again", code="connection_lost"
        )
    return ConfigError(
        f"{config.where}: refused what was asked (error {number}); see its log",
        code="refused_there",
    )


def _explain_os(error: OSError, config: MariadbConfig) -> SyncwardError:
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return ConfigError(
            f"{config.where}: TLS failed; check the server's certificate (name, authority, "
            "validity) and the resource's sslrootcert",
            code="tls_refused",
        )
    if isinstance(error, ConnectionRefusedError):
        says, code = "nothing listens there; check host and port, or start it", "connection_refused"
    elif isinstance(error, TimeoutError):
        says, code = "no answer in time; check host, port and firewalls if it stays so", "timeout"
    elif isinstance(error, ConnectionError | ssl.SSLEOFError):
        says, code = "the connection was lost; it is tried again", "connection_lost"
    else:
        says, code = "there is no way to this host; check the network if it stays so", "unreachable"
    return TransientError(f"{config.where}: {says}", code=code)
