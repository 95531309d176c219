"""Whether the login of a process may do more than its process: refused in production."""

from sqlalchemy import Engine, text

from schemas.errors import StartRefused, TransientError
from storage.engine import Process, setting_of, transaction

#: What a login of each process must not be a member of: a stolen one would be all of them.
_APART: dict[Process, tuple[str, ...]] = {
    "scheduler": ("worker", "operator", "owner", "migrator"),
    "worker": ("scheduler", "operator", "owner", "migrator"),
    "operator": ("scheduler", "worker", "sealer"),
    "sealer": ("scheduler", "worker", "operator", "auditor", "owner", "migrator"),
    "auditor": ("scheduler", "worker", "sealer"),
}

#: `session_user` is who logged in, whatever role the session has taken since.
_ASKED = text(
    "SELECT session_user::text AS login, "
    "(SELECT rolsuper FROM pg_roles WHERE rolname = session_user) AS superuser, "
    "ARRAY(SELECT rolname::text FROM pg_roles WHERE rolname = ANY (CAST(:apart AS name[])) "
    "AND pg_has_role(session_user, oid, 'MEMBER') ORDER BY rolname) AS others"
)


def refusals(engine: Engine, process: Process) -> list[str]:
    """Say in which ways the login of an engine is more than the login of one process."""
    apart = [f"syncward_{name}" for name in _APART[process]]
    with transaction(engine) as tx:
        found = tx.execute(_ASKED, {"apart": apart}).one()
    database, setting = setting_of(engine)
    if found.superuser:
        why = (
            f"{setting}: login {found.login} is a superuser of the {database}; "
            f"make a login of its own and run there: GRANT syncward_{process} TO it"
        )
        return [why]
    if found.others:
        why = (
            f"{setting}: login {found.login} is shared: it is also a member of "
            f"{', '.join(found.others)}; use one that was granted syncward_{process} only"
        )
        return [why]
    return []


def require(engine: Engine, process: Process) -> None:
    """Refuse to start with a login that may do too much; one that cannot be asked is let be."""
    try:
        found = refusals(engine, process)
    except TransientError:
        return
    if found:
        raise StartRefused(found)
