"""A secret as it leaves whoever sealed it, for the control database to keep."""

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class SealedSecret:
    """One secret as it is stored: envelope, its wrapped data key, and a salted fingerprint."""

    field: str
    version: int
    envelope: bytes
    fingerprint: bytes
    dek_id: UUID
    root_id: UUID
    wrapped: bytes
    short: bool = False  # too short to be looked for in texts
