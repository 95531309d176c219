"""The database roles of Syncward and the SQL that makes them, also for a DBA to run by hand."""

from psycopg import sql
from sqlalchemy import Connection, text

from schemas.errors import ConfigError
from storage.engine import run_script

#: Group roles without login. Each process connects with `-c role=syncward_<process>`.
ROLES = ("owner", "migrator", "scheduler", "worker", "operator", "sealer", "auditor")

#: Which group roles are not there.
_MISSING = text(
    "SELECT r FROM unnest(CAST(:roles AS text[])) AS r WHERE to_regrole(r) IS NULL ORDER BY r"
)

#: Whether all that the statements below the roles' make is there; asked where all roles are.
_GRANTED = text(
    "SELECT CASE WHEN to_regnamespace('audit') IS NULL OR to_regnamespace('keystore') IS NULL "
    "THEN false ELSE pg_has_role('syncward_migrator', 'syncward_owner', 'MEMBER') "
    "AND pg_has_role('syncward_operator', 'syncward_auditor', 'MEMBER') "
    "AND has_schema_privilege('syncward_owner', 'public', 'CREATE') "
    "AND (SELECT bool_and(has_schema_privilege('syncward_' || r, 'public', 'USAGE') "
    "AND has_schema_privilege('syncward_' || r, 'audit', 'USAGE')) "
    "FROM unnest('{scheduler,worker,operator,sealer,auditor}'::text[]) AS r) "
    "AND (SELECT bool_and(has_schema_privilege('syncward_' || r, 'keystore', 'USAGE')) "
    "FROM unnest('{worker,operator}'::text[]) AS r) "
    "AND NOT EXISTS (SELECT FROM pg_namespace n, aclexplode(n.nspacl) a WHERE n.nspname = 'public' "
    "AND a.grantee = 0 AND a.privilege_type = 'CREATE') END"
)

_MAY_CREATE = text(
    "SELECT current_user AS login, rolsuper OR rolcreaterole, "
    "rolsuper OR has_database_privilege(current_database(), 'CREATE') "
    "FROM pg_roles WHERE rolname = current_user"
)

_LOCK = "SELECT pg_advisory_xact_lock(hashtext('syncward.roles'))"

#: A login with CREATEROLE that is no superuser becomes a member only if it says so; without, it
#: could not make what belongs to the owner.
_GRANTS = """\
GRANT syncward_owner TO syncward_migrator;
DO $$ BEGIN IF NOT pg_has_role(current_user, 'syncward_owner', CASE WHEN
current_setting('server_version_num')::int < 160000 THEN 'MEMBER' ELSE 'SET' END) THEN
EXECUTE format('GRANT syncward_migrator TO %I', current_user); END IF; END $$;
CREATE SCHEMA IF NOT EXISTS audit AUTHORIZATION syncward_owner;
CREATE SCHEMA IF NOT EXISTS keystore AUTHORIZATION syncward_owner;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO syncward_owner;
GRANT USAGE ON SCHEMA public, audit TO syncward_scheduler, syncward_worker, syncward_operator;
GRANT USAGE ON SCHEMA keystore TO syncward_worker, syncward_operator;
GRANT USAGE ON SCHEMA public, audit TO syncward_sealer, syncward_auditor;
GRANT syncward_auditor TO syncward_operator;"""


def role_sql() -> str:
    """Return the statements, idempotent, one transaction's worth, ending in semicolons."""
    creates = "\n".join(
        f"DO $$ BEGIN CREATE ROLE syncward_{role} NOLOGIN;\n"
        "EXCEPTION WHEN duplicate_object THEN NULL; END $$;"
        for role in ROLES
    )
    return f"{creates}\n{_GRANTS}\n"


def create_roles(tx: Connection) -> None:
    """Create what is missing of roles and schemas; safe when two upgrades race.

    That needs a superuser, or a login with CREATEROLE that owns the database. Where all of it is
    there, a member of syncward_migrator is enough: it may make no role, not even one that exists.
    """
    tx.execute(text(_LOCK))
    missing = tx.execute(_MISSING, {"roles": [f"syncward_{role}" for role in ROLES]}).scalars()
    lacks = ", ".join(missing)
    if not lacks and tx.execute(_GRANTED).scalar_one():
        return
    may = tx.execute(_MAY_CREATE).one()
    if not all(may):
        raise ConfigError(
            f"control database: missing: {lacks or 'a schema or a grant of Syncward'}; login "
            f"{may.login} cannot make that: take a login with CREATEROLE that owns the database, "
            "or have a DBA run there what this prints: syncward db upgrade --print-sql"
        )
    run_script(tx, role_sql())


def create_login(tx: Connection, login: str, *, password: str, roles: tuple[str, ...]) -> None:
    """Create or update a login that is a member of these group roles (development only)."""
    name, secret = sql.Identifier(login), sql.Literal(password)
    members = sql.SQL(", ").join(sql.Identifier(f"syncward_{role}") for role in roles)
    for statement in (
        sql.SQL(
            "DO $$ BEGIN CREATE ROLE {} LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
        ).format(name),
        sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(name, secret),
        sql.SQL("GRANT {} TO {}").format(members, name),
    ):
        run_script(tx, statement.as_string())
