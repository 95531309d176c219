"""Every type arrives exactly, changed or not, in arrays of every form, with a key and without."""

import secrets

import pytest
from psycopg import sql

from schemas.errors import ConfigError
from tests.connectors.type_cases import BUILT_IN, EXTENSIONS, MAKE_OWN, NAMES, OWN
from tests.connectors.typed import Ends
from tests.world import Pair

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def ends(cluster, admin, logins):
    """One pair of databases for the whole module: a database for each type would take minutes."""
    suffix = secrets.token_hex(4)
    names = {"source": f"types_{suffix}", "destination": f"typed_{suffix}"}
    for name in names.values():
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    admin.execute(
        sql.SQL("GRANT CREATE ON DATABASE {} TO writer").format(
            sql.Identifier(names["destination"])
        )
    )
    pair = Pair(cluster, names["source"], names["destination"], logins)
    made = Ends(
        {role: pair.connect(role) for role in names},
        {role: pair.config(role) for role in names},
        {role: pair.secret(role) for role in names},
    )
    made.run("source", MAKE_OWN.replace("{s}", '"both"'), MAKE_OWN.replace("{s}", "here"))
    made.run("destination", MAKE_OWN.replace("{s}", '"both"'))
    made.run("destination", "GRANT USAGE ON SCHEMA \"both\" TO writer")
    made.run("source", "CREATE SCHEMA ext", "CREATE SCHEMA gone")
    made.run("destination", "CREATE SCHEMA ext", "CREATE SCHEMA elsewhere")
    yield made
    made.close()
    for name in names.values():
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@named(BUILT_IN)
def test_a_built_in_type(ends, case):
    ends.check(case, type_=_exact(ends, case))
    assert not ends.notes


def _exact(ends, case) -> str:
    ((name,),) = ends.rows("source", sql.SQL("SELECT format_type(to_regtype({0}), NULL)").format(
        sql.Literal(case.type)))  # fmt: skip
    return "" if "(" in case.type or case.name.startswith("interval_") else name
