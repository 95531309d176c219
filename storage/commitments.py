"""What a field was before and after, as commitments: comparable for ever, readable by nobody.

HMAC-SHA256 with a random key of the account over the field's name and its value. The key stays in
the database and goes with the account. Who holds it (operators) can check a guess, nobody else.
"""

import hmac
import json
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.audit import FieldChange


def changes(
    tx: Connection, account_id: UUID, before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[FieldChange, ...]:
    """Return the fields that differ, each with the commitments to both of its values."""
    differ = sorted(
        name
        for name in {*before, *after}
        if (name in before) != (name in after) or before.get(name) != after.get(name)
    )
    if not differ:
        return ()
    key = bytes(
        tx.execute(
            text("SELECT audit.commitment_key_of(:account)"), {"account": account_id}
        ).scalar_one()
    )
    return tuple(
        FieldChange(
            name,
            _commitment(key, name, before[name]) if name in before else None,
            _commitment(key, name, after[name]) if name in after else None,
        )
        for name in differ
    )


def _commitment(key: bytes, name: str, value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    parts = (name.encode("utf-8", "backslashreplace"), canonical.encode())
    text_ = b"".join(b"%d:%s," % (len(part), part) for part in parts)
    return hmac.digest(key, text_, "sha256").hex()[:32]
