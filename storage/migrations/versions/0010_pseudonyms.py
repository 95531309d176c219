"""Keys of pseudonyms in the keystore of this database (the SQL is in ../keystore.sql)."""

from pathlib import Path

from alembic import op

from storage.engine import run_script

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    script = Path(__file__).parent.parent / "keystore.sql"
    run_script(op.get_bind(), script.read_text(encoding="utf-8"))
