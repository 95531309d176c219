"""What `syncward doctor` asks the control database; read only, each question cheap."""

from datetime import UTC, datetime
from time import monotonic

from sqlalchemy import Connection, text

from schemas.health import (
    AuditHealth,
    DatabaseHealth,
    IdleTransaction,
    OldTransaction,
    ScheduleHealth,
    SecretsHealth,
)
from schemas.limits import WORKER_SILENT_AFTER
from storage import audit_guard, gauges, instance, keystore, migrate, revision, seal_watch

_PINGS = 3


def database(tx: Connection) -> DatabaseHealth:
    """Measure the link and the clock, and look for what holds the database back."""
    latency, offset = min(_ping(tx) for _ in range(_PINGS))
    return DatabaseHealth(
        revision=migrate.current(tx),
        wanted=migrate.head(),
        latency_s=latency,
        clock_offset_s=offset,
        oldest=_oldest(tx),
        partitions_missing=_missing(tx),
        defaults_used=tuple(tx.execute(_DEFAULTS).scalars()),
    )


def _ping(tx: Connection) -> tuple[float, float]:
    """Return one round trip, and how far the database's clock is ahead of ours in its middle."""
    started, before = monotonic(), datetime.now(UTC)
    there = tx.execute(text("SELECT clock_timestamp()")).scalar_one()
    took = monotonic() - started
    return took, (there - before).total_seconds() - took / 2


#: Other users' transactions are visible with pg_read_all_stats only; prepared ones and slots are.
_OLDEST = text(
    "SELECT 'session ' || pid || ' (' || coalesce(nullif(application_name, ''), 'unnamed') || ')' "
    "AS what, extract(epoch FROM clock_timestamp() - xact_start)::float8 AS seconds "
    "FROM pg_stat_activity WHERE datname = current_database() AND xact_start IS NOT NULL "
    "AND pid <> pg_backend_pid() AND backend_type = 'client backend' "
    "UNION ALL SELECT 'prepared transaction ' || gid, "
    "extract(epoch FROM clock_timestamp() - prepared)::float8 FROM pg_prepared_xacts "
    "WHERE database = current_database() ORDER BY seconds DESC LIMIT 1"
)


def _oldest(tx: Connection) -> OldTransaction | None:
    row = tx.execute(_OLDEST).one_or_none()
    return None if row is None else OldTransaction(row.what, row.seconds)


#: This month and two more: schedulers make one further ahead, so a missing one is no accident.
_MISSING = text(
    "SELECT parent || '_' || to_char(month, 'YYYYMM') FROM unnest(ARRAY['slots', 'runs', "
    "'run_logs', 'api_calls', 'audit.event']) AS parent, "
    "generate_series(date_trunc('month', now()), "
    "date_trunc('month', now()) + interval '2 months', interval '1 month') AS month "
    "WHERE to_regclass(parent || '_' || to_char(month, 'YYYYMM')) IS NULL ORDER BY 1"
)


def _missing(tx: Connection) -> tuple[str, ...]:
    return tuple(tx.execute(_MISSING).scalars())


_DEFAULTS = text(
    "SELECT name FROM unnest(ARRAY['slots_default', 'runs_default', 'run_logs_default', "
    "'api_calls_default', 'audit.event_default']) AS name "
    "WHERE pg_relation_size(to_regclass(name)) > 0 ORDER BY name"
)


def schedule(tx: Connection) -> ScheduleHealth:
    """Say whether runs can start: who is alive, who is paused, what contradicts itself."""
    now, living, values = instance.read(tx), instance.schedulers(tx), gauges.read(tx)
    workers = tx.execute(
        text(
            "SELECT count(*) AS workers, count(*) FILTER (WHERE draining) AS draining, "
            "coalesce(sum(slots) FILTER (WHERE NOT draining), 0) AS slots FROM workers "
            "WHERE seen_at > clock_timestamp() - CAST(:silent AS interval)"
        ),
        {"silent": WORKER_SILENT_AFTER},
    ).one()
    deferred = tx.execute(
        text("SELECT count(*) FROM active_runs WHERE deferred_for > interval '1 hour'")
    ).scalar_one()
    return ScheduleHealth(
        paused=(now.reason or "no reason given") if now.paused else None,
        schedulers=living.alive,
        queue_down_since=living.queue_down_since,
        workers=workers.workers,
        slots=workers.slots,
        draining=workers.draining,
        late_s=values.schedule_lateness_seconds,
        stuck=values.stuck_runs,
        deferred=deferred,
        invariants={name: count for name, count in values.invariant_violations.items() if count},
        pauses={why: n for why, n in gauges.read_connections(tx).pauses.items() if n},
        dead_rows=values.active_runs_dead_rows,
    )


_SHORT = text(
    "SELECT DISTINCT a.name || '/' || r.name AS name FROM credentials c "
    "JOIN resources r ON r.id = c.resource_id JOIN accounts a ON a.id = r.account_id "
    "WHERE c.short AND c.version = (SELECT max(n.version) FROM credentials n "
    "WHERE n.resource_id = c.resource_id AND n.field = c.field) ORDER BY name"
)


#: Credentials that one look compares with their events, chosen at random where there are more.
COMPARED = 2_000
_UNLIKE = text(
    "SELECT account || '/' || resource || ' ' || field FROM credentials_unlike_events(:most)"
)


def secrets(tx: Connection, keys: Connection) -> SecretsHealth:
    """Ask for roots in use, keys that wait for a rotation, and secrets that are too short.

    Names those of all accounts where `tx` may see them (tenancy.across).
    """
    known = keystore.roots(keys)
    replaced = [root.root_id for root in known if root.state == "decrypt_only"]
    pending = keystore.pending(keys, replaced)
    return SecretsHealth(
        active_roots={root.purpose: root.root_id for root in known if root.state == "active"},
        rewrap=pending.rewrap,
        replace=pending.replace,
        short=tuple(tx.execute(_SHORT).scalars()),
        unlike=tuple(tx.execute(_UNLIKE, {"most": COMPARED}).scalars()),
    )


#: What is not said is `verify-full` (connectors/postgres/link.py).
_WEAK = text(
    "SELECT a.name || '/' || r.name FROM resources r JOIN accounts a ON a.id = r.account_id "
    "WHERE r.kind = 'postgres' AND r.config->>'sslmode' <> 'verify-full' ORDER BY 1"
)


def weak_resources(tx: Connection) -> tuple[str, ...]:
    """Name the resources whose server may be anybody: their sslmode is below verify-full.

    Those of all accounts where `tx` may see them (tenancy.across).
    """
    return tuple(tx.execute(_WEAK).scalars())


#: As who logged in: the process's role may not know of another role's session, even if its own.
_AS_LOGIN = text("SET LOCAL ROLE NONE")


def session_is_plain(tx: Connection) -> bool:
    """Say whether the server sees this session without TLS. For a transaction of its own."""
    tx.execute(_AS_LOGIN)
    found = tx.execute(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")).scalar()
    return found is False


def data_directory(tx: Connection) -> str | None:
    """Return where the server keeps its data; None if this login may not know. As above."""
    tx.execute(_AS_LOGIN)
    query = text("SELECT setting FROM pg_settings WHERE name = 'data_directory'")
    found: str | None = tx.execute(query).scalar()
    return found


def audit(tx: Connection) -> AuditHealth:
    """Return whether the audit log is sealed, published and protected."""
    held, lag = seal_watch.holder(tx), seal_watch.lag(tx)
    idle = tx.execute(
        text(
            "SELECT pid, coalesce(usename::text, ''), coalesce(datname::text, ''), "
            "CAST(extract(epoch FROM clock_timestamp() - state_change) AS float8) "
            "FROM pg_stat_activity WHERE backend_xid IS NOT NULL "
            "AND state LIKE 'idle in transaction%' ORDER BY state_change"
        )
    )
    return AuditHealth(
        holder=held.holder,
        sealer_alive=held.alive,
        sealed_at=held.sealed_at,
        size=lag.size,
        published_size=lag.published_size,
        seal_lag_s=lag.seal,
        publish_lag_s=lag.publish,
        unprotected=_unprotected(tx),
        idle=tuple(IdleTransaction(*row) for row in idle),
    )


def _unprotected(tx: Connection) -> tuple[str, ...]:
    if revision.is_newer(tx):
        return ("the schema is newer than this version, which cannot tell; upgrade this host",)
    return tuple(audit_guard.missing(tx))
