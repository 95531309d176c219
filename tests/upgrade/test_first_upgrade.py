"""The first `db upgrade` of an installation, and the next ones, by logins without superuser."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from embedded.postgres import Cluster
from schemas.audit import Principal
from schemas.errors import ConfigError
from storage import migrate
from storage.roles import ROLES

pytestmark = [pytest.mark.integration, pytest.mark.full]

SOMEBODY = Principal("operator", "ada")


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of its own: roles are of all databases of one, and here there are none yet."""
    with Cluster(tmp_path / "postgres", durable=False, guard_parent=True) as cluster:
        sql = (
            "CREATE ROLE maker LOGIN CREATEROLE PASSWORD 'maker-1234'",
            "CREATE ROLE plain LOGIN PASSWORD 'plain-1234'",
            "CREATE DATABASE syncward OWNER maker",
        )
        with psycopg.connect(url(cluster, cluster.superuser, "postgres"), autocommit=True) as conn:
            for statement in sql:
                conn.execute(statement)
        yield cluster


def url(cluster: Cluster, login: str, database: str = "syncward") -> str:
    password = cluster.password if login == cluster.superuser else f"{login}-1234"
    return f"postgresql://{login}:{password}@{cluster.host}:{cluster.port}/{database}"


def test_a_login_with_createrole_makes_all_and_a_migrator_goes_on(fresh):
    with pytest.raises(ConfigError, match="login plain cannot make that") as caught:
        migrate.upgrade(url(fresh, "plain"), SOMEBODY)
    assert all(f"syncward_{role}" in caught.value.public for role in ROLES)
    assert migrate.upgrade(url(fresh, "maker"), SOMEBODY) == (None, migrate.head())
    with pytest.raises(ConfigError, match="syncward_owner"):
        migrate.upgrade(url(fresh, "plain"), SOMEBODY)
    with psycopg.connect(url(fresh, "maker")) as conn:
        conn.execute("GRANT syncward_migrator TO plain")
    again = (migrate.head(), migrate.head())
    assert migrate.upgrade(url(fresh, "plain"), SOMEBODY) == again
    with psycopg.connect(url(fresh, fresh.superuser)) as conn:
        conn.execute("REVOKE USAGE ON SCHEMA audit FROM syncward_worker")
    with pytest.raises(ConfigError, match="a schema or a grant of Syncward"):
        migrate.upgrade(url(fresh, "plain"), SOMEBODY)
    assert migrate.upgrade(url(fresh, "maker"), SOMEBODY) == again
    assert migrate.upgrade(url(fresh, "plain"), SOMEBODY) == again
