"""Keys that rotate, sealed records (the SQL is in 0004_secrets.sql and ../keystore.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    here = Path(__file__)
    for script in (here.parent.parent / "keystore.sql", here.with_suffix(".sql")):
        run_script(op.get_bind(), script.read_text(encoding="utf-8"))
