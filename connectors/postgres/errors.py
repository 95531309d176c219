"""Every way in which a Postgres can fail, as data: who can act, the stable code, our sentence.

`answer()` looks up what a server said by its SQLSTATE, `answer_to_text()` what libpq said where
there is none. A server's own words are never passed on: they may quote rows or passwords, also in
its fields for names, which any function there can fill. docs/errors.md shows these tables (tested).
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Role = Literal["source", "destination"]


class Kind(StrEnum):
    """Who can act: schemas/errors.py."""

    CONFIG = "config"
    CREDENTIALS = "credentials"
    TRANSIENT = "transient"


@dataclass(frozen=True, slots=True)
class Answer:
    """`says` follows the server's address; it may name {user}, {database}, {host} and the like."""

    kind: Kind
    code: str
    says: str


def _config(code: str, says: str) -> Answer:
    return Answer(Kind.CONFIG, code, says)


def _transient(code: str, says: str) -> Answer:
    return Answer(Kind.TRANSIENT, code, says)


_LOGIN = Answer(
    Kind.CREDENTIALS,
    "credentials",
    "login {user} was refused; store the right password with: syncward resource rotate NAME",
)
_LOST = _transient("connection_lost", "the connection was lost; it is tried again")
_PROTOCOL = _transient(
    "connection_lost", "the connection went out of step (SQLSTATE {state}); it is tried again"
)
_RESTARTING = _transient("server_restarting", "it is starting or shutting down; tried again")
_TOO_MANY = _transient(
    "too_many_connections",
    "it takes no more connections; tried again. If it stays so: raise max_connections or the "
    "limit of {user}, or lower the resource's runs_max or the streams' ranges_at_once",
)
_NO_DATABASE = _config("no_database", "no such database; correct the resource's `database`")
_MISSING = _config(
    "missing_object",
    "a table, column, type or function is missing (SQLSTATE {state}); see: syncward resource "
    "discover",
)
_RACE = _transient("catalog_race", "two runs made the same object at once; tried again")
_LIMIT = _config(
    "server_limit", "a limit of the server is reached (SQLSTATE {state}); raise it there"
)
_OUT_OF_ROOM = _transient("out_of_memory", "it is short of memory or room (SQLSTATE {state})")
_UNSUPPORTED = _config(
    "unsupported",
    "it does not know how to do this (SQLSTATE {state}); is it Postgres 12 or later, and no other "
    "system that speaks its protocol?",
)
_REFUSED = _config("refused_there", "refused what was asked (SQLSTATE {state}); see its log")
_ROUTINE = _config(
    "raised_there",
    "a function, trigger or rule of its own raised an error (SQLSTATE {state}); see its log",
)
_TYPES = _config(
    "types_differ", "a type does not fit (SQLSTATE {state}); compare the columns on both sides"
)
_CONSTRAINT = _config(
    "constraint",
    "a constraint{object} refuses the rows (SQLSTATE {state}); correct the rows at the source or "
    "drop it",
)
_DATA_OUT = _config(
    "data_refused",
    "a value cannot be read as what it is said to be (SQLSTATE {state}); correct the view or the "
    "rows",
)
_DATA_IN = _config(
    "data_refused",
    "a value does not fit its column (SQLSTATE {state}); correct the rows at the source or the "
    "column",
)
_FOREIGN = _config(
    "foreign_table", "a foreign table behind it failed (SQLSTATE {state}); mend it there"
)
_CORRUPTED = _config(
    "corrupted", "it reports damaged data or indexes (SQLSTATE {state}); see its log, restore it"
)
_SESSION = _transient("session_ended", "it ended an idle session (SQLSTATE {state}); tried again")

#: Two-character classes, all of the Postgres manual (appendix A) and 72, which older servers have.
CLASSES: dict[str, tuple[str, Answer]] = {
    "00": ("successful completion", _REFUSED),
    "01": ("warning", _REFUSED),
    "02": ("no data", _REFUSED),
    "03": ("statement not yet complete", _PROTOCOL),
    "08": ("connection exception", _LOST),
    "09": ("triggered action exception", _ROUTINE),
    "0A": ("feature not supported", _UNSUPPORTED),
    "0B": ("invalid transaction initiation", _REFUSED),
    "0F": ("locator exception", _REFUSED),
    "0L": ("invalid grantor", _REFUSED),
    "0P": ("invalid role", _REFUSED),
    "0Z": ("diagnostics exception", _ROUTINE),
    "10": ("XQuery error", _DATA_OUT),
    "20": ("case not found", _ROUTINE),
    "21": ("cardinality violation", _DATA_OUT),
    "22": ("data exception", _DATA_IN),
    "23": ("integrity constraint violation", _CONSTRAINT),
    "24": ("invalid cursor state", _PROTOCOL),
    "25": ("invalid transaction state", _PROTOCOL),
    "26": ("invalid statement name", _PROTOCOL),
    "27": ("triggered data change violation", _ROUTINE),
    "28": ("invalid authorization", _LOGIN),
    "2B": ("dependent privileges exist", _REFUSED),
    "2D": ("invalid transaction termination", _ROUTINE),
    "2F": ("SQL routine exception", _ROUTINE),
    "34": ("invalid cursor name", _PROTOCOL),
    "38": ("external routine exception", _ROUTINE),
    "39": ("external routine invocation", _ROUTINE),
    "3B": ("savepoint exception", _PROTOCOL),
    "3D": ("invalid catalog name", _NO_DATABASE),
    "3F": ("invalid schema name", _MISSING),
    "40": ("transaction rollback", _transient("serialization", "a transaction had to give way")),
    "42": ("syntax error or access rule violation", _REFUSED),
    "44": ("WITH CHECK OPTION violation", _CONSTRAINT),
    "53": ("insufficient resources", _OUT_OF_ROOM),
    "54": ("program limit exceeded", _LIMIT),
    "55": ("object not in prerequisite state", _REFUSED),
    "57": ("operator intervention", _RESTARTING),
    "58": (
        "system error",
        _transient("server_io", "its disk or system failed (SQLSTATE {state}); see its log"),
    ),
    "72": ("snapshot too old", _transient("snapshot_too_old", "its snapshot grew too old")),
    "F0": ("configuration file error", _REFUSED),
    "HV": ("foreign data wrapper error", _FOREIGN),
    "P0": ("PL/pgSQL error", _ROUTINE),
    "XX": ("internal error", _transient("server_bug", "it failed internally; see its log")),
}

#: Single codes that deserve an answer of their own.
STATES: dict[str, tuple[str, Answer]] = {
    "08004": ("server rejected the connection", _config("refused_there", "it refuses us")),
    "08P01": ("protocol violation", _PROTOCOL),
    "22P04": ("bad COPY format", _TYPES),
    "22P03": ("invalid binary representation", _TYPES),
    "23502": (
        "not-null violation",
        _config(
            "null_refused",
            "a column{object} would be NULL; allow it there, or correct the rows at the source",
        ),
    ),
    "23505": (
        "unique violation",
        _config(
            "duplicate_key",
            "a key would be held twice{object}; the key of the stream is not unique",
        ),
    ),
    "25006": (
        "read-only transaction",
        _transient(
            "read_only",
            "it takes no writes (a standby, or default_transaction_read_only); tried again. If it "
            "stays so: point the resource at the primary",
        ),
    ),
    "25P03": ("idle in transaction timeout", _SESSION),
    "25P04": (
        "transaction timeout",
        _config(
            "transaction_timeout",
            "its transaction_timeout is too short for this stream; raise it for {user}",
        ),
    ),
    "40001": ("serialization failure", _transient("serialization", "another transaction won")),
    "40P01": ("deadlock", _transient("deadlock", "a deadlock; the other side won")),
    "42501": (
        "insufficient privilege",
        _config(
            "permission", "permission denied{object}; GRANT it to {user}, see docs/postgres.md"
        ),
    ),
    "42601": ("syntax error", _UNSUPPORTED),
    "42703": ("undefined column", _MISSING),
    "42704": ("undefined object", _MISSING),
    "42710": ("duplicate object", _RACE),
    "42804": ("datatype mismatch", _TYPES),
    "42846": ("cannot coerce", _TYPES),
    "42883": ("undefined function", _MISSING),
    "42P01": ("undefined table", _MISSING),
    "42P06": ("duplicate schema", _RACE),
    "42P07": ("duplicate table", _RACE),
    "53100": ("disk full", _transient("disk_full", "its disk is full; free space there")),
    "53300": ("too many connections", _TOO_MANY),
    "53400": ("configuration limit exceeded", _LIMIT),
    "55006": ("object in use", _transient("lock_timeout", "an object is in use there")),
    "55P03": (
        "lock not available",
        _transient(
            "lock_timeout",
            "another session holds a lock on what is needed; tried again. To see who: SELECT "
            "pg_blocking_pids(pid), query FROM pg_stat_activity there",
        ),
    ),
    "55P04": ("unsafe new enum value", _transient("lock_timeout", "an enum value is too new")),
    "57014": (
        "query cancelled",
        _transient("cancelled_there", "the query was cancelled there, by hand or by a time limit"),
    ),
    "57P04": ("database dropped", _NO_DATABASE),
    "57P05": ("idle session timeout", _SESSION),
    "58P01": ("undefined file", _config("server_file", "a file of the server is missing there")),
    "HV00N": (
        "foreign server unreachable",
        _transient("foreign_server", "a foreign table behind it cannot be reached; tried again"),
    ),
    "XX001": ("data corrupted", _CORRUPTED),
    "XX002": ("index corrupted", _CORRUPTED),
}

#: Where a source means something else by it than a destination.
AT_SOURCE: dict[str, tuple[str, Answer]] = {
    "22": ("data exception", _DATA_OUT),
    "23": ("integrity constraint violation", _ROUTINE),
    "23502": ("not-null violation", _ROUTINE),
    "23505": ("unique violation", _ROUTINE),
    "25006": (
        "read-only transaction",
        _config(
            "writes_at_source",
            "a view or function there writes, and sources are read in read-only sessions; use "
            "another view",
        ),
    ),
    "40001": (
        "serialization failure",
        _transient(
            "serialization",
            "the query had to give way (on a standby: raise max_standby_streaming_delay or turn "
            "on hot_standby_feedback)",
        ),
    ),
    "55000": (
        "object not in prerequisite state",
        _config(
            "not_ready",
            "an object is not ready to be read; a materialized view wants its first REFRESH",
        ),
    ),
}

#: What libpq and the name lookup say where there is no SQLSTATE, most telling first. Quoted names
#: are taken out before it is looked at: a host may be called "certificate".
TEXTS: tuple[tuple[str, Answer], ...] = (
    (
        r"channel binding",
        _config(
            "login_method",
            "its login cannot be bound to the TLS link (does a proxy or pooler stand between?); "
            "connect to the server itself, or set the resource's channel_binding to prefer",
        ),
    ),
    (
        (
            r"password authentication failed|no password supplied|is not permitted to log in"
            r"|role \S* does not exist|user \S* does not exist"
        ),
        _LOGIN,
    ),
    (
        (
            r"authentication method requirement|server did not complete auth"
            r"|authentication method .* not supported"
        ),
        _config("login_method", "it asked for another login method than scram-sha-256"),
    ),
    (
        r"pg_hba\.conf.*(no encryption|SSL off)",
        _config(
            "tls_required",
            "it lets {user} in over TLS only, or not from this host; set the resource's sslmode, "
            "or add a line to its pg_hba.conf",
        ),
    ),
    (
        r"pg_hba\.conf",
        _config("not_let_in", "its pg_hba.conf has no line that lets {user} in from this host"),
    ),
    (r"database \S* does not exist|no such database", _NO_DATABASE),
    (
        r"unsupported startup parameter",
        _config(
            "pooler",
            "a pooler stands before it that refuses session settings; connect to the server, or "
            "add them to the pooler's ignore_startup_parameters",
        ),
    ),
    (r"too many clients|connection slots are reserved|too many connections", _TOO_MANY),
    (
        r"database system is|not yet accepting connections|not accepting connections",
        _RESTARTING,
    ),
    (
        r"Temporary failure in name resolution|\[Errno -3\]",
        _transient("dns", "the name {host} cannot be looked up just now; tried again"),
    ),
    (
        r"could not translate host name|failed to resolve host|Name or service not known",
        _config("no_host", "no host of this name; correct the resource's `host`"),
    ),
    (
        r"server does not support SSL",
        _config(
            "tls_missing",
            "TLS failed under sslmode {sslmode}: the server has none; turn it on there",
        ),
    ),
    (
        (
            r"certificate|alert|wrong version number|ssl handshake|no protocols available"
            r"|unsupported protocol"
        ),
        _config(
            "tls_refused",
            "TLS failed under sslmode {sslmode}; check the server's certificate (name, authority, "
            "validity) and the resource's sslmode and sslrootcert",
        ),
    ),
    (
        r"Connection refused",
        _transient("connection_refused", "nothing listens there; check host and port, or start it"),
    ),
    (
        r"timeout|timed out",
        _transient("timeout", "no answer in time; check host, port and firewalls if it stays so"),
    ),
    (
        r"unreachable|No route to host",
        _transient("unreachable", "there is no way to this host; check the network if it stays so"),
    ),
    (
        (
            r"closed the connection|closed unexpectedly|connection is closed|connection is lost"
            r"|reset by peer|EOF|Broken pipe|unexpected eof|SSL SYSCALL|consuming input failed"
            r"|sending .* failed|no connection to the server"
            r"|terminating connection|connection to client lost|canceling authentication"
        ),
        _LOST,
    ),
    (
        r"failed: \S+:  ",
        _config(
            "refused_at_login",
            "the server refused the session for a reason that Syncward does not know, maybe in "
            "another language; see its log",
        ),
    ),
)

_UNKNOWN_STATE = _REFUSED
_UNKNOWN_TEXT = _transient("connection_lost", "the connection failed or was lost; tried again")


def answer(state: str, role: Role) -> Answer:
    """Return the answer to a SQLSTATE: the narrowest that is known."""
    own = AT_SOURCE if role == "source" else {}
    for key, table in ((state, own), (state, STATES), (state[:2], own), (state[:2], CLASSES)):
        if key in table:
            return table[key][1]
    return _UNKNOWN_STATE


def answer_to_text(text: str) -> Answer:
    """Return the answer to what libpq said without a SQLSTATE."""
    bare = re.sub(r'"[^"\n]*"|\'[^\'\n]*\'', "''", text)
    for pattern, found in TEXTS:
        if re.search(pattern, bare, re.IGNORECASE):
            return found
    return _UNKNOWN_TEXT


def all_answers() -> frozenset[Answer]:
    """Return every answer there is, for the page that lists them."""
    tables = (CLASSES, STATES, AT_SOURCE)
    known = {found for table in tables for _, found in table.values()}
    return frozenset({*known, *(found for _, found in TEXTS), _UNKNOWN_STATE, _UNKNOWN_TEXT})
