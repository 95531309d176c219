"""What a running run waits for in place (the SQL is in 0014_waits.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
