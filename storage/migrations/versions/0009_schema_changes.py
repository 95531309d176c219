"""What changed of a stream's table (the SQL is in 0009_schema_changes.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
