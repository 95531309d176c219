"""Which schema this code needs and which one the database has: asked by every process that starts.

An older process may run on a newer schema (docs/decisions/0008); a newer one on an older may not.
"""

import re
from pathlib import Path

from sqlalchemy import Connection, Engine, text

from schemas.errors import ConfigError, StartRefused, TransientError
from storage.engine import transaction

VERSIONS = Path(__file__).parent / "migrations" / "versions"


def wanted() -> str:
    """Return the newest revision this code brings. Alembic would say the same, but loads slowly."""
    return max(path.name[:4] for path in VERSIONS.glob("[0-9][0-9][0-9][0-9]_*.py"))


def found(tx: Connection) -> str | None:
    """Return the revision of the database; None if it was never migrated."""
    if tx.execute(text("SELECT to_regclass('public.alembic_version')")).scalar_one() is None:
        return None
    revision = tx.execute(text("SELECT version_num FROM public.alembic_version")).scalar()
    return None if revision is None else str(revision)


def require(engine: Engine) -> bool:
    """Refuse to start on an older schema; say whether the database could be asked at all.

    One that is away is waited for by everything that needs it, and is no reason not to start.
    """
    try:
        with transaction(engine) as tx:
            there = found(tx)
    except TransientError:
        return False
    except ConfigError as error:
        raise StartRefused([error.public]) from None
    if is_older(there, wanted()):
        reason = (
            f"control database: schema {there or 'empty'} is older than this version, which needs "
            f"{wanted()}; run: syncward db upgrade"
        )
        raise StartRefused([reason])
    return True


def is_newer(tx: Connection) -> bool:
    """Say whether a later version has migrated the database: what it changed is not known here."""
    there = found(tx)
    return there is not None and re.fullmatch(r"\d{4}", there) is not None and there > wanted()


def is_older(there: str | None, needed: str) -> bool:
    """Compare two revisions: numbers of four digits, one line without branches."""
    return there is None or not re.fullmatch(r"\d{4}", there) or there < needed
