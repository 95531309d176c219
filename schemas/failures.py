"""Every stable code with which an attempt can end, and what follows from it.

`run show`, `run list --error`, the audit stream and metrics carry these codes; docs/errors.md lists
them for people, and tests keep code, table and page equal.
"""

from dataclasses import dataclass
from enum import StrEnum


class Who(StrEnum):
    """Who can act; what happens to the run follows from it."""

    PERSON = "a person"  # fails now
    TIME = "time"  # queued again with a delay, and fails after too many attempts
    TIME_TOLD = "time, told"  # queued again for when it was told to; no attempt is counted
    APPROVER = "an approver"  # waits for `run approve` or `run reject`
    NOBODY = "nobody"  # ended or handed on by request
    US = "us"  # our bug: fails now


@dataclass(frozen=True, slots=True)
class Failure:
    """`pauses` at once; every failed run counts towards a pause after too many in a row."""

    who: Who
    help: str
    pauses: bool = False


def _person(help_: str, *, pauses: bool = False) -> Failure:
    return Failure(Who.PERSON, help_, pauses)


def _time(help_: str) -> Failure:
    return Failure(Who.TIME, help_)


def _nobody(help_: str) -> Failure:
    return Failure(Who.NOBODY, help_)


def _approver(help_: str) -> Failure:
    return Failure(Who.APPROVER, help_)


FAILURES: dict[str, Failure] = {
    # ── credentials and keys ─────────────────────────────────────────────────────────────────
    "credentials": _person("`resource rotate`, then `connection resume`", pauses=True),
    "needs_reauth": _person(
        "`resource authorize`: paused connections go on by themselves then", pauses=True
    ),
    "no_credentials": _person("`resource rotate`: none were ever stored"),
    "unsealable": _person(
        "give the worker the keyring that sealed them, or `resource rotate`; then "
        "`connection resume`",
        pauses=True,
    ),
    "root_unknown": Failure(Who.TIME_TOLD, "copy the new keyring file to the worker's host"),
    "kms_unavailable": Failure(Who.TIME_TOLD, "start or unseal the KMS, or mend the way to it"),
    "kms_denied": _person("give the worker's token the policy that docs/keys.md shows"),
    "wrong_keyring": _person("use the keyring of this installation; `keys status` names its roots"),
    "login_method": _person("let the login use scram-sha-256 on the server"),
    "superuser_source": _person("give a login that can only read"),
    "permission": _person("run the GRANT that docs/postgres.md or docs/mariadb.md shows"),
    # ── reaching the other system ────────────────────────────────────────────────────────────
    "connection_lost": _time("nothing, unless it stays: look at the network and the server's log"),
    "egress_refused": _person(
        "correct the resource's `host`; or open its range with SYNCWARD_EGRESS_ALLOW"
    ),
    "files_refused": _person(
        "set SYNCWARD_FILES_ROOT on every worker, or correct the resource's `path`"
    ),
    "connection_refused": _time("start the server, or correct host and port"),
    "dns": _time("mend the name server that the workers ask"),
    "no_host": _person("correct the resource's `host`"),
    "no_database": _person("correct the resource's `database`"),
    "not_let_in": _person("add a line for the login and this host to the server's pg_hba.conf"),
    "pooler": _person("connect to the server itself, or let the pooler pass session settings"),
    "refused_at_login": _person("read the server's log: it refused the session"),
    "server_restarting": _time("nothing: it is starting or stopping"),
    "session_ended": _time("nothing, unless it stays: raise the server's idle timeouts"),
    "timeout": _time("look at firewalls between the workers and the server"),
    "tls_missing": _person("turn TLS on at the server"),
    "tls_refused": _person("correct the server's certificate, or `sslmode` and `sslrootcert`"),
    "tls_too_weak": _person("set `sslmode` to verify-full"),
    "tls_required": _person("set `sslmode`, or add a line to the server's pg_hba.conf"),
    "too_many_connections": _time("raise its limits, or lower `runs_max` or `ranges_at_once`"),
    "unreachable": _time("mend the route between the workers and the server"),
    # ── what the other system said ───────────────────────────────────────────────────────────
    "cancelled_there": _time("find out who or which time limit cancels queries there"),
    "catalog_race": _time("nothing: two runs made the same schema or table at once"),
    "constraint": _person("correct the rows at the source, or drop the constraint"),
    "corrupted": _person("restore or reindex the server"),
    "data_refused": _person("correct the rows, the view or the column that is named"),
    "deadlock": _time("nothing, unless it stays: something else writes the same tables"),
    "disk_full": _time("free space on the server"),
    "duplicate_key": _person("name a key of the stream that is unique"),
    "foreign_server": _time("start what the foreign table points to"),
    "foreign_table": _person("mend the foreign table"),
    "lock_timeout": _time("end the session that holds the lock"),
    "missing_object": _person("`resource discover` lists what there is"),
    "not_ready": _person("REFRESH the materialized view, or take the stream out"),
    "null_refused": _person("allow NULL there, or correct the rows"),
    "out_of_memory": _time("give the server memory, or run less at once"),
    "raised_there": _person("read the server's log: a function or trigger there raised it"),
    "read_only": _time("point the resource at the primary"),
    "refused_there": _person("read the server's log"),
    "serialization": _time("nothing, unless it stays: see the sentence"),
    "server_bug": _time("read the server's log"),
    "server_file": _person("install what is missing at the server"),
    "server_io": _time("look at the server's disks"),
    "server_limit": _person("raise the limit that the server's log names"),
    "snapshot_too_old": _time("nothing, unless it stays: raise old_snapshot_threshold there"),
    "transaction_timeout": _person("raise transaction_timeout for the login"),
    "types_differ": _person("make the columns of both sides alike"),
    "unsupported": _person("use Postgres 12 or later, or MariaDB 10.6 or later"),
    "writes_at_source": _person("read another view"),
    "deferred": Failure(Who.TIME_TOLD, "nothing: the other system said when to come back"),
    "deferred_too_long": _person("ask the other system for more, or schedule less often"),
    # ── what an API said ─────────────────────────────────────────────────────────────────────
    "api_answer": _person("correct the manifest; `connector try` shows what comes"),
    "api_refused": _person("correct the manifest, the parameters or the login's rights there"),
    "api_unavailable": _time("nothing, unless it stays: ask whoever runs the API"),
    # ── what a connector of others did ───────────────────────────────────────────────────────
    "connector_off": _person("set what the sentence names on the workers, or take the stream out"),
    "connector_missing": _person("`connector install` on each worker's host"),
    "connector_changed": _person("find out who changed its files; `connector install --again`"),
    "connector_answer": _person("use another version of the connector; report it to its authors"),
    "connector_refused": _person("correct the resource's settings or its secret; see `run logs`"),
    "connector_limit": _person(
        "raise the setting that docs/child-connectors.md names, or read less"
    ),
    "connector_failed": _time("nothing, unless it stays: `run logs` shows what it said"),
    "connector_incomplete": _time("nothing, unless it stays: use another version of the connector"),
    # ── the connection itself ────────────────────────────────────────────────────────────────
    "config": _person("do what the sentence says"),
    "guard": Failure(Who.APPROVER, "look at what it found; `run approve` or `run reject`"),
    "zero_rows": _approver("the source is empty: is it the right one? `run output` previews it"),
    "delete_ratio": _approver("`run output` shows what would go; or change the stream's guards"),
    "duplicate_keys": _approver("mend the rows or the key; approved, one row of each is kept"),
    "future_cursor": _approver("correct the rows at the source; approved, the others are loaded"),
    "narrowed_type": _approver("change the target's column; approved, it stays the wider one"),
    "control_restored": Failure(
        Who.APPROVER, "was the control database restored? `run approve` goes on from the data"
    ),
    "streams": _person("`run logs` says it for each stream; the others are loaded"),
    "incomplete": _person("`run logs`; not every stream was read, so this is no success"),
    "row_too_large": _person("read the table through a view without the column that is named"),
    "schema_drift": _person(
        "change the target as the error says, or choose another `drift` for the stream"
    ),
    "rows_rejected": _person(
        "correct the rows at the source or the table there, or raise the stream's `rejected_max`"
    ),
    "rows_missing": _person("compare the two sides; rows are unaccounted for, nothing was kept"),
    # ── run control ──────────────────────────────────────────────────────────────────────────
    "transient": _time("do what the sentence says if it stays"),
    "rolled_back": _time("nothing, unless it stays: the control database undid a step"),
    "audit_unavailable": _time(
        "free space for the control database, or end what locks `audit.event`"
    ),
    "deadline": _person("ask again; a person was waiting and no answer came"),
    "no_worker": _person("start a worker"),
    "lost_lease": _time("nothing, unless it stays: workers die or cannot reach Postgres"),
    "lost_leases": _person(
        "look at the workers' memory and logs, then `connection resume`", pauses=True
    ),
    "lease_lost": _nobody("nothing: another worker goes on"),
    "read_again": _nobody("nothing: the same run reads the stream from its beginning"),
    "draining": _nobody("nothing: the worker stopped, another one goes on"),
    "cancelled": _nobody("nothing: somebody asked for it"),
    "rejected": _nobody("nothing: a person rejected what a guard found"),
    "internal": Failure(Who.US, "report it with `run logs`; SECURITY.md says how"),
}

#: Reasons that would repeat at once: the connection is paused without waiting for more of them.
PAUSING = frozenset(code for code, failure in FAILURES.items() if failure.pauses)

#: The credentials did not open, or the other system did not take them: `credential.used` says so.
CREDENTIAL_FAILURES = frozenset(
    {
        "credentials",
        "needs_reauth",
        "unsealable",
        "root_unknown",
        "kms_unavailable",
        "kms_denied",
        "login_method",
    }
)

#: What a guard found: a person must approve it.
GUARDS = frozenset(code for code, failure in FAILURES.items() if failure.who is Who.APPROVER)

#: Policy forbids the link: no stream of it goes on, and it is a security event.
OF_LINKS = frozenset({"egress_refused", "superuser_source", "tls_too_weak"})

#: What time will fix for one stream while both sessions live: it does not keep the others waiting.
OF_ONE_STREAM = frozenset(
    {"cancelled_there", "catalog_race", "deadlock", "foreign_server", "lock_timeout"}
    | {"out_of_memory", "serialization", "snapshot_too_old"}
    | {"connector_failed", "connector_incomplete"}
)
