"""Monthly partitions, made ahead of time."""

from sqlalchemy import Connection, text


def ensure(tx: Connection) -> list[str]:
    """Make the partitions of this month and the next three; return the names of new ones."""
    return list(tx.execute(text("SELECT ensure_partitions()")).scalars())
