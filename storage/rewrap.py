"""Rotation of a root: its data keys are wrapped again, in batches, by whoever may unwrap them."""

from collections.abc import Callable, Sequence
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.limits import WORKER_SILENT_AFTER
from storage.keystore import Keystore, Root, StoredKey, note_unused, read_keys

#: Keys in one transaction.
BATCH = 500

#: Returns keys wrapped by another root; None in the place of one that does not open.
Rewrap = Callable[[Sequence[StoredKey]], Sequence[StoredKey | None]]

_LACKING = text(
    "SELECT count(*) FROM workers WHERE NOT CAST(:root AS uuid) = ANY (roots) "
    "AND seen_at > clock_timestamp() - CAST(:silent AS interval)"
)


def workers_without(tx: Connection, root_id: UUID) -> int:
    """Count the living workers whose keyring has not got this root yet."""
    count: int = tx.execute(_LACKING, {"root": root_id, "silent": WORKER_SILENT_AFTER}).scalar_one()
    return count


def wrap_batch(
    store: Keystore, former: Root, rewrap: Rewrap, bad: set[UUID], principal: Principal
) -> int | None:
    """Wrap some keys of a replaced root again, compare-and-set, and return how many.

    None if none is left, or another root is active by now. Those that do not open go into `bad` and
    are left out from then on.
    """
    with store.transaction() as keys:
        found = stale(keys, former, but=bad)
        if not found:
            note_unused(keys, former.root_id)
            return None
        changed = [
            (old, new) for old, new in zip(found, rewrap(found), strict=True) if new is not None
        ]
        bad |= {key.dek_id for key in found} - {old.dek_id for old, _ in changed}
        if not changed:
            return 0
        count = _store(keys, changed)
        if count:
            store.record(keys, _event(changed[0][1].root_id, count, principal))
        return count or None


def stale(keys: Connection, former: Root, *, but: set[UUID]) -> Sequence[StoredKey]:
    """Lock and return some keys that a root wraps; others skip them meanwhile."""
    source = "stale_credential_keys" if former.purpose == "credentials" else "stale_records_keys"
    query = f"SELECT * FROM keystore.{source}(:roots, :but, :batch)"  # noqa: S608 - one of two names
    found = read_keys(keys, query, roots=[former.root_id], but=list(but), batch=BATCH)
    return list(found.values())


def _store(keys: Connection, changed: Sequence[tuple[StoredKey, StoredKey]]) -> int:
    """Return how many were as before; a root that is not the active one by now takes none."""
    count: int = keys.execute(
        text("SELECT keystore.rewrap(:ids, :old, :new, :roots)"),
        {
            "ids": [old.dek_id for old, _ in changed],
            "old": [old.wrapped for old, _ in changed],
            "new": [new.wrapped for _, new in changed],
            "roots": [new.root_id for _, new in changed],
        },
    ).scalar_one()
    return count


def _event(root_id: UUID, count: int, principal: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.KEYS_REWRAPPED, TargetKind.ROOT, root_id, principal, detail={"keys": count}
    )
