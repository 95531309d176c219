"""Names of operators, apart from what they did: events carry an id, a table holds its name.

The id is a salted commitment to the name. With name and salt anybody can check that this name, and
no other, is the one that the event meant; when both are erased, the event stays and is still
proven, but says nothing about a person.
"""

import json
from dataclasses import dataclass
from hashlib import sha256

from sqlalchemy import Connection, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.audit_body import canonical, escaped
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


#: An erasure and its event are of one transaction. What was pruned since can have no event.
_ERASED = text(
    "SELECT p.id, e.body FROM audit.principal p LEFT JOIN audit.event e "
    "ON e.target_id = :instance AND e.action = 'subject.erased' AND e.class = 'A' AND e.at "
    "BETWEEN p.erased_at - interval '10 minutes' AND p.erased_at + interval '10 minutes' "
    "WHERE p.name IS NULL AND greatest(p.first_seen, p.erased_at) >= coalesce("
    "(SELECT max(before) FROM audit.prune WHERE state = 'done'), '-infinity') "
    "ORDER BY p.id"
)


def unsaid(tx: Connection) -> list[str]:
    """Return the ids whose name is gone although no event of ours says so.

    One that another principal of the log caused, with a reason, in the bytes that we write. Whoever
    may become an operator and writes exactly these by hand is not told from one.
    """
    ids = {row.id for row in tx.execute(_ALL)}
    erased: dict[str, bool] = {}
    for row in tx.execute(_ERASED, {"instance": audit.INSTANCE_ID}):
        erased[row.id] = erased.get(row.id, False) or _says(row.body, row.id, ids)
    return [one for one, is_said in erased.items() if not is_said]


def _says(body: str | None, erased: str, ids: set[str]) -> bool:
    try:
        said = json.loads(body or "")
        kind, _, by = str(said["principal"]).partition(":")
        return (
            canonical(said) == str(body).encode()
            and said["detail"] == {"principal": erased}
            and said["outcome"] == "success"
            and bool(said["reason"])
            and kind == "operator"
            and by in ids
            and by != erased
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def findings(tx: Connection) -> list[str]:
    """Return what is wrong with names, a sentence each."""
    return [
        *(
            f"operator:{one} is not the name that stands behind it in audit.principal: somebody "
            "put another one there"
            for one in mismatches(tx)
        ),
        *(
            f"operator:{one} has no name any more, and no event of an erasure says why"
            for one in unsaid(tx)
        ),
    ]


def erase(tx: Connection, name: str, *, reason: str, principal: Principal) -> str:
    """Erase an operator's name and salt, and say so in the log; return the id that stays.

    Two commands that began at once may have named the operator twice: then all of them, with commas
    between. Nobody erases their own: this command would name them again.
    """
    if escaped(name) == escaped(principal.name):
        raise Conflict(
            f"operator {name}: this command would be an event of yours; "
            "let another operator erase the name"
        )
    found = sorted(
        tx.execute(
            text("SELECT audit.erase_name('operator', :name)"), {"name": escaped(name)}
        ).scalars()
    )
    if not found:
        raise NotFound(
            f"operator {name}: no such name behind the audit log; it is written as the "
            "operating system gave it, or it was erased before"
        )
    events = [
        AuditEvent(
            AuditAction.SUBJECT_ERASED, TargetKind.INSTANCE, audit.INSTANCE_ID, principal,
            reason=reason, detail={"principal": one},
        )
        for one in found
    ]  # fmt: skip
    audit.append(tx, *events)
    return ",".join(found)
