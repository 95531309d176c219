"""Whether the login of a process may do more than its process: refused in production."""

from sqlalchemy import Connection, Engine, text

from schemas.errors import StartRefused, TransientError
from storage.engine import Process, transaction

#: What a login of each process must not be a member of: a stolen one would be all of them.
_APART: dict[Process, tuple[str, ...]] = {
    "scheduler": ("worker", "operator", "owner", "migrator"),
    "worker": ("scheduler", "operator", "owner", "migrator"),
    "operator": ("scheduler", "worker"),
}

#: `session_user` is who logged in, whatever role the session has taken since.
_ASKED = text(
    "SELECT session_user::text AS login, "
    "(SELECT rolsuper FROM pg_roles WHERE rolname = session_user) AS superuser, "
    "ARRAY(SELECT rolname::text FROM pg_roles WHERE rolname = ANY (CAST(:apart AS name[])) "
    "AND pg_has_role(session_user, oid, 'MEMBER') ORDER BY rolname) AS others"
)


def refusals(tx: Connection, process: Process) -> list[str]:
    """Say in which ways this session's login is more than the login of one process."""
    apart = [f"syncward_{name}" for name in _APART[process]]
    found = tx.execute(_ASKED, {"apart": apart}).one()
    if found.superuser:
        why = (
            f"SYNCWARD_DATABASE_URL: login {found.login} is a superuser of the control database; "
            f"make a login of its own and run there: GRANT syncward_{process} TO it"
        )
        return [why]
    if found.others:
        why = (
            f"SYNCWARD_DATABASE_URL: login {found.login} is shared: it is also a member of "
            f"{', '.join(found.others)}; use one that was granted syncward_{process} only"
        )
        return [why]
    return []


def require(engine: Engine, process: Process) -> None:
    """Refuse to start with a login that may do too much; one that cannot be asked is let be."""
    try:
        with transaction(engine) as tx:
            found = refusals(tx, process)
    except TransientError:
        return
    if found:
        raise StartRefused(found)
