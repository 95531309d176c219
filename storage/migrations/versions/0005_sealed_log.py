"""The sealed audit log: tree, checkpoints, epochs (the SQL is in 0005_sealed_log.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
