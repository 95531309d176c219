"""Whether the audit log is sealed, anchored and protected, as `syncward doctor audit` sees it."""

from dataclasses import dataclass

from cli.checks.base import Area, Check, said
from cli.checks.database import DATABASE
from cli.context import Cli
from crypto import signing
from schemas import anchors
from schemas.errors import SyncwardError
from schemas.health import AuditHealth
from storage import health

#: A lag that an alert tells of, too.
_SEAL_LATE_S = 5.0
_PUBLISH_LATE_S = 60.0
#: A transaction that waits for its client this long delays sealing for nothing.
_IDLE_S = 30.0


@dataclass(frozen=True, slots=True)
class Log:
    """What the database says, and what this host is told."""

    stored: AuditHealth
    production: bool
    anchors: tuple[anchors.AnchorUri, ...] | None  # None: this host does not know them
    public_key: str | None  # what is wrong with it


def _log(cli: Cli) -> Log:
    with cli.transaction() as tx:
        stored = health.audit(tx)
    settings = cli.settings
    named = settings.audit_anchors
    return Log(
        stored=stored,
        production=settings.profile == "production",
        anchors=None if named is None else anchors.parse(named).anchors,
        public_key=_public_key(cli),
    )


def _public_key(cli: Cli) -> str | None:
    path = cli.settings.audit_public_key
    if path is None:
        return "SYNCWARD_AUDIT_PUBLIC_KEY is not set"
    try:
        signing.read_public(path)
    except SyncwardError as error:
        return error.public
    return None


def _sealer(log: Log) -> str | None:
    stored = log.stored
    if stored.sealer_alive:
        return None
    if not stored.holder:
        return "no sealer was ever here"
    return f"no sealer is alive; {stored.holder} was, until {stored.sealed_at:%Y-%m-%d %H:%M} UTC"


def _seal_lag(log: Log) -> str | None:
    lag = log.stored.seal_lag_s
    return f"an event has waited {lag:.0f} s to be sealed" if lag > _SEAL_LATE_S else None


def _publish_lag(log: Log) -> str | None:
    lag = log.stored.publish_lag_s
    if lag <= _PUBLISH_LATE_S:
        return None
    behind = log.stored.size - log.stored.published_size
    return f"a checkpoint has waited {lag:.0f} s for its anchors; {behind:,} events are behind it"


def _anchors(log: Log) -> str | None:
    if not log.production or log.anchors is None:
        return None
    return said(anchors.refusals(log.anchors))


def _anchors_note(log: Log) -> str | None:
    return "this host is not told the anchors; the sealer's is" if log.anchors is None else None


def _triggers(log: Log) -> str | None:
    return said(list(log.stored.unprotected))


def _blockers(log: Log) -> str | None:
    return said(
        [
            f"pid {one.pid} ({one.login} in {one.database}) has waited for its client for "
            f"{one.seconds:.0f} s inside a transaction that writes"
            for one in log.stored.idle
            if one.seconds > _IDLE_S
        ]
    )


AUDIT = Area(
    "audit",
    _log,
    DATABASE.unreachable,
    (
        Check(
            "sealer",
            "events are kept, but nobody could prove later that they were not changed since",
            "start one on its host: syncward sealer",
            _sealer,
        ),
        Check(
            "seal_lag",
            "what is not sealed yet can be changed by a superuser without a trace",
            "look for sealing_delayed in the sealer's log: it names who holds a transaction open",
            _seal_lag,
        ),
        Check(
            "publish_lag",
            "what no anchor holds can be cut off by whoever has database and signing key",
            "look for anchor_failed in the sealer's log; docs/anchors.md says what each needs",
            _publish_lag,
        ),
        Check(
            "anchors",
            "one anchor may be lost, or taken over with the database",
            "name two at different places in SYNCWARD_AUDIT_ANCHORS (docs/anchors.md)",
            _anchors,
            _anchors_note,
        ),
        Check(
            "public_key",
            "audit verify could not tell our signature from another's on this host",
            "ask the sealer's host: syncward audit key show; set SYNCWARD_AUDIT_PUBLIC_KEY",
            lambda log: log.public_key,
        ),
        Check(
            "triggers",
            "events, or what must leave one, could be changed without a trace",
            "find out who changed them, run audit verify; then make them as the migrations do",
            _triggers,
        ),
        Check(
            "blockers",
            "no later event is sealed until this transaction ends",
            "end it: SELECT pg_terminate_backend(PID); set idle_in_transaction_session_timeout",
            _blockers,
        ),
    ),
)
