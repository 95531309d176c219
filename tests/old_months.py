"""A log with three old months to prune, made once a module and copied. Start at `made`.

Events 0-3 are of January 2024, 4-7 of February, 8, 9 and 11 of March; event 10 is a late one of
January. Each month is a partition of its own, as the program makes them.
"""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from uuid import UUID, uuid4

import psycopg

from audit.sealer import Sealer
from cli.audit import prune as prune_command
from cli.context import Cli
from crypto import signing
from embedded.postgres import Cluster
from schemas.audit import Principal
from schemas.settings import Settings
from storage import audit
from storage.engine import open_engine
from storage.roles import create_login
from tests.world import Control

MONTHS = ("2024-01", "2024-02", "2024-03")
ALL = {"event_202401", "event_202402", "event_202403"}
_BODY = r'{"detail":{"n"\:%d},"outcome":"success","principal":"operator\:old","v"\:1}'


@dataclass(frozen=True, slots=True)
class OldMonths:
    """A sealed database to copy, the files of its sealer, and a second operator's login."""

    control: Control
    files: Path
    second: str
    password: str

    def key_to(self, directory: Path) -> None:
        """Put the sealer's files where those of a world are."""
        shutil.copytree(self.files, directory / "audit")

    @contextmanager
    def copied(self, admin: psycopg.Connection) -> Iterator[Control]:
        """Make a database of its own for a test."""
        name = f"control_{secrets.token_hex(4)}"
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {self.control.database}")
        control = Control(self.control.cluster, name, self.control.password)
        yield control
        control.dispose()
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

    @contextmanager
    def other_operator(self, control: Control, settings: Settings) -> Iterator[Cli]:
        """Open the command line of the second operator."""
        c = control.cluster
        url = f"postgresql://{self.second}:{self.password}@{c.host}:{c.port}/{control.database}"
        cli = Cli()
        cli.__dict__["settings"] = settings
        cli.__dict__["engine"] = open_engine(url, "operator", pool_size=1)
        cli.__dict__["audit_engine"] = open_engine(url, "auditor", pool_size=1)
        yield cli
        cli.close()


@contextmanager
def made(
    cluster: Cluster, admin: psycopg.Connection, template: Control, files: Path
) -> Iterator[OldMonths]:
    """Make the log and the login; drop both at the end."""
    suffix = secrets.token_hex(4)
    database, second, password = f"old_months_{suffix}", f"second_{suffix}", uuid4().hex
    admin.execute(f"CREATE DATABASE {database} TEMPLATE {template.database}")
    control = Control(cluster, database, template.password)
    with control.admin_engine().begin() as tx:
        create_login(tx, second, password=password, roles=("operator",))
    _write(control)
    _seal(control, files)
    control.dispose()
    yield OldMonths(control, files, second, password)
    with psycopg.connect(control.admin_url, autocommit=True) as own:
        own.execute(f"DROP OWNED BY {second}")
    admin.execute(f"DROP DATABASE {database} WITH (FORCE)")
    admin.execute(f"DROP ROLE {second}")


def _write(control: Control) -> None:
    # what the installation said would be sealed first
    for (part,) in control.all("SELECT DISTINCT tableoid::regclass::text FROM audit.event"):
        control.act_plainly(
            f"ALTER TABLE {part} DISABLE TRIGGER no_change; DELETE FROM {part}; "
            f"ALTER TABLE {part} ENABLE ALWAYS TRIGGER no_change"
        )
    for month in MONTHS:
        year, number = map(int, month.split("-"))
        name = f"audit.event_{year}{number:02}"
        begin, end = f"{month}-01 00\\:00+00", f"{year}-{number + 1:02}-01 00\\:00+00"
        control.act_plainly(
            f"CREATE TABLE {name} PARTITION OF audit.event "
            f"FOR VALUES FROM ('{begin}') TO ('{end}'); "
            f"ALTER TABLE {name} OWNER TO syncward_owner; SELECT audit.seal_partition('{name}')"
        )
    for n in range(12):
        month = "2024-01" if n == 10 else MONTHS[n // 4]
        control.act_plainly(
            "INSERT INTO audit.event (at, class, action, target_kind, target_id, body) VALUES "
            f"('{month}-10 00\\:00\\:{n:02}+00', 'A', 'instance.read', 'instance', "
            f"'{audit.INSTANCE_ID}', '{_BODY % n}')"
        )


def _seal(control: Control, files: Path) -> None:
    key = files / "signer.json"
    signing.init(key)
    sealer = Sealer(
        control.engine("sealer"), signing.load(key), key, Principal("sealer", "s"), "sealer-1"
    )
    while sealer.step() is not None:
        pass
    sealer.close()


def approve(cli: Cli, request: UUID) -> None:
    """Agree to a request."""
    with redirect_stdout(StringIO()):  # `shell` reads what it wrote itself
        prune_command._approve(cli, request)


def partitions(control: Control) -> set[str]:
    """Return the old months that are there."""
    return {
        name for (name,) in control.all(
            "SELECT relname FROM pg_class JOIN pg_inherits ON inhrelid = oid "
            "WHERE inhparent = 'audit.event'::regclass AND relname LIKE 'event_2024%'")
    }  # fmt: skip
