"""What the sealer itself says in the log, signed: whoever may insert events may not say it.

Sealing proves that an event was there, not that it is true. An event that changes what a verifier
accepts (another key, months that are gone, what a restore lost) therefore carries a signature of
the key that signs checkpoints, over the log, the action and every other field of its detail.
"""

import json
from collections.abc import Iterable, Mapping
from uuid import UUID

from crypto.signing import PublicKey, Signer, signed_by
from schemas.audit import AuditAction

#: Actions that only count with a signature.
SIGNED = frozenset(
    {AuditAction.SIGNER_ROTATED, AuditAction.AUDIT_PRUNED, AuditAction.AUDIT_EPOCH_STARTED}
)

Detail = Mapping[str, str | int | bool | None]


def text(log_id: UUID, action: str, detail: Detail) -> str:
    """Return what is signed: three lines, the last of them canonical JSON."""
    said = {key: value for key, value in detail.items() if key != "signature"}
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"syncward/statement/{log_id}\n{action}\n{canonical}\n"


def signed(
    signer: Signer, log_id: UUID, action: AuditAction, detail: Detail
) -> dict[str, str | int | bool | None]:
    """Return the detail with its signature."""
    return {**detail, "signature": signer.sign(text(log_id, action, detail))}


def signers(
    log_id: UUID, action: str, detail: Detail, keys: Iterable[PublicKey]
) -> list[PublicKey]:
    """Return which of the keys signed this detail: none, if it was a key that is not among them.

    ValueError if nobody signed, or if a signature names one of the keys and is not its own.
    """
    signature = detail.get("signature")
    if not isinstance(signature, str) or not signature:
        raise ValueError("not signed")
    try:
        said = text(log_id, action, detail)
    except RecursionError:
        raise ValueError("nested too deep to have been signed") from None
    return signed_by(said, signature, keys)


def is_signed(log_id: UUID, action: str, detail: Detail, keys: Iterable[PublicKey]) -> bool:
    """Say whether one of the keys signed this detail."""
    try:
        return bool(signers(log_id, action, detail, keys))
    except ValueError:
        return False
