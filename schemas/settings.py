"""Settings: everything the environment may say. schemas/environment.py reads it."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas import anchors
from schemas.children import ChildPolicy
from schemas.egress import LinkPolicy, endpoints, parse_openings
from schemas.limits import LOST_LEASES_MAX
from schemas.streams import parse_duration

Duration = Annotated[timedelta, BeforeValidator(parse_duration)]

#: Written by `up --dev` and `demo` into the data directory (0600); read where the environment is
#: silent.
DEV_ENV_FILE = "dev.env"


class Settings(BaseSettings):
    """One field per `SYNCWARD_*` variable; docs/settings.md lists them (tested)."""

    model_config = SettingsConfigDict(
        env_prefix="SYNCWARD_", extra="ignore", hide_input_in_errors=True
    )

    profile: Literal["production", "development"] = Field(
        "production",
        description="`development` allows plaintext loopback links; `demo` and `up` choose it.",
    )
    database_url: SecretStr | None = Field(
        None,
        description="Control database, `postgresql://login:password@host:5432/database?sslmode=verify-full`.",
    )
    keystore_url: SecretStr | None = Field(
        None,
        description="Database of the wrapped keys; the control database if unset. "
        "Apart, with backups kept for a shorter time, deleting an account shreds it.",
    )
    backup_keep: Duration = Field(
        timedelta(days=30),
        description="How long backups of the control database are kept: a replaced key lives so "
        "long, for the backups that need it.",
    )
    keystore_backup_keep: Duration = Field(
        timedelta(days=7),
        description="How long backups of a separate keystore are kept: so long after a deletion "
        "a key could still be restored.",
    )
    redis_url: SecretStr | None = Field(
        None, description="Redis or Valkey, `rediss://user:password@host:6379/0`."
    )
    keyring: str | None = Field(
        None,
        description="`file:///path/operator.json` for the CLI, `worker.json` for workers; "
        "or `vault://…` (docs/keys.md).",
    )
    audit_signing_key: Path | None = Field(
        None,
        description="File (mode 0600) of the key that signs the audit log; on the sealer's host "
        "only.",
    )
    audit_public_key: Path | None = Field(
        None,
        description="File with the public keys that `audit verify` trusts, one a line.",
    )
    audit_anchors: str | None = Field(
        None,
        description="Where signed checkpoints of the audit log go, separated by spaces: "
        "`file:///mnt/other-host/syncward.anchor`, `syslog+tls://…`, `s3://…` (docs/anchors.md).",
    )
    audit_s3_credentials_file: Path | None = Field(
        None,
        description="File (mode 0600) with the login of `s3://` anchors; AWS's usual places if "
        "unset.",
    )
    data_dir: Path = Field(Path(".syncward"), description="Data of `--dev` and `demo`, mode 0700.")
    account: str | None = Field(None, description="Default of `--account`.")
    worker_threads: int = Field(
        4, ge=1, le=64, description="Runs that one worker executes at once."
    )
    runs_max: int = Field(200, ge=1, description="Runs at once over all accounts.")
    resource_runs_max: int = Field(
        4, ge=1, description="Runs at once against one resource, for resources created from now on."
    )
    egress_allow: str | None = Field(
        None,
        description="Private ranges that resources may lie in: `10.0.0.0/8, 10.1.2.3/32:5432`.",
    )
    files_root: Path | None = Field(
        None,
        description="Directory of resources that are files, one directory per account id below "
        "it, the same on every worker; without it they are refused.",
    )
    connectors_dir: Path | None = Field(
        None,
        description="Directory of installed Singer taps and Airbyte sources, on every worker; "
        "without it none is started (docs/child-connectors.md).",
    )
    connectors_unguarded: bool = Field(
        default=False,
        description="Those whose resource lists no `hosts` reach whatever the host can reach, past "
        "the egress guard; and in production all, where the kernel cannot guard them.",
    )
    connectors_user: str | None = Field(
        None,
        description="Login that they run as; needs a worker that may switch to it. Unset: the "
        "worker's own.",
    )
    connectors_confined: bool = Field(
        default=True,
        description="They write in a directory of their own only and read little but the system, "
        "where the kernel has Landlock.",
    )
    connectors_readable: str | None = Field(
        None,
        description="Directories that they may read besides, separated by `:`; `/` is everything.",
    )
    connectors_memory: int = Field(
        1_024, ge=64, description="MiB that one of them may have, with all its processes."
    )
    connectors_cpu: Duration = Field(
        timedelta(hours=1), description="Processor time that each of its processes may use."
    )
    connectors_traffic: int = Field(
        16_384, ge=1, description="MiB that one of them may receive and send, where it is guarded."
    )
    connectors_silence: Duration = Field(
        timedelta(minutes=10), description="One that says nothing for so long is ended."
    )
    lease: Duration = Field(
        timedelta(seconds=30),
        description="How long a silent worker keeps a run. At least three heartbeats.",
    )
    heartbeat: Duration = Field(
        timedelta(seconds=3), description="Time between two lease renewals."
    )
    stuck_after: Duration = Field(
        timedelta(minutes=15),
        description="No rows for so long is reported; twice as long cancels the run.",
    )
    lost_leases_max: int = Field(
        LOST_LEASES_MAX,
        ge=1,
        le=100,
        description="Lost leases without progress that fail a run and pause its connection.",
    )
    drain_grace: Duration = Field(
        timedelta(seconds=20),
        description="How long a stopping worker waits for its runs to be handed back.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address of the metrics endpoint.")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of the metrics endpoint; 0 turns it off."
    )
    metrics_token_file: Path | None = Field(
        None,
        description="File (mode 0600) with the bearer token that readers of metrics must show.",
    )
    disk_encryption_attested: str | None = Field(
        None,
        description="Who checked that the control database's disks are encrypted, and when.",
    )
    log_format: Literal["people", "json"] = Field(
        "people", description="Shape of process logs on stderr."
    )

    @field_validator("audit_anchors")
    @classmethod
    def _anchors(cls, value: str | None) -> str | None:
        reasons = anchors.parse(value).reasons if value is not None else ()
        if reasons:
            raise ValueError("; ".join(reasons))
        return value

    @field_validator("egress_allow")
    @classmethod
    def _ranges(cls, value: str | None) -> str | None:
        parse_openings(value or "")
        return value

    def link_policy(self) -> LinkPolicy:
        """Return what holds for links to other systems; every URL above is a service of our own."""
        development = self.profile == "development"
        values = (getattr(self, name) for name in type(self).model_fields)
        texts = (v.get_secret_value() if isinstance(v, SecretStr) else v for v in values)
        own = endpoints(text for text in texts if isinstance(text, str) and "://" in text)
        own |= anchors.endpoints(self.audit_anchors or "")
        if self.metrics_port:
            own |= {(self.metrics_host, self.metrics_port)}
        return LinkPolicy(
            loopback=development,
            allow=parse_openings(self.egress_allow or ""),
            own=own,
            own_openable=development,
            tls_required=not development,
            superuser_refused=not development,
            files_root=self.files_root,
            children=ChildPolicy(
                directory=self.connectors_dir,
                unguarded=self.connectors_unguarded,
                unguarded_there=development or self.connectors_unguarded,
                writable_refused=not development,
                memory=self.connectors_memory << 20,
                cpu=self.connectors_cpu,
                silence=self.connectors_silence,
                traffic=self.connectors_traffic << 20,
                confined=self.connectors_confined,
                readable=tuple(Path(p) for p in (self.connectors_readable or "").split(":") if p),
                user=self.connectors_user,
            ),
        )

    #: The servers are those of the data directory's `dev.env`; schemas/environment.py says so.
    _embedded: bool = PrivateAttr(default=False)

    @property
    def embedded(self) -> bool:
        """Whether `demo` or `up --dev` named the servers, not the environment."""
        return self._embedded

    def of_dev_env(self) -> Self:
        """Mark these settings as ones whose servers come from `dev.env`."""
        self._embedded = True
        return self
