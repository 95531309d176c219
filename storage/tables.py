"""The tables of the control database for SQLAlchemy Core and for `db check`.

The migrations are the truth for triggers, policies, grants and partitions; this file must agree
with them on tables, columns, types and indexes (tested).
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, REAL, TIMESTAMP
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.schema import SchemaItem
from sqlalchemy.types import TypeEngine, UserDefinedType

metadata = MetaData()

_Type = type[TypeEngine[Any]] | TypeEngine[Any]

_NOW = text("now()")
_CLOCK = text("clock_timestamp()")


class _Xid8(UserDefinedType[int]):
    cache_ok = True

    def get_col_spec(self, **_kw: object) -> str:
        return "xid8"


ischema_names["xid8"] = _Xid8  # so that `db check` can compare the column


def _id(name: str = "id") -> Column[Any]:
    return Column(name, Uuid, primary_key=True)


def _req(name: str, type_: _Type) -> Column[Any]:
    return Column(name, type_, nullable=False)


def _opt(name: str, type_: _Type) -> Column[Any]:
    return Column(name, type_, nullable=True)


def _at(name: str, *, default: bool = False) -> Column[Any]:
    return Column(
        name, TIMESTAMP(timezone=True), nullable=False, server_default=_NOW if default else None
    )


def _of_account(column: str, target: str) -> ForeignKeyConstraint:
    return ForeignKeyConstraint(
        ["account_id", column], [f"{target}.account_id", f"{target}.id"], ondelete="CASCADE"
    )


_TZ = TIMESTAMP(timezone=True)

accounts = Table(
    "accounts", metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    Column("company", Text, nullable=False, server_default=""),
    _req("plan", Text),
    Column("state", Text, nullable=False, server_default="active"),
    _opt("state_reason", Text),
    _at("created_at", default=True),
)  # fmt: skip

instance = Table(
    "instance", metadata,
    _id(),
    Column("state", Text, nullable=False, server_default="active"),
    _opt("state_reason", Text),
    _at("changed_at", default=True),
)  # fmt: skip

resources = Table(
    "resources", metadata,
    _id(),
    Column("account_id", Uuid, ForeignKey("accounts.id"), nullable=False),
    _req("name", Text),
    _req("kind", Text),
    _req("config", JSONB),
    Column("state", Text, nullable=False, server_default="active"),
    _at("created_at", default=True),
    _at("updated_at", default=True),
    UniqueConstraint("account_id", "id"),
    UniqueConstraint("account_id", "name"),
)  # fmt: skip

credentials = Table(
    "credentials", metadata,
    Column("resource_id", Uuid, primary_key=True),
    Column("field", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    _req("account_id", Uuid),
    _req("envelope", LargeBinary),
    _req("fingerprint", LargeBinary),
    _at("created_at", default=True),
    Column("short", Boolean, nullable=False, server_default="false"),
    Column("renewed", Boolean, nullable=False, server_default="false"),
    Column("aim", LargeBinary),
    _of_account("resource_id", "resources"),
)  # fmt: skip
Index("credentials_by_key", func.substr(credentials.c.envelope, 5, 16))

dead_logins = Table(
    "dead_logins", metadata,
    Column("resource_id", Uuid, primary_key=True),
    _req("account_id", Uuid),
    _req("run_id", Uuid),
    _req("versions", JSONB),
    _at("since", default=True),
    _of_account("resource_id", "resources"),
)  # fmt: skip

connections = Table(
    "connections", metadata,
    _id(),
    Column("account_id", Uuid, ForeignKey("accounts.id"), nullable=False),
    _req("name", Text),
    Column("description", Text, nullable=False, server_default=""),
    Column("parameters", JSONB, nullable=False, server_default="{}"),
    _req("source_id", Uuid),
    _req("destination_id", Uuid),
    _req("target_schema", Text),
    _at("created_at", default=True),
    _at("updated_at", default=True),
    UniqueConstraint("account_id", "id"),
    UniqueConstraint("account_id", "name"),
    ForeignKeyConstraint(
        ["account_id", "source_id"], ["resources.account_id", "resources.id"]
    ),
    ForeignKeyConstraint(
        ["account_id", "destination_id"], ["resources.account_id", "resources.id"]
    ),
)  # fmt: skip

streams = Table(
    "streams", metadata,
    Column("connection_id", Uuid, primary_key=True),
    Column("name", Text, primary_key=True),
    _req("account_id", Uuid),
    _req("position", Integer),
    _req("spec", JSONB),
    _of_account("connection_id", "connections"),
)  # fmt: skip

cursors = Table(
    "cursors", metadata,
    Column("connection_id", Uuid, primary_key=True),
    Column("stream", Text, primary_key=True),
    _req("account_id", Uuid),
    _opt("cursor", JSONB),
    _req("fence", BigInteger),
    _at("updated_at", default=True),
    _of_account("connection_id", "connections"),
)  # fmt: skip

schedules = Table(
    "schedules", metadata,
    Column("connection_id", Uuid, ForeignKey("connections.id", ondelete="CASCADE"),
           primary_key=True),
    _req("account_id", Uuid),
    _req("source_id", Uuid),
    _req("destination_id", Uuid),
    _req("kind", Text),
    _opt("interval_s", Integer),
    _opt("cron", Text),
    Column("zone", Text, nullable=False, server_default="UTC"),
    _at("anchor_at", default=True),
    Column("catch_up", Text, nullable=False, server_default="coalesce"),
    Column("overlap", Text, nullable=False, server_default="buffer_one"),
    Column("state", Text, nullable=False, server_default="active"),
    _opt("state_reason", Text),
    _opt("next_due_at", _TZ),
    Column("version", Integer, nullable=False, server_default="1"),
    Column("fence", BigInteger, nullable=False, server_default="0"),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("pause_after", Integer, nullable=True, server_default="10"),
    _opt("last_success_at", _TZ),
    Column("jitter_s", Integer, nullable=False, server_default="0"),
)  # fmt: skip
Index("schedules_due", schedules.c.next_due_at,
      postgresql_where=text("state = 'active' AND next_due_at IS NOT NULL"))  # fmt: skip

account_queues = Table(
    "account_queues", metadata,
    Column("account_id", Uuid, ForeignKey("accounts.id", ondelete="CASCADE"), primary_key=True),
    Column("weight", REAL, nullable=False, server_default="1"),
    _req("runs_max", Integer),
    Column("paused", Boolean, nullable=False, server_default="false"),
    Column("has_work", Boolean, nullable=False, server_default="false"),
    Column("at_cap", Boolean, nullable=False, server_default="false"),
    Column("vtime", Double, nullable=False, server_default="0"),
    Column("woken", BigInteger, nullable=False, server_default="0"),
    _opt("looked_at", _TZ),
    Column("busy_seen", Integer, nullable=False, server_default="0"),
)  # fmt: skip
Index("account_queues_pick", account_queues.c.vtime,
      postgresql_where=text("has_work AND NOT at_cap AND NOT paused"))  # fmt: skip

resource_queues = Table(
    "resource_queues", metadata,
    Column("resource_id", Uuid, ForeignKey("resources.id", ondelete="CASCADE"), primary_key=True),
    _req("runs_max", Integer),
)  # fmt: skip

active_runs = Table(
    "active_runs", metadata,
    Column("subject_id", Uuid, primary_key=True),
    Column("run_id", Uuid, nullable=False, unique=True),
    _req("account_id", Uuid),
    _req("kind", Text),
    _opt("source_id", Uuid),
    _opt("destination_id", Uuid),
    _req("state", Text),
    _req("trigger", Text),
    _at("scheduled_for"),
    _req("priority", SmallInteger),
    Column("options", JSONB, nullable=False, server_default="{}"),
    _at("queued_at", default=True),
    _at("not_before", default=True),
    _opt("deadline_at", _TZ),
    Column("dispatch", Integer, nullable=False, server_default="0"),
    _opt("dispatch_deadline", _TZ),
    _opt("started_at", _TZ),
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("attempts_without_progress", Integer, nullable=False, server_default="0"),
    Column("lost_leases", Integer, nullable=False, server_default="0"),
    _opt("lease_token", Uuid),
    _opt("worker_id", Text),
    _opt("error_code", Text),
    _opt("error", Text),
    _opt("cancel_requested_at", _TZ),
    _opt("cancel_by", Text),
    _opt("again_run_id", Uuid),
    _opt("again_trigger", Text),
    _opt("again_options", JSONB),
    _opt("again_kind", Text),
    Column("promotions", SmallInteger, nullable=False, server_default="0"),
    Column("deferred_for", Interval, nullable=False, server_default="00:00:00"),
)  # fmt: skip
Index("active_runs_ready", active_runs.c.account_id, active_runs.c.priority,
      active_runs.c.not_before, active_runs.c.run_id,
      postgresql_where=text("state = 'queued'"))  # fmt: skip
Index("active_runs_busy", active_runs.c.account_id,
      postgresql_where=text("state IN ('dispatched', 'running')"))  # fmt: skip
Index("active_runs_waiting", active_runs.c.not_before,
      postgresql_where=text("state = 'queued'"))  # fmt: skip
Index("active_runs_redispatch", active_runs.c.dispatch_deadline,
      postgresql_where=text("state = 'dispatched'"))  # fmt: skip

schedulers = Table(
    "schedulers", metadata,
    Column("scheduler_id", Text, primary_key=True),
    _req("version", Text),
    Column("started_at", _TZ, nullable=False, server_default=text("clock_timestamp()")),
    Column("seen_at", _TZ, nullable=False, server_default=text("clock_timestamp()")),
    _opt("queue_down_since", _TZ),
)  # fmt: skip

leases = Table(
    "leases", metadata,
    _id("run_id"),
    _req("token", Uuid),
    _req("worker_id", Text),
    _at("expires_at"),
    _opt("stream", Text),
    Column("rows", BigInteger, nullable=False, server_default="0"),
    Column("bytes", BigInteger, nullable=False, server_default="0"),
    Column("progress_at", _TZ, nullable=False, server_default=_CLOCK),
    _opt("waits_for", Text),
    _opt("waits_until", _TZ),
)  # fmt: skip

workers = Table(
    "workers", metadata,
    Column("worker_id", Text, primary_key=True),
    _req("version", Text),
    _req("slots", Integer),
    Column("draining", Boolean, nullable=False, server_default="false"),
    _at("started_at", default=True),
    _at("seen_at", default=True),
    Column("roots", ARRAY(Uuid), nullable=False, server_default="{}"),
    Column("kinds", ARRAY(Text), nullable=False, server_default="{}"),
)  # fmt: skip

slots = Table(
    "slots", metadata,
    Column("scheduled_for", _TZ, primary_key=True),
    Column("connection_id", Uuid, primary_key=True),
    _req("outcome", Text),
    _opt("run_id", Uuid),
    Column("missed", Integer, nullable=False, server_default="0"),
)  # fmt: skip

runs = Table(
    "runs", metadata,
    Column("finished_at", _TZ, primary_key=True, server_default=_CLOCK),
    Column("run_id", Uuid, primary_key=True),
    _req("account_id", Uuid),
    _req("kind", Text),
    _req("subject_id", Uuid),
    _req("state", Text),
    _req("trigger", Text),
    _at("scheduled_for"),
    _at("queued_at"),
    _opt("started_at", _TZ),
    _req("attempt", Integer),
    _req("fence", BigInteger),
    _opt("worker_id", Text),
    _opt("error_code", Text),
    _opt("error", Text),
)  # fmt: skip
Index("runs_by_id", runs.c.run_id)
Index("runs_by_subject", runs.c.subject_id, runs.c.finished_at.desc())
Index("runs_by_account", runs.c.account_id, runs.c.finished_at.desc())

run_streams = Table(
    "run_streams", metadata,
    Column("run_id", Uuid, primary_key=True),
    Column("stream", Text, primary_key=True),
    _req("account_id", Uuid),
    _req("position", Integer),
    _req("state", Text),
    _req("mode", Text),
    *(_req(f"rows_{what}", BigInteger)
      for what in ("extracted", "loaded", "inserted", "updated", "unchanged", "deleted",
                   "rejected")),
    _req("bytes", BigInteger),
    _opt("cursor_from", JSONB),
    _opt("cursor_to", JSONB),
    _req("seconds", Double),
    _opt("schema_hash", Text),
    _req("attempt", Integer),
    _opt("error", Text),
    Column("schema_changes", JSONB, nullable=False, server_default=text("'[]'::jsonb")),
    Column("finished_at", _TZ, nullable=False, server_default=_CLOCK),
)  # fmt: skip

run_outputs = Table(
    "run_outputs", metadata,
    _id("run_id"),
    _req("account_id", Uuid),
    _opt("document", JSONB),  # of the version before this one; sealed since
    Column("created_at", _TZ, nullable=False, server_default=_CLOCK),
    _opt("envelope", LargeBinary),
)  # fmt: skip

run_logs = Table(
    "run_logs", metadata,
    Column("at", _TZ, nullable=False, server_default=_CLOCK),
    Column("run_id", Uuid, nullable=False),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    _req("account_id", Uuid),
    _req("level", Text),
    _opt("stream", Text),
    _opt("message", Text),  # as run_outputs.document
    _opt("envelope", LargeBinary),
    PrimaryKeyConstraint("at", "run_id", "seq"),
)  # fmt: skip
Index("run_logs_by_run", run_logs.c.run_id, run_logs.c.seq)

api_calls = Table(
    "api_calls", metadata,
    Column("at", _TZ, nullable=False),
    Column("run_id", Uuid, nullable=False),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    _req("account_id", Uuid),
    _req("attempt", Integer),
    _req("method", Text),
    _req("host", Text),
    _req("route", Text),
    _opt("status", SmallInteger),
    _opt("error", Text),
    _req("request_bytes", BigInteger),
    _req("response_bytes", BigInteger),
    _req("milliseconds", Integer),
    PrimaryKeyConstraint("at", "run_id", "seq"),
)  # fmt: skip
Index("api_calls_by_run", api_calls.c.run_id, api_calls.c.seq)

dek = Table(
    "dek", metadata,
    _id(),
    _req("account_id", Uuid),
    _req("purpose", Text),
    _req("root_id", Uuid),
    _req("wrapped", LargeBinary),
    Column("state", Text, nullable=False, server_default="active"),
    _at("created_at", default=True),
    _opt("month", Date),
    _opt("unused_since", _TZ),
    _opt("taken_until", _TZ),
    schema="keystore",
)  # fmt: skip
Index("dek_by_root", dek.c.purpose, dek.c.root_id, dek.c.id)
Index("dek_by_account", dek.c.account_id)
Index("dek_pseudonyms", dek.c.account_id, unique=True,
      postgresql_where=text("purpose = 'pseudonyms'"))  # fmt: skip
Index("dek_replaced", dek.c.id,
      postgresql_where=text("state = 'decrypt_only' AND unused_since IS NULL"))  # fmt: skip
Index("dek_by_month", dek.c.month, postgresql_where=text("month IS NOT NULL"))

root = Table(
    "root", metadata,
    _id(),
    _req("purpose", Text),
    _req("provider", Text),
    _req("state", Text),
    _req("canary", LargeBinary),
    _at("created_at", default=True),
    _opt("activated_at", _TZ),
    _opt("unused_since", _TZ),
    schema="keystore",
)  # fmt: skip
Index("root_active", root.c.purpose, unique=True, postgresql_where=text("state = 'active'"))

event = Table(
    "event", metadata,
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    Column("xid", _Xid8, nullable=False, server_default=text("pg_current_xact_id()")),
    Column("at", _TZ, nullable=False, server_default=_CLOCK),
    _opt("account_id", Uuid),
    _req("class", Text),
    _req("action", Text),
    _req("target_kind", Text),
    _req("target_id", Uuid),
    _req("body", Text),
    Column("login", Text, nullable=False, server_default=""),
    Column("client", Text, nullable=False, server_default=""),
    Column("leaf", LargeBinary, nullable=False, server_default=text("''::bytea")),
    PrimaryKeyConstraint("at", "seq"),
    CheckConstraint("octet_length(body) <= 65536"),
    schema="audit",
)  # fmt: skip
Index("event_by_transaction", event.c.xid, event.c.target_id)
Index("event_by_target", event.c.target_id, event.c.at)
Index("event_by_account", event.c.account_id, event.c.at)

log = Table(
    "log", metadata,
    Column("one", Boolean, primary_key=True, server_default=text("true")),
    Column("log_id", Uuid, nullable=False, server_default=text("gen_random_uuid()")),
    Column("epoch", Integer, nullable=False, server_default="1"),
    Column("size", BigInteger, nullable=False, server_default="0"),
    Column("last_xid", _Xid8, nullable=False, server_default="0"),
    Column("last_seq", BigInteger, nullable=False, server_default="0"),
    Column("floor_seq", BigInteger, nullable=False, server_default="0"),
    Column("left_over", Boolean, nullable=False, server_default="false"),
    Column("left_at", _TZ, nullable=False, server_default=text("'-infinity'")),
    Column("left_seq", BigInteger, nullable=False, server_default="0"),
    Column("sealed_at", _TZ, nullable=False, server_default=_CLOCK),
    Column("published_size", BigInteger, nullable=False, server_default="0"),
    Column("published_at", _TZ, nullable=False, server_default=_CLOCK),
    Column("holder", Text, nullable=False, server_default=""),
    Column("held_until", _TZ, nullable=False, server_default="-infinity"),
    schema="audit",
)  # fmt: skip

checkpoint = Table(
    "checkpoint", metadata,
    Column("size", BigInteger, primary_key=True, autoincrement=False),
    _req("epoch", Integer),
    _req("seqs", ARRAY(BigInteger)),
    _req("last_xid", _Xid8),
    _req("last_seq", BigInteger),
    _req("earliest", _TZ),
    _req("latest", _TZ),
    _req("root", LargeBinary),
    _req("signed_at", _TZ),
    _req("signatures", Text),
    schema="audit",
)  # fmt: skip
Index("checkpoint_by_position", checkpoint.c.epoch, checkpoint.c.last_xid, checkpoint.c.last_seq)
Index(
    "checkpoint_by_time",
    func.tstzrange(checkpoint.c.earliest, checkpoint.c.latest, text("'[]'")),
    postgresql_using="gist",
)

tile = Table(
    "tile", metadata,
    Column("level", SmallInteger, primary_key=True, autoincrement=False),
    Column("n", BigInteger, primary_key=True, autoincrement=False),
    _req("hashes", LargeBinary),
    schema="audit",
)  # fmt: skip

epoch = Table(
    "epoch", metadata,
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    _req("size", BigInteger),
    _req("floor_seq", BigInteger),
    Column("xid", _Xid8, nullable=False, server_default=text("pg_current_xact_id()")),
    Column("started_at", _TZ, nullable=False, server_default=_CLOCK),
    _req("reason", Text),
    _opt("lost_size", BigInteger),
    _opt("lost_root", LargeBinary),
    schema="audit",
)  # fmt: skip

prune = Table(
    "prune", metadata,
    Column("id", Uuid, primary_key=True),
    _req("state", Text),
    _req("before", _TZ),
    _req("first_kept", BigInteger),
    _req("also", ARRAY(BigInteger)),
    _req("sha256", Text),
    _req("requested_by", Text),
    _req("request_seq", BigInteger),
    _req("request_at", _TZ),
    _opt("approved_by", Text),
    _opt("approval_seq", BigInteger),
    _opt("approval_at", _TZ),
    _opt("record_seq", BigInteger),
    _opt("record_at", _TZ),
    _opt("partitions", ARRAY(Text)),
    _opt("withdrawn_by", Text),
    _opt("withdrawal_seq", BigInteger),
    _opt("withdrawal_at", _TZ),
    schema="audit",
)  # fmt: skip
Index("prune_one_at_a_time", text("(true)"), unique=True, _table=prune,
      postgresql_where=text("state IN ('requested', 'approved', 'recorded')"))  # fmt: skip

_PARTITIONED = ("slots", "runs", "run_logs", "api_calls", "event")


def same_object(
    _item: SchemaItem, name: str | None, type_: str, _reflected: object, _compare_to: object
) -> bool:
    """Alembic's filter: partitions and Alembic's own table are nobody's difference."""
    if type_ == "table" and name is not None:
        return name != "alembic_version" and not any(
            name.startswith(f"{parent}_") and name[len(parent) + 1 :].isalnum()
            and (name.endswith("_default") or name[-6:].isdigit())
            for parent in _PARTITIONED
        )  # fmt: skip
    return True


principal = Table(
    "principal", metadata,
    Column("id", Text, primary_key=True),
    _req("kind", Text),
    _opt("name", Text),
    _opt("salt", LargeBinary),
    Column("first_seen", _TZ, nullable=False, server_default=_CLOCK),
    _opt("erased_at", _TZ),
    schema="audit",
)  # fmt: skip
Index("principal_by_name", principal.c.kind, principal.c.name)

commitment_key = Table(
    "commitment_key", metadata,
    Column("account_id", Uuid, ForeignKey("accounts.id", ondelete="CASCADE"), primary_key=True),
    _req("key", LargeBinary),
    schema="audit",
)  # fmt: skip
