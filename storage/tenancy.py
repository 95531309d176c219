"""Which account a transaction may see: row-level security, set with SET LOCAL."""

from uuid import UUID

from sqlalchemy import Connection, text


def enter(tx: Connection, account_id: UUID) -> None:
    """Limit tenant tables to one account until this transaction ends."""
    tx.execute(
        text("SELECT set_config('syncward.account_id', :account, true)"),
        {"account": str(account_id)},
    )


def across(tx: Connection) -> None:
    """Let an operator read all accounts until this transaction ends.

    Whoever calls this leaves an event, once per look of a person (`instance.read`).
    """
    tx.execute(text("SELECT set_config('syncward.across_accounts', 'on', true)"))
