"""Names of operators, apart from what they did: events carry an id, a table holds its name.

The id is a salted commitment to the name. With name and salt anybody can check that this name, and
no other, is the one that the event meant; when both are erased, the event stays and is still
proven, but says nothing about a person.
"""

from dataclasses import dataclass
from hashlib import sha256

from sqlalchemy import Connection, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.audit_body import escaped
from schemas.errors import Conflict, NotFound
from storage import audit

_ALL = text("SELECT id, kind, name, salt FROM audit.principal ORDER BY first_seen, id")


def principal_id(kind: str, name: str, salt: bytes) -> str:
    """Return the commitment to a name, as the database makes it."""
    fields = (b"syncward/principal/v1", salt, kind.encode(), name.encode())
    return sha256(b"".join(b"%d:%s," % (len(f), f) for f in fields)).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Name:
    """A name and what proves that an id means it."""

    id: str
    kind: str
    name: str
    salt: bytes

    @property
    def is_meant(self) -> bool:
        """Whether the id is the commitment to this name."""
        return principal_id(self.kind, self.name, self.salt) == self.id


def known(tx: Connection) -> list[Name]:
    """Return the names that were not erased, right or wrong."""
    return [
        Name(row.id, row.kind, row.name, bytes(row.salt))
        for row in tx.execute(_ALL)
        if row.name is not None and row.salt is not None
    ]


def shown(tx: Connection) -> dict[str, str]:
    """Return principal as it stands in events -> name."""
    return {f"operator:{id_}": name for id_, name in names(tx).items()}


def names(tx: Connection) -> dict[str, str]:
    """Return id -> name of all whose name was not erased and is the one that was meant."""
    return {one.id: one.name for one in known(tx) if one.is_meant}


def mismatches(tx: Connection) -> list[str]:
    """Return the ids behind which another name was put; an erased one is none of them."""
    return [
        row.id
        for row in tx.execute(_ALL)
        if (row.name is None) != (row.salt is None)
        or (row.name is not None and principal_id(row.kind, row.name, bytes(row.salt)) != row.id)
    ]


def erase(tx: Connection, name: str, *, reason: str, principal: Principal) -> str:
    """Erase an operator's name and salt, and say so in the log; return the id that stays.

    Nobody erases their own: this command would name them again.
    """
    if escaped(name) == escaped(principal.name):
        raise Conflict(
            f"operator {name}: this command would be an event of yours; "
            "let another operator erase the name"
        )
    found: str | None = tx.execute(
        text("SELECT audit.erase_name('operator', :name)"), {"name": escaped(name)}
    ).scalar()
    if found is None:
        raise NotFound(
            f"operator {name}: no such name behind the audit log; it is written as the "
            "operating system gave it, or it was erased before"
        )
    event = AuditEvent(
        AuditAction.SUBJECT_ERASED, TargetKind.INSTANCE, audit.INSTANCE_ID, principal,
        reason=reason, detail={"principal": found},
    )  # fmt: skip
    audit.append(tx, event)
    return found
