"""The core: tenants, run control, outputs, keystore, audit (the SQL is in 0001_core.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0001"
down_revision = None


def upgrade() -> None:
    sql = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    run_script(op.get_bind(), sql)
