"""The database roles of Syncward and the SQL that makes them, also for a DBA to run by hand."""

from psycopg import sql
from sqlalchemy import Connection, text

from storage.engine import run_script

#: Group roles without login. Each process connects with `-c role=syncward_<process>`.
ROLES = ("owner", "migrator", "scheduler", "worker", "operator", "sealer", "auditor")

_LOCK = "SELECT pg_advisory_xact_lock(hashtext('syncward.roles'))"

_GRANTS = """\
GRANT syncward_owner TO syncward_migrator;
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

    Needs a superuser, or a login with CREATEROLE that owns the database.
    """
    tx.execute(text(_LOCK))
    run_script(tx, role_sql())
    # A login with CREATEROLE that is no superuser becomes a member only if it says so.
    run_script(
        tx,
        "DO $$ BEGIN IF NOT pg_has_role(current_user, 'syncward_owner', CASE WHEN "
        "current_setting('server_version_num')::int < 160000 THEN 'MEMBER' ELSE 'SET' END) THEN"
        " EXECUTE format('GRANT syncward_migrator TO %I', current_user); END IF; END $$",
    )


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
