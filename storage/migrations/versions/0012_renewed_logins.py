"""Logins that workers renew, and those that have died (the SQL is in 0012_renewed_logins.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
