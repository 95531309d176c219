"""Seal committed events: one batch, one transaction, one signed checkpoint. Start at `Sealer.step`.

Whatever is killed in between, the transaction either holds batch, tiles, checkpoint and the new
position, or none of them. What was signed and committed is remembered beside the key, so that a
database that was put back or rewritten is not signed again (`LogWentBack`).
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Connection, Engine

from audit import memory, statement
from audit.checkpoint import Checkpoint
from audit.memory import LastSigned
from audit.tree import Edge, ProofError
from crypto.signing import Signer
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError
from storage import audit, sealing
from storage.engine import transaction
from storage.sealing import LogState, Sealed, Window

logger = logging.getLogger(__name__)

#: Events of one checkpoint at most.
BATCH = 1024
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
    _edge: Edge | None = None
    _holds: bool = False

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
        self._edge = done.edge
        return done.sealed

    def _within(self, tx: Connection, edge: Edge | None) -> "_Done":
        seen = sealing.state(tx)
        self._holds = seen.held and seen.holder == self.holder
        if seen.held and not self._holds:
            return _Done(edge)  # another one seals
        edge, lost = self._verified_edge(tx, seen, edge)
        found = None if lost else sealing.window(tx, seen, BATCH)
        if found is None and lost is None and not seen.went_back and self._fresh(seen):
            return _Done(edge)
        self._holds = sealing.hold(tx, self.holder, seen, lease=LEASE)
        if not self._holds:
            return _Done(edge)
        if lost is not None:
            self._begin_epoch(tx, seen, f"restored: {self.accepted_loss}", lost=lost)
            self.accepted_loss = None
            return _Done(edge, signed=LastSigned(seen.log_id, seen.size, edge.root()))
        if found is None:
            self._stay_alive(tx, seen)
            return _Done(edge)
        sealed = self._seal(tx, seen, found, edge)
        return _Done(edge, sealed, LastSigned(seen.log_id, sealed.size, sealed.root))

    def _seal(self, tx: Connection, seen: LogState, found: Window, edge: Edge) -> Sealed:
        tiles = [*edge.append(found.leaves), *edge.partial()]
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
        now = datetime.now(UTC)
        return self._holds and seen.held and now < seen.sealed_at + HEARTBEAT

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
            if last is None:
                return found, None
            if last.log_id != seen.log_id or last.size > seen.size:
                return found, self._accepted(seen, last)
            if Edge.load(last.size, fetch).root() != last.root:
                raise LogWentBack(_not_what_was_signed(last.size))
        except (KeyError, ProofError):
            raise LogWentBack(_not_what_was_signed(seen.size)) from None
        return found, None

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

    def _stay_alive(self, tx: Connection, seen: LogState) -> None:
        """Begin an epoch on another server; or write an event if there was none for long."""
        if seen.went_back:
            self._begin_epoch(tx, seen, "another server")
        elif datetime.now(UTC) >= seen.sealed_at + HEARTBEAT:
            audit.append(tx, self._event(AuditAction.AUDIT_HEARTBEAT, size=seen.size))

    def _begin_epoch(
        self, tx: Connection, seen: LogState, reason: str, *, lost: LastSigned | None = None
    ) -> None:
        gone = (lost.size, lost.root) if lost else None
        epoch = sealing.begin_epoch(tx, seen, reason, lost=gone)
        detail: dict[str, str | int | bool | None] = {
            "epoch": epoch, "size": seen.size, "why": reason,
        }  # fmt: skip
        if lost:
            detail |= {"lost_size": lost.size, "lost_root": lost.root.hex()}
            action = AuditAction.AUDIT_EPOCH_STARTED
            detail = statement.signed(self.signer, seen.log_id, action, detail)
        audit.append(tx, self._event(AuditAction.AUDIT_EPOCH_STARTED, **detail))
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
