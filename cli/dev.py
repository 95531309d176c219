"""A development instance: embedded servers, roles, login and keys in one directory."""

import os
import secrets as random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dotenv import dotenv_values
from sqlalchemy import create_engine, text

from cli.supervisor import Child, child_environment
from crypto import keyring as keyrings
from crypto import signing
from embedded.postgres import Cluster
from embedded.valkey import Server
from schemas.audit import Principal
from schemas.settings import DEV_ENV_FILE, Settings
from storage import migrate
from storage.engine import parse_url
from storage.roles import create_login

_LOGIN = "syncward"
DATABASE = "syncward"


@dataclass(frozen=True, slots=True)
class Instance:
    """The running embedded servers and where everything of theirs is kept."""

    data_dir: Path
    postgres: Cluster
    valkey: Server

    @property
    def keyring_dir(self) -> Path:
        return self.data_dir / "keyring"

    @property
    def log_dir(self) -> Path:
        return self.data_dir / "logs"

    @property
    def audit_dir(self) -> Path:
        return self.data_dir / "audit"

    @property
    def signing_key(self) -> Path:
        return self.audit_dir / "signer.json"

    @property
    def public_key(self) -> Path:
        return self.audit_dir / "signer.pub"

    def children(
        self, settings: Mapping[str, str] | None = None, *, workers: int = 1
    ) -> list[Child]:
        """Describe the processes of this instance; `settings` are SYNCWARD_* values in clear."""
        extra = {f"SYNCWARD_{name.upper()}": value for name, value in (settings or {}).items()}
        worker_file = str(self.keyring_dir / "worker.json")
        scheduler = Child(
            "scheduler", "scheduler.process", child_environment(self.data_dir, **extra)
        )
        environment = child_environment(self.data_dir, SYNCWARD_KEYRING=worker_file, **extra)
        sealing = child_environment(
            self.data_dir, SYNCWARD_AUDIT_SIGNING_KEY=str(self.signing_key), **extra
        )
        return [
            scheduler,
            Child("sealer", "audit.process", sealing),
            *(Child(f"worker-{n + 1}", "workers.process", environment) for n in range(workers)),
        ]

    def stop(self) -> None:
        """Stop the servers; data stays."""
        self.valkey.stop()
        self.postgres.stop()


def start(
    data_dir: Path,
    principal: Principal,
    *,
    guard_parent: bool = False,
    postgres: Mapping[str, str] | None = None,
) -> Instance:
    """Start (or find running) the embedded servers and bring the control database up to date.

    Idempotent. Everything lives in `data_dir`, mode 0700; passwords only in files of mode 0600.
    `postgres` holds server settings beyond the embedded cluster's own.
    """
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    data_dir.chmod(0o700)
    directory = data_dir.resolve()
    cluster = Cluster(directory / "postgres", settings=postgres, guard_parent=guard_parent)
    valkey = Server(directory / "valkey", guard_parent=guard_parent)
    cluster.start()
    valkey.start()
    instance = Instance(directory, cluster, valkey)
    instance.log_dir.mkdir(mode=0o700, exist_ok=True)
    if not (instance.keyring_dir / "operator.json").exists():
        keyrings.init(instance.keyring_dir)
    _prepare_signing(instance)
    _prepare_database(instance, principal)
    return instance


def _prepare_signing(instance: Instance) -> None:
    """Make the key that signs the audit log, and its public half for `audit verify`."""
    if not instance.signing_key.exists():
        signing.init(instance.signing_key)
    if not instance.public_key.exists():
        lines = [f"{key.line}\n" for key in signing.load(instance.signing_key).public]
        _write_private(instance.public_key, "".join(lines))


def settings(instance: Instance) -> Settings:
    """Return the operator's settings of this instance, whatever the environment says."""
    values = dotenv_values(instance.data_dir / DEV_ENV_FILE)
    named = {k.removeprefix("SYNCWARD_").lower(): v for k, v in values.items()}
    return Settings.model_validate({**named, "data_dir": instance.data_dir})


def admin_url(cluster: Cluster, database: str) -> str:
    """Return the superuser's URL of an embedded cluster (loopback only)."""
    return f"postgresql://{cluster.superuser}:{cluster.password}@{cluster.host}:{cluster.port}/{database}"


def _prepare_database(instance: Instance, principal: Principal) -> None:
    cluster = instance.postgres
    admin = create_engine(parse_url(admin_url(cluster, "postgres")), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        known = text("SELECT FROM pg_database WHERE datname = :name")
        if connection.execute(known, {"name": DATABASE}).one_or_none() is None:
            connection.execute(text(f"CREATE DATABASE {DATABASE}"))  # a constant of ours
    admin.dispose()
    migrate.upgrade(admin_url(cluster, DATABASE), principal)
    _write_env(instance, _login(instance))


def _login(instance: Instance) -> str:
    """Create the one login of a development instance, a member of every process's role."""
    file = instance.data_dir / "login_password"
    if not file.exists():
        _write_private(file, random.token_urlsafe(24))
    password = file.read_text(encoding="utf-8")
    admin = create_engine(parse_url(admin_url(instance.postgres, DATABASE)))
    with admin.begin() as tx:
        create_login(
            tx, _LOGIN, password=password, roles=("scheduler", "worker", "sealer", "operator")
        )
    admin.dispose()
    return password


def _write_env(instance: Instance, password: str) -> None:
    cluster = instance.postgres
    lines = {
        "PROFILE": "development",
        "DATABASE_URL": f"postgresql://{_LOGIN}:{password}@{cluster.host}:{cluster.port}/{DATABASE}",
        "REDIS_URL": instance.valkey.url,
        "KEYRING": str(instance.keyring_dir / "operator.json"),
        "AUDIT_PUBLIC_KEY": str(instance.public_key),
        "AUDIT_ANCHORS": (instance.audit_dir / "checkpoints.anchor").as_uri(),
    }
    text_ = "".join(f"SYNCWARD_{name}={value}\n" for name, value in lines.items())
    _write_private(instance.data_dir / DEV_ENV_FILE, text_)


def _write_private(path: Path, content: str) -> None:
    """Write a file that nobody else can read at any moment."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
    temporary.replace(path)
