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
from uuid import UUID

from sqlalchemy import Connection, Engine

from audit import memory, statement
from audit.checkpoint import Checkpoint
from audit.memory import LastSigned
from audit.tree import Edge, ProofError
from crypto.signing import PublicKey, Signer, signed_by
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError
from storage import audit, seal_watch, sealing
from storage.engine import transaction
from storage.sealing import LogState, Sealed, Window

logger = logging.getLogger(__name__)

#: Events of one checkpoint.
BATCH = 1024
#: Events of one step: as many as fit one checkpoint, and while there are more, twice as many as in
#: the step before, because finding the next ones of a large transaction sorts all of them.
STEP_MAX = 16 * BATCH
#: After a restore every event is looked at for those that were left: so many at once, in one step
#: for so long, which leaves most of the lease.
LOOKED = 16 * BATCH
LOOK_S = 3.0
#: How long a silent sealer keeps its right to seal.
LEASE = timedelta(seconds=10)
#: After so long without an event the sealer writes one: then silence means that it is not there.
HEARTBEAT = timedelta(seconds=60)


class LogWentBack(ConfigError):  # noqa: N818 - reads best where it is raised
    """The database holds less than, or other than, what was signed: nothing more is signed."""

    code = "audit_went_back"


@dataclass(frozen=True, slots=True)
class _Done:
    """What one step found or did: the tree's edge, the last batch, what to remember as signed."""

    edge: Edge | None
    sealed: Sealed | None = None
    events: int = 0
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
    _most: int = BATCH
    #: How large the log was when it last grew, or we last wrote of our own accord, and when.
    _seen_size: int = -1
    _quiet_since: float = 0.0

    def step(self) -> Sealed | None:
        """Seal what one step takes if there is any and it is our turn; return the last batch.

        LogWentBack if the database is not what was signed before. Any other error leaves
        everything as it was: call again.
        """
        edge, self._edge = self._edge, None  # kept only if all goes well
        with transaction(self.engine) as tx:
            done = self._within(tx, edge)
        if done.signed is not None:
            memory.remember(memory.path_of(self.key_path), done.signed)
        full = done.events >= self._most
        self._most = min(2 * self._most, STEP_MAX) if full else BATCH
        if done.began:
            self.accepted_loss = None
        self._edge = done.edge
        return done.sealed

    def _within(self, tx: Connection, edge: Edge | None) -> _Done:
        seen = sealing.state(tx)
        self._holds = seen.held and seen.holder == self.holder
        others = seen.held and not self._holds
        looked = None if others else self._looked_at(tx, seen, edge)
        if looked is None:
            return _Done(None)  # another one seals
        edge, lost = looked
        begins = lost is not None or seen.elsewhere
        busy = begins or seen.left_over
        found = None if busy else sealing.window(tx, seen, self._most)
        if found is None and not busy and self._fresh(seen):
            return _Done(edge)
        self._holds = sealing.hold(tx, self.holder, seen, lease=LEASE)
        if not self._holds:
            return _Done(edge)
        if begins:
            self._begin_epoch(tx, seen, lost)
            return _Done(edge, signed=self._signed(seen.log_id, seen.size, edge.root()), began=True)
        if seen.left_over:
            found = self._look_for_left_over(tx, seen)
        if found is not None:
            parts = [self._seal(tx, seen, part, edge) for part in found.parts(BATCH)]
            last = self._signed(seen.log_id, parts[-1].size, parts[-1].root)
            return _Done(edge, parts[-1], len(found.seqs), last)
        if not busy and self._is_quiet(seen):
            audit.append(tx, self._event(AuditAction.AUDIT_HEARTBEAT, size=seen.size))
            self._quiet_since = monotonic()
        return _Done(edge)

    def _looked_at(
        self, tx: Connection, seen: LogState, edge: Edge | None
    ) -> tuple[Edge, LastSigned | None] | None:
        """Return `_verified_edge`; None if another one sealed meanwhile: we read two states."""
        try:
            return self._verified_edge(tx, seen, edge)
        except LogWentBack:
            if sealing.state(tx) == seen:
                raise
            return None

    def _signed(self, log_id: UUID, size: int, root: bytes) -> LastSigned:
        return LastSigned(log_id, size, root, tuple(key.line for key in self.signer.public))

    def _look_for_left_over(self, tx: Connection, seen: LogState) -> Window | None:
        """Return some of what epochs before left unsealed; the next step goes on behind it.

        None after a while without any: the log remembers how far it was looked at.
        """
        until = monotonic() + LOOK_S
        while True:
            look = sealing.left_over(tx, seen, LOOKED)
            if look.found is not None:
                return look.found
            if look.ended:
                self._end_left_over(tx, seen)
                return None
            if monotonic() > until:
                return None

    def _end_left_over(self, tx: Connection, seen: LogState) -> None:
        """Let the window count again, and say of the epoch what it took in."""
        taken = sealing.nothing_left(tx, seen)
        if not taken.count:
            return
        about = {"epoch": seen.epoch, "events": taken.count, "oldest": taken.oldest}
        logger.warning("audit_left_over_sealed", extra=about)
        said = self._said_of_epoch(tx, seen)
        if said is None:
            logger.error("audit_epoch_not_ours", extra={"epoch": seen.epoch})
            return
        said |= {"left_over": taken.count, "oldest": taken.oldest}
        action = AuditAction.AUDIT_EPOCH_STARTED
        audit.append(
            tx, self._event(action, **statement.signed(self.signer, seen.log_id, action, said))
        )

    def _said_of_epoch(
        self, tx: Connection, seen: LogState
    ) -> dict[str, str | int | bool | None] | None:
        """Return what was said when this epoch began, if a key that we know signed it.

        The rows of the database are no source: what was lost could be anything there.
        """
        action, keys = AuditAction.AUDIT_EPOCH_STARTED, self._accepted_keys(tx, seen)
        for one in seal_watch.losses(tx):
            if one.detail.get("epoch") == seen.epoch and statement.is_signed(
                seen.log_id, action, one.detail, keys
            ):
                return {name: said for name, said in one.detail.items() if name != "signature"}
        return {"epoch": 1, "size": 0, "why": "installed"} if seen.epoch == 1 else None

    def _seal(self, tx: Connection, seen: LogState, found: Window, edge: Edge) -> Sealed:
        since = edge.size
        tiles = [*edge.append(found.leaves), *edge.partial(since=since)]
        now = datetime.now(UTC)  # our own clock: the database's belongs to its administrator
        root = edge.root()
        text = Checkpoint(seen.log_id, edge.size, root, seen.epoch, now).text
        sealed = Sealed(
            size=edge.size,
            epoch=seen.epoch,
            seqs=found.seqs,
            last=found.ends[-1],
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
                self._catch_up(tx, seen, signed)
        except (KeyError, ProofError, ValueError):
            raise LogWentBack(_not_what_was_signed(seen.size)) from None
        return found, None

    def _catch_up(self, tx: Connection, seen: LogState, newest: Sealed) -> None:
        """Take as signed what we do not remember, if a key that we trust signed it.

        So it is after a kill between the commit and the memory, and after another sealer's turn.
        ValueError for a forged signature; LogWentBack where nobody signed that we know: whoever
        owns the database could have written all of it.
        """
        log_id = seen.log_id
        text = Checkpoint(log_id, newest.size, newest.root, newest.epoch, newest.signed_at).text
        ours = signed_by(text, newest.signatures, self.signer.public)
        if not ours and not signed_by(text, newest.signatures, self._accepted_keys(tx, seen)):
            raise LogWentBack(
                f"audit: the newest checkpoint, of {newest.size} events, is signed by no key that "
                "this sealer knows, or only by one that was rotated away; nothing more is signed. "
                "If a sealer still has the old key, copy the new file to it; if another key signed "
                "it, name its public half in SYNCWARD_AUDIT_PUBLIC_KEY; else run: syncward audit "
                "verify"
            )
        memory.remember(
            memory.path_of(self.key_path), self._signed(log_id, newest.size, newest.root)
        )

    def _accepted_keys(self, tx: Connection, seen: LogState) -> list[PublicKey]:
        """Return the keys that may sign now: ours and those we trust, but none that was replaced.

        What we remember tells, and the log, where the key itself said that another one follows.
        """
        ours, last = self.signer.public, memory.recall(memory.path_of(self.key_path))
        retired = set(last.retired) if last else set()
        for key in self.trusted:
            if key not in ours and self._is_rotated(tx, seen.log_id, key):
                retired.add(key.line)
        return [key for key in (*ours, *self.trusted) if key in ours or key.line not in retired]

    def _is_rotated(self, tx: Connection, log_id: UUID, key: PublicKey) -> bool:
        action = AuditAction.SIGNER_ROTATED
        return any(
            one.detail.get("before") == key.line
            and statement.is_signed(log_id, action, one.detail, [key])
            and statement.is_signed(
                log_id, action, one.detail, (*self.signer.public, *self.trusted)
            )
            for one in seal_watch.rotations(tx, "100 years")
        )

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
