"""Who may say what in the audit log (the SQL is in 0008_audit_policies.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
