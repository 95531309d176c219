"""Months of the audit log are dropped with proof (the SQL is in 0007_audit_prune.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
