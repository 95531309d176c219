"""Controls of operators: pauses, retention, who schedules (the SQL is in 0002_run_control.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    sql = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    run_script(op.get_bind(), sql)
