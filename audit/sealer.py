"""Seal committed events: one batch, one transaction, one signed checkpoint. Start at `Sealer.step`.

Whatever is killed in between, the transaction either holds batch, tiles, checkpoint and the new
position, or none of them. What was signed and committed is remembered beside the key, so that a
database that was put back or rewritten is not signed again (`LogWentBack`).
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic

from sqlalchemy import Connection, Engine

from audit import memory, statement
from audit.checkpoint import Checkpoint
from audit.memory import LastSigned
from audit.tree import Edge, ProofError
from crypto.signing import PublicKey, Signer, signed_by
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError
from storage import audit, sealing
from storage.engine import transaction
from storage.sealing import LogState, Sealed, Window

logger = logging.getLogger(__name__)

#: Events of one checkpoint at most.
BATCH = 1024
#: After a restore, of those that were left: finding them reads the whole log.
LEFT = 64 * BATCH
#: How long a silent sealer keeps its right to seal.
LEASE = timedelta(seconds=10)
#: After so long without an event the sealer writes one: then silence means that it is not there.
HEARTBEAT = timedelta(seconds=60)


class LogWentBack(ConfigError):  # noqa: N818 - reads best where it is raised
    """The database holds less than, or other than, what was signed: nothing more is signed."""

    code = "audit_went_back"


@dataclass(frozen=True, slots=True)
class _Done:
    """What one step found or did: the tree's edge, the batch, and what to remember as signed."""

    edge: Edge | None
    sealed: Sealed | None = None
    signed: LastSigned | None = None
    began: bool = False  # an epoch


@dataclass(slots=True)
class Sealer:
    """Owns the signing key; any number may run, one of them at a time seals."""

    engine: Engine
    signer: Signer
    key_path: Path
    principal: Principal
    holder: str
    #: The operator's reason why what was signed may be gone; None: it may not.
    accepted_loss: str | None = None
    #: Keys that may have signed before us: of other sealers, or the ones before ours.
    trusted: tuple[PublicKey, ...] = ()
    _edge: Edge | None = None
    _holds: bool = False
    #: How large the log was when it last grew, or we last wrote of our own accord, and when.
    _seen_size: int = -1
    _quiet_since: float = 0.0

    def step(self) -> Sealed | None:
        """Seal one batch if there is one and it is our turn; return it.

        LogWentBack if the database is not what was signed before. Any other error leaves
        everything as it was: call again.
        """
        edge, self._edge = self._edge, None  # kept only if all goes well
        with transaction(self.engine) as tx:
            done = self._within(tx, edge)
        if done.signed is not None:
            memory.remember(memory.path_of(self.key_path), done.signed)
        if done.began:
            self.accepted_loss = None
        self._edge = done.edge
        return done.sealed

    def _within(self, tx: Connection, edge: Edge | None) -> _Done:
        seen = sealing.state(tx)
        self._holds = seen.held and seen.holder == self.holder
        if seen.held and not self._holds:
            return _Done(edge)  # another one seals
        edge, lost = self._verified_edge(tx, seen, edge)
        begins = lost is not None or seen.elsewhere
        found = None if begins else sealing.window(tx, seen, LEFT if seen.left_over else BATCH)
        if found is None and not (begins or seen.left_over) and self._fresh(seen):
            return _Done(edge)
        self._holds = sealing.hold(tx, self.holder, seen, lease=LEASE)
        if not self._holds:
            return _Done(edge)
        if begins:
            self._begin_epoch(tx, seen, lost)
            return _Done(edge, signed=LastSigned(seen.log_id, seen.size, edge.root()), began=True)
        if found is not None:
            sealed = self._seal(tx, seen, found, edge)
            return _Done(edge, sealed, LastSigned(seen.log_id, sealed.size, sealed.root))
        if seen.left_over:
            sealing.nothing_left(tx)
        elif self._is_quiet(seen):
            audit.append(tx, self._event(AuditAction.AUDIT_HEARTBEAT, size=seen.size))
            self._quiet_since = monotonic()
        return _Done(edge)

    def _seal(self, tx: Connection, seen: LogState, found: Window, edge: Edge) -> Sealed:
        tiles = [*edge.append(found.leaves), *edge.partial(since=seen.size)]
        now = datetime.now(UTC)  # our own clock: the database's belongs to its administrator
        root = edge.root()
        text = Checkpoint(seen.log_id, edge.size, root, seen.epoch, now).text
        sealed = Sealed(
            size=edge.size,
            epoch=seen.epoch,
            seqs=found.seqs,
            last=found.last,
            earliest=found.earliest,
            latest=found.latest,
            root=root,
            signed_at=now,
            signatures=self.signer.sign(text),
        )
        sealing.write(tx, sealed, tiles)
        return sealed

    @property
    def holds(self) -> bool:
        """Whether this sealer is the one that seals."""
        return self._holds

    def close(self) -> None:
        """Let another sealer go on at once."""
        if self._holds:
            with transaction(self.engine) as tx:
                sealing.let_go(tx, self.holder)

    def _fresh(self, seen: LogState) -> bool:
        """Say whether nothing needs to be written: our lease is young, and so is the last event."""
        return not self._is_quiet(seen) and self._holds

    def _is_quiet(self, seen: LogState) -> bool:
        """Say whether the log has not grown for long, by a clock that nobody sets.

        What we write of our own accord counts: behind a long transaction it is not sealed yet.
        """
        if seen.size != self._seen_size:
            self._seen_size, self._quiet_since = seen.size, monotonic()
        return monotonic() - self._quiet_since >= HEARTBEAT.total_seconds()

    def _verified_edge(
        self, tx: Connection, seen: LogState, edge: Edge | None
    ) -> tuple[Edge, LastSigned | None]:
        """Return the tree's edge as the database has it, if it is what was signed before.

        With what was signed and is gone, if an operator accepted that.
        """
        if edge is not None and edge.size == seen.size:
            return edge, None

        def fetch(level: int, n: int) -> bytes:
            return sealing.tile(tx, level, n)

        last = memory.recall(memory.path_of(self.key_path))
        try:
            found = Edge.load(seen.size, fetch)
            signed = sealing.newest_checkpoint(tx)
            if seen.size and (signed is None or signed.root != found.root()):
                raise LogWentBack(_not_what_was_signed(seen.size))
            if last and (last.log_id != seen.log_id or last.size > seen.size):
                return found, self._accepted(seen, last)
            if last and Edge.load(last.size, fetch).root() != last.root:
                raise LogWentBack(_not_what_was_signed(last.size))
            if signed and (last is None or last.size < seen.size):
                self._catch_up(seen, signed)
        except (KeyError, ProofError, ValueError):
            raise LogWentBack(_not_what_was_signed(seen.size)) from None
        return found, None

    def _catch_up(self, seen: LogState, newest: Sealed) -> None:
        """Take as signed what we do not remember, if a key that we trust signed it.

        So it is after a kill between the commit and the memory, and after another sealer's turn.
        ValueError for a forged signature; LogWentBack where nobody signed that we know: whoever
        owns the database could have written all of it.
        """
        log_id = seen.log_id
        text = Checkpoint(log_id, newest.size, newest.root, newest.epoch, newest.signed_at).text
        if not signed_by(text, newest.signatures, (*self.signer.public, *self.trusted)):
            raise LogWentBack(
                f"audit: the newest checkpoint, of {newest.size} events, is signed by no key that "
                "this sealer knows; nothing more is signed. If another key signed it, name its "
                "public half in SYNCWARD_AUDIT_PUBLIC_KEY; else run: syncward audit verify"
            )
        signed = LastSigned(log_id, newest.size, newest.root)
        memory.remember(memory.path_of(self.key_path), signed)

    def _accepted(self, seen: LogState, last: LastSigned) -> LastSigned:
        """Return what is gone if an operator said why; LogWentBack if nobody did."""
        if self.accepted_loss is not None:
            return last
        raise LogWentBack(
            f"audit: {last.size} events of log {last.log_id} were signed here, and the database "
            f"holds {seen.size} of log {seen.log_id}; compare it with the anchors (syncward audit "
            "verify --anchor); if it was restored from a backup, start once with: syncward sealer "
            "--accept-loss REASON"
        )

    def _begin_epoch(self, tx: Connection, seen: LogState, lost: LastSigned | None) -> None:
        reason = f"restored: {self.accepted_loss}" if lost else "another server"
        gone = (lost.size, lost.root) if lost else None
        epoch = sealing.begin_epoch(tx, seen, reason, lost=gone)
        detail: dict[str, str | int | bool | None] = {
            "epoch": epoch, "size": seen.size, "why": reason,
        }  # fmt: skip
        if lost:
            detail |= {"lost_size": lost.size, "lost_root": lost.root.hex()}
        action = AuditAction.AUDIT_EPOCH_STARTED
        signed = statement.signed(self.signer, seen.log_id, action, detail)
        audit.append(tx, self._event(action, **signed))
        logger.warning("audit_epoch_started", extra={"epoch": epoch, "size": seen.size})

    def _event(self, action: AuditAction, **detail: str | int | bool | None) -> AuditEvent:
        return AuditEvent(
            action, TargetKind.INSTANCE, audit.INSTANCE_ID, self.principal, detail=dict(detail)
        )


def _not_what_was_signed(size: int) -> str:
    return (
        f"audit: the first {size} events of the log are not what was signed; nothing more is "
        "signed. Run: syncward audit verify"
    )
