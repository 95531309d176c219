"""The failure policy's columns (the SQL is in 0003_failure_policy.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    sql = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    run_script(op.get_bind(), sql)
