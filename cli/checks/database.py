"""The control database as `syncward doctor db` sees it."""

from cli.checks.base import Area, Check, slow
from cli.context import Cli
from schemas.health import DatabaseHealth
from storage import health

_CLOCK_OFF_S = 2.0
_TRANSACTION_OLD_S = 900.0


def _database(cli: Cli) -> DatabaseHealth:
    with cli.transaction() as tx:
        return health.database(tx)


def _migrated(db: DatabaseHealth) -> str | None:
    if db.revision == db.wanted:
        return None
    return f"it is at revision {db.revision or 'none'}, this version wants {db.wanted}"


def _clock(db: DatabaseHealth) -> str | None:
    if abs(db.clock_offset_s) <= _CLOCK_OFF_S:
        return None
    way = "ahead of" if db.clock_offset_s > 0 else "behind"
    return f"the database's clock is {abs(db.clock_offset_s):.0f} s {way} this host's"


def _transactions(db: DatabaseHealth) -> str | None:
    if db.oldest is None or db.oldest.seconds <= _TRANSACTION_OLD_S:
        return None
    return f"{db.oldest.what} is open for {db.oldest.seconds / 60:.0f} min"


def _partitions(db: DatabaseHealth) -> str | None:
    return f"missing: {', '.join(db.partitions_missing)}" if db.partitions_missing else None


def _defaults(db: DatabaseHealth) -> str | None:
    return f"rows went into {', '.join(db.defaults_used)}" if db.defaults_used else None


def _db_latency(db: DatabaseHealth) -> str | None:
    return slow(db.latency_s)


DATABASE = Area(
    "db",
    _database,
    Check(
        "reachable",
        "the control database decides everything; without it nothing starts and nothing ends",
        "start it, or correct SYNCWARD_DATABASE_URL",
        lambda _: None,
    ),
    (
        Check(
            "migrated",
            "processes of this version need this version's tables",
            "syncward db upgrade",
            _migrated,
        ),
        Check(
            "latency",
            "each run costs about ten round trips to the control database",
            "move the control database nearer to the schedulers and workers",
            _db_latency,
        ),
        Check(
            "clock",
            "only the database's clock decides, but logs of workers carry their hosts' time",
            "run a time service (chrony, systemd-timesyncd) on both",
            _clock,
        ),
        Check(
            "old_transactions",
            "vacuum cannot clean the hot tables behind it; claims get slower by the hour",
            "SELECT pg_terminate_backend(PID), or ROLLBACK PREPARED, in the control database",
            _transactions,
        ),
        Check(
            "partitions",
            "rows of a month without a partition go into the DEFAULT one, which is never dropped",
            "start a scheduler: it makes them within 30 s; see its log if it does not",
            _partitions,
        ),
        Check(
            "default_partitions",
            "retention cannot drop them, and a partition for their month cannot be made any more",
            "move the rows: see docs/operations.md, Partitions",
            _defaults,
        ),
    ),
)
