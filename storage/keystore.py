"""The keystore: wrapped data keys and their roots, in the control database or in one of its own.

Functions take `keys`, a transaction with the keystore: `Keystore.beside` gives one. A key row is
committed no later than what is sealed with it; one that nothing was sealed with does no harm.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, Engine, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError
from storage import audit
from storage.engine import transaction


@dataclass(frozen=True, slots=True)
class Keystore:
    """Where the wrapped keys are. Without a database of its own they are in the control database.

    Apart from it they have backups of their own, so that a deleted key is gone when those expire.
    """

    control: Engine
    own: Engine | None = None

    @property
    def separate(self) -> bool:
        return self.own is not None

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction with the keystore and nothing else."""
        with transaction(self.own or self.control) as keys:
            yield keys

    @contextmanager
    def beside(self, tx: Connection) -> Iterator[Connection]:
        """Yield `tx` itself, or a transaction with the separate keystore that commits first."""
        if self.own is None:
            yield tx
        else:
            with transaction(self.own) as keys:
                yield keys

    @contextmanager
    def after(self) -> Iterator[Connection | None]:
        """Yield a transaction with a separate keystore that commits last: for what is deleted."""
        if self.own is None:
            yield None
        else:
            with transaction(self.own) as keys:
                yield keys

    def record(self, keys: Connection, event: AuditEvent) -> None:
        """Append in the same transaction; before it, where the keystore is another database."""
        if self.separate:
            with transaction(self.control) as tx:
                audit.append(tx, event)
        else:
            audit.append(keys, event)

    def dispose(self) -> None:
        """Close the connections of a separate keystore."""
        if self.own is not None:
            self.own.dispose()


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A wrapped data key as it is stored."""

    dek_id: UUID
    account_id: UUID
    root_id: UUID
    wrapped: bytes


# ── data keys ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class RootOffer:
    """The root that a host wraps with, in case that the keystore does not know one yet."""

    root_id: UUID
    purpose: str
    provider: str
    canary: Callable[[], bytes]


def keep(
    tx: Connection,
    keys: Connection,
    key: StoredKey,
    offer: RootOffer,
    principal: Principal,
    *,
    month: date | None = None,
    purpose: str = "",
) -> None:
    """Keep a key before anything is sealed with it; ConfigError if its root is not in use here.

    `purpose` is the key's own where it is not its root's: the key of an account's pseudonyms, which
    is not kept where the account has one.

    The first root of a purpose that wraps a key becomes the one that is known. Any later one must
    be made known by a rotation: a keyring of another installation seals nothing here.
    """
    purpose = purpose or offer.purpose
    if _put(keys, key, purpose, month):
        return
    if not any(root.purpose == offer.purpose for root in roots(keys)):
        add_root(tx, keys, offer, principal)
    if _put(keys, key, purpose, month):  # also if another host made the root known just now
        return
    raise ConfigError(
        f"keyring: its {offer.purpose} root {key.root_id} is retired or of another installation; "
        "use the keyring that is in use now (see: syncward keys status)",
        code="wrong_keyring",
    )


def _put(keys: Connection, key: StoredKey, purpose: str, month: date | None) -> bool:
    kept: bool = keys.execute(
        text("SELECT keystore.put_key(:id, :account, :purpose, :root, :wrapped, :month)"),
        {
            "id": key.dek_id,
            "account": key.account_id,
            "purpose": purpose,
            "root": key.root_id,
            "wrapped": key.wrapped,
            "month": month,
        },
    ).scalar_one()
    return kept


def credential_keys(keys: Connection, dek_ids: Sequence[UUID]) -> dict[UUID, StoredKey]:
    """Return wrapped keys of credentials (workers only); those that are gone are missing."""
    return read_keys(keys, "SELECT * FROM keystore.credential_keys(:ids)", ids=list(dek_ids))


def pseudonym_key(keys: Connection, account_id: UUID) -> StoredKey | None:
    """Return the wrapped key of an account's pseudonyms (workers only); None if it has none."""
    query = "SELECT * FROM keystore.pseudonym_key(:account)"
    return next(iter(read_keys(keys, query, account=account_id).values()), None)


def records_keys(keys: Connection, dek_ids: Sequence[UUID]) -> dict[UUID, StoredKey]:
    """Return wrapped keys of records (operators only); those that are gone are missing."""
    return read_keys(keys, "SELECT * FROM keystore.records_keys(:ids)", ids=list(dek_ids))


def read_keys(keys: Connection, query: str, **parameters: object) -> dict[UUID, StoredKey]:
    """Return what one of the keystore's functions answers with, by id."""
    rows = keys.execute(text(query), parameters)
    return {
        row.id: StoredKey(row.id, row.account_id, row.root_id, bytes(row.wrapped)) for row in rows
    }


# ── replacement of data keys: what they sealed is sealed again ───────────────────────────────


def replace(tx: Connection, keys: Connection, account_id: UUID | None, principal: Principal) -> int:
    """Have the credentials' keys of an account (None: of all) replaced; return how many."""
    count: int = keys.execute(
        text("SELECT keystore.replace_keys(:account)"), {"account": account_id}
    ).scalar_one()
    event = AuditEvent(
        AuditAction.KEYS_REPLACED,
        TargetKind.ACCOUNT if account_id else TargetKind.INSTANCE,
        account_id or audit.INSTANCE_ID,
        principal,
        account_id=account_id,
        detail={"keys": count},
    )
    audit.append(tx, event)
    return count


@dataclass(frozen=True, slots=True)
class ReplacedKey:
    """A key that is to be replaced; one that is young may have its credential on the way."""

    key: StoredKey
    young: bool


def to_replace(keys: Connection, *, but: Sequence[UUID], batch: int) -> Sequence[ReplacedKey]:
    """Take some keys whose credentials are to be sealed again; others skip them for a minute."""
    rows = keys.execute(
        text("SELECT * FROM keystore.keys_to_replace(:but, :batch)"),
        {"but": list(but), "batch": batch},
    )
    return [
        ReplacedKey(StoredKey(row.id, row.account_id, row.root_id, bytes(row.wrapped)), row.young)
        for row in rows
    ]


def mark_unused(keys: Connection, dek_ids: Sequence[UUID]) -> None:
    """Note that nothing is sealed with these any more; they go when no backup needs them."""
    keys.execute(text("SELECT keystore.mark_unused(:ids)"), {"ids": list(dek_ids)})


def supersede(keys: Connection, dek_ids: Sequence[UUID]) -> None:
    """Note that what these sealed is gone; they go when no backup needs them."""
    keys.execute(text("SELECT keystore.supersede_keys(:ids)"), {"ids": list(dek_ids)})


def forgettable(keys: Connection, *, backups: timedelta, batch: int) -> Sequence[UUID]:
    """Return replaced keys that no backup needs; the control database says if one is in use."""
    rows = keys.execute(
        text("SELECT keystore.forgettable(now() - :backups, :batch)"),
        {"backups": backups, "batch": batch},
    )
    return list(rows.scalars())


def used_again(keys: Connection, dek_ids: Sequence[UUID]) -> None:
    """Note that something is sealed with these, after all: they are to be replaced once more."""
    keys.execute(text("SELECT keystore.used_again(:ids)"), {"ids": list(dek_ids)})


def forget(keys: Connection, dek_ids: Sequence[UUID], *, records: timedelta) -> int:
    """Delete these keys, and those of months whose records are gone; return how many."""
    count: int = keys.execute(
        text(
            "SELECT keystore.forget_keys(:ids, CAST(date_trunc('month', now() - :records) AS date))"
        ),
        {"ids": list(dek_ids), "records": records},
    ).scalar_one()
    return count


# ── shredding ────────────────────────────────────────────────────────────────────────────────


def shred_account(keys: Connection, account_id: UUID) -> int:
    """Delete every key of an account: nothing of it opens any more; return how many."""
    count: int = keys.execute(
        text("SELECT keystore.shred_account(:account)"), {"account": account_id}
    ).scalar_one()
    return count


def shred(keys: Connection, account_id: UUID, dek_ids: Sequence[UUID]) -> None:
    """Delete an account's keys whose credentials are deleted."""
    keys.execute(
        text("SELECT keystore.shred_keys(:account, :ids)"),
        {"account": account_id, "ids": list(dek_ids)},
    )


# ── roots ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Root:
    """A root as the keystore knows it; its key is in keyrings only."""

    root_id: UUID
    purpose: str
    provider: str
    state: str  # next | active | decrypt_only | retired
    canary: bytes
    created_at: datetime
    activated_at: datetime | None
    unused_since: datetime | None


def roots(keys: Connection) -> Sequence[Root]:
    """Return all roots, oldest first."""
    rows = keys.execute(text("SELECT * FROM keystore.root ORDER BY created_at, id"))
    return [
        Root(
            row.id, row.purpose, row.provider, row.state, bytes(row.canary), row.created_at,
            row.activated_at, row.unused_since,
        )
        for row in rows
    ]  # fmt: skip


def follow(keys: Connection, prefer: Callable[[UUID], object]) -> None:
    """Tell a keyring which roots are active: a host that has one as `next` wraps by it, too."""
    for root in roots(keys):
        if root.state == "active":
            prefer(root.root_id)


def add_root(tx: Connection, keys: Connection, offer: RootOffer, principal: Principal) -> bool:
    """Make a root known: the first of its purpose is active at once, a later one is `next`.

    False if it, or another one that is `next`, is there already.
    """
    added: bool = keys.execute(
        text("SELECT keystore.add_root(:id, :purpose, :provider, :canary)"),
        {
            "id": offer.root_id,
            "purpose": offer.purpose,
            "provider": offer.provider,
            "canary": offer.canary(),
        },
    ).scalar_one()
    if added:
        detail = {"purpose": offer.purpose, "provider": offer.provider}
        audit.append(tx, _event(AuditAction.ROOT_ADDED, offer.root_id, principal, **detail))
    return added


def activate(tx: Connection, keys: Connection, root: Root, principal: Principal) -> None:
    """Wrap by this root from now on; the active one of its purpose only opens."""
    former: UUID | None = keys.execute(
        text("SELECT keystore.activate_root(:id)"), {"id": root.root_id}
    ).scalar_one()
    if former is not None:
        audit.append(tx, _event(AuditAction.ROOT_REPLACED, former, principal))
    audit.append(
        tx, _event(AuditAction.ROOT_ACTIVATED, root.root_id, principal, purpose=root.purpose)
    )


def retire(tx: Connection, keys: Connection, root: Root, principal: Principal) -> bool:
    """Take no key of this root any more; False if one is wrapped by it."""
    retired: bool = keys.execute(
        text("SELECT keystore.retire_root(:id)"), {"id": root.root_id}
    ).scalar_one()
    if retired:
        audit.append(tx, _event(AuditAction.ROOT_RETIRED, root.root_id, principal))
    return retired


def note_unused(keys: Connection, root_id: UUID) -> None:
    """Note the moment since which no data key is wrapped by this root, if that is so."""
    keys.execute(text("SELECT keystore.note_unused(:id)"), {"id": root_id})


def _event(action: AuditAction, root_id: UUID, principal: Principal, **detail: str) -> AuditEvent:
    return AuditEvent(action, TargetKind.ROOT, root_id, principal, detail=dict(detail))


@dataclass(frozen=True, slots=True)
class KeyCount:
    """How many data keys a root wraps."""

    purpose: str
    root_id: UUID
    keys: int
    oldest: datetime


def counts(keys: Connection) -> Sequence[KeyCount]:
    """Count data keys by root; reads an index, about 0.1 s for a million."""
    rows = keys.execute(text("SELECT * FROM keystore.counts() ORDER BY purpose, root_id"))
    return [KeyCount(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class Pending:
    """What workers still have to do after a rotation."""

    rewrap: int
    replace: int


def pending(keys: Connection, stale_roots: Sequence[UUID]) -> Pending:
    """Count the keys to wrap again and those to replace."""
    row = keys.execute(
        text("SELECT * FROM keystore.pending(:roots)"), {"roots": list(stale_roots)}
    ).one()
    return Pending(row.rewrap, row.replace)
