"""Every outbound call of a run as a row (the SQL is in 0013_api_calls.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
