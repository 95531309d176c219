"""Bring the control database to this version: `syncward db upgrade`, `db check`.

`python -m storage.migrate new "add run priority"` writes the next revision file.
"""

import sys
from pathlib import Path
from time import sleep

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError, TransientError
from storage import audit
from storage.engine import ROLLED_BACK, explained, parse_url, run_script
from storage.roles import create_roles

_HERE = Path(__file__).parent / "migrations"

#: How long an upgrade waits for one lock: running processes queue behind it meanwhile. It is below
#: the second after which Postgres looks for deadlocks, so that the upgrade gives way, not a run.
LOCK_TIMEOUT = "700ms"
TRY_AGAIN_S = 0.5
TRIES = 40


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_HERE))
    return config


def head() -> str:
    """Return the revision this code wants."""
    return ScriptDirectory.from_config(_config()).get_current_head() or ""


def current(tx: Connection) -> str | None:
    """Return the revision the database has; None if it was never migrated."""
    return MigrationContext.configure(tx).get_current_revision()


def _admin_engine(url: str) -> Engine:
    """Return an engine of the login's own rights. Nothing is prepared: a pooler may be between."""
    return create_engine(
        parse_url(url),
        hide_parameters=True,
        connect_args={"connect_timeout": 5, "prepare_threshold": None},
    )


def upgrade(url: str, principal: Principal) -> tuple[str | None, str]:
    """Create roles, run what is missing, audit it; return (revision before, after).

    One transaction: a failure leaves the database as it was. Two upgrades wait for each other.
    Processes of the version before go on working meanwhile: nobody queues for long behind a lock
    that this waits for; it lets go instead and tries again.
    """
    engine = _admin_engine(url)
    try:
        for tries in range(1, TRIES + 1):
            try:
                return _upgrade(engine, principal), head()
            except TransientError as error:
                if error.code != ROLLED_BACK or tries == TRIES:
                    raise
                sleep(TRY_AGAIN_S)
        raise AssertionError("unreachable: the last try returns or raises")
    finally:
        engine.dispose()


def _upgrade(engine: Engine, principal: Principal) -> str | None:
    with explained(engine.url), engine.begin() as tx:
        create_roles(tx)
        tx.execute(text("SET LOCAL ROLE syncward_owner"))
        tx.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
        before = current(tx)
        if before is not None and before > head():
            raise ConfigError(
                f"control database: schema {before} is newer than this version ({head()}); "
                "upgrade Syncward on this host"
            )
        config = _config()
        config.attributes["connection"] = tx
        command.upgrade(config, "head")
        if before != head():
            audit.append(tx, _upgraded(before, principal))
    return before


def upgrade_keystore(url: str) -> None:
    """Create roles and bring a separate keystore to this version; idempotent.

    What changes there is described by the script alone. The event is the control database's.
    """
    engine = _admin_engine(url)
    try:
        with explained(engine.url, "keystore"), engine.begin() as keys:
            create_roles(keys)
            keys.execute(text("SET LOCAL ROLE syncward_owner"))
            keys.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
            run_script(keys, (_HERE / "keystore.sql").read_text(encoding="utf-8"))
    finally:
        engine.dispose()


def _upgraded(before: str | None, principal: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.DATABASE_UPGRADED,
        TargetKind.INSTANCE,
        audit.INSTANCE_ID,
        principal,
        detail={"before": before, "after": head()},
    )


def differences(tx: Connection) -> list[str]:
    """Compare the database with `storage/tables.py`; an empty list means they agree."""
    from alembic.autogenerate import compare_metadata  # noqa: PLC0415 - slow to import

    from storage.tables import metadata, same_object  # noqa: PLC0415

    context = MigrationContext.configure(
        tx, opts={"include_schemas": True, "include_object": same_object, "compare_type": True}
    )
    return [str(difference) for difference in compare_metadata(context, metadata)]


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "new":  # noqa: PLR2004 - program, verb, message
        sys.exit('usage: python -m storage.migrate new "add run priority"')
    command.revision(_config(), message=sys.argv[2], rev_id=f"{int(head()) + 1:04d}")
