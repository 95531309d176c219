"""A world as production has it: both servers behind TLS, a login for each process."""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import redis
from psycopg import sql

from embedded.daemons import free_port
from embedded.valkey import Server
from tests.tls_proxy import TlsProxy, certificate
from tests.world import World

PASSWORD = "correct-horse-battery"  # noqa: S105 - made up, to be looked for in answers


@dataclass
class Protected:
    """A control database and a Redis behind TLS, with logins of their own."""

    world: World
    database: str  # with {login} in it
    settings: dict[str, object]

    def of(self, login: str, **changes: object) -> dict[str, object]:
        return {**self.settings, "database_url": self.database.format(login=login), **changes}


def acl() -> str:
    """Return what docs/network.md says of the user of Redis, with a password."""
    page = Path(__file__).parent.parent / "docs" / "network.md"
    (line,) = re.findall(r"^user (syncward .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return str(line).replace("PASSWORD", PASSWORD)


@contextmanager
def protect(world: World, tmp_path: Path, admin: psycopg.Connection[Any]) -> Iterator[Protected]:
    """Put both servers of a world behind TLS and make the logins that tests take."""
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": "{mode: replace}"})
    world.close()
    files = certificate(tmp_path, "localhost")
    member = {"w": ("worker",), "s": ("scheduler",), "o": ("operator",),
              "both": ("worker", "operator"), "owns": ("worker", "migrator"),
              "seals": ("sealer",), "reads": ("sealer", "auditor")}  # fmt: skip
    mark = secrets.token_hex(4)
    for login in (*member, "su"):
        made = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(
            sql.Identifier(f"{login}_{mark}"), sql.Literal(PASSWORD)
        )
        admin.execute(made if login != "su" else made + sql.SQL(" SUPERUSER"))
        for role in member.get(login, ()):
            admin.execute(f"GRANT syncward_{role} TO {login}_{mark}")
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(16) + "\n")
    token.chmod(0o600)
    cluster = world.control.cluster
    with (
        Server(tmp_path / "vk", durable=False, guard_parent=True) as valkey,
        TlsProxy((cluster.host, cluster.port), files) as database,
        TlsProxy((valkey.host, valkey.port), files, begin="at_once") as queue,
    ):
        client = redis.Redis.from_url(valkey.url)
        client.execute_command("ACL", "SETUSER", *acl().split())
        client.close()
        yield Protected(
            world,
            f"postgresql://{{login}}_{mark}:{PASSWORD}@localhost:{database.port}/"
            f"{world.control.database}?sslmode=verify-full&sslrootcert={files[0]}",
            {
                "redis_url": f"rediss://syncward:{PASSWORD}@localhost:{queue.port}/0"
                f"?ssl_ca_certs={files[0]}",
                "keyring": world.directory / "keys" / "worker.json",
                "metrics_host": "0.0.0.0",  # noqa: S104 - with a token
                "metrics_port": free_port(None),
                "metrics_token_file": token,
            },
        )
    for login in (*member, "su"):
        admin.execute(f"DROP ROLE {login}_{mark}")
