"""Runs of other kinds on a connection (the SQL is in 0011_run_kinds.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
