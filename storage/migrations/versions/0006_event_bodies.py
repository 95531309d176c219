"""Bodies of events, version 2: names and values as commitments (the SQL is in the .sql file)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    run_script(op.get_bind(), Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))
