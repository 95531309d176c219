"""Right database, wrong keyring: noticed before a worker takes its first job."""

from crypto.canary import check_canary
from crypto.keyring import Keyring
from schemas.errors import StartRefused
from storage.keystore import Keystore, roots


def require(keyring: Keyring, keystore: Keystore) -> None:
    """Refuse to start with a keyring that does not open what the root in use seals."""
    with keystore.transaction() as keys:
        used = [r for r in roots(keys) if r.purpose == "credentials" and r.state == "active"]
    for root in used:
        if not check_canary(keyring, "credentials", root.root_id, root.canary):
            why = f"it does not open what root {root.root_id} seals, which this installation uses"
            raise StartRefused(
                [f"SYNCWARD_KEYRING: {why}; give it the worker.json that belongs to this database"]
            )
