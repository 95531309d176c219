"""The sealer process, `syncward sealer`: any number of them may run, one at a time seals."""

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from time import monotonic

from sqlalchemy import Connection, Engine

from audit import memory, metrics, prune, statement
from audit.anchors import loading
from audit.anchors.loading import Opening
from audit.prune import PruneRefused
from audit.publisher import AnchorsNotCompared, Judge, Lane, Publisher
from audit.sealer import BATCH, LEASE, LogWentBack, Sealer
from crypto import signing
from crypto.errors import KeyringError
from crypto.kms import private
from crypto.signing import PublicKey
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError, SyncwardError
from schemas.profiles import all_reasons
from schemas.settings import Settings
from schemas.start import Reasons, until_asked
from storage import admission, audit, exposition, seal_watch, sealing
from storage.engine import open_engine, transaction
from storage.metrics import BUILD

logger = logging.getLogger(__name__)

#: Seconds from one batch to the next, while batches are not full.
SEAL_EVERY_S = 0.25
#: A sealer that stands by looks so often whether the log is free.
STAND_BY_S = 0.5
#: After a step that failed: the reason rarely goes away at once.
FAILED_PAUSE_S = 1.0
#: Between two looks at the key's file and at how far behind the log is.
LOOK_EVERY_S = 1.0
#: A lag that an operator hears of, and how often.
LAG_TOO_LONG_S = 5.0
LAG_SAID_EVERY_S = 10.0
#: A prune that is refused is so until an operator asks anew.
PRUNE_SAID_EVERY_S = 60.0
_REASON_MAX = 200


def run(settings: Settings, accepted_loss: str | None = None) -> None:
    """Seal until SIGTERM or SIGINT. A step that fails is logged and comes again.

    Only a database that is not, or cannot be shown to be, what was signed ends the process (exit
    code 78).
    """
    process = _build(settings, accepted_loss)
    admission.ask(process.engine, settings, "sealer")
    if settings.metrics_port:
        exposition.serve(settings)
    stop = until_asked()
    logger.info("sealer_ready", extra={"holder": process.sealer.holder})
    try:
        while not stop.is_set():
            stop.wait(process.turn())
    finally:
        process.close()
    logger.info("sealer_stopped")


@dataclass(slots=True)
class Process:
    """A sealer, its anchors, and what surrounds both."""

    engine: Engine
    sealer: Sealer
    opening: Opening
    trusted: tuple[PublicKey, ...] = ()  # by SYNCWARD_AUDIT_PUBLIC_KEY, beside our own
    _publisher: Publisher | None = None
    _announced: set[str] = field(default_factory=set)  # keys that are said to be in use
    _stamp: tuple[int, ...] | None = None
    _looked_at: float = float("-inf")
    _lag_said_at: float = float("-inf")
    _prune_said_at: float = float("-inf")

    def turn(self) -> float:
        """Seal, publish, look around; return after how many seconds to come again.

        LogWentBack if the database is not what was signed; AnchorsNotCompared if that cannot be
        told.
        """
        try:
            if self._publisher is None:
                self._publisher = self._compared()
            if monotonic() >= self._looked_at + LOOK_EVERY_S:
                self._looked_at = monotonic()
                self._take_new_key()
                self._measure()
                self._prune()
        except (LogWentBack, AnchorsNotCompared):
            raise
        except SyncwardError as error:
            self._failed("look", error)
            if self._publisher is None:
                return FAILED_PAUSE_S
        pause = self._seal()
        try:
            self._publisher.look()
        except LogWentBack:
            raise
        except SyncwardError as error:
            self._failed("publish", error)
            return max(pause, FAILED_PAUSE_S)
        return pause

    def close(self) -> None:
        """Let another sealer go on at once, then let go of everything else."""
        try:
            self.sealer.close()
        except SyncwardError as error:
            self._failed("seal", error)
        if self._publisher is not None:
            self._publisher.stop()
        self.engine.dispose()

    def _compared(self) -> Publisher:
        """Return a publisher whose anchors hold nothing that the database does not."""
        with transaction(self.engine) as tx:
            log_id = sealing.state(tx).log_id
        judge = Judge(self.engine, self.sealer, self._known)
        publisher = Publisher(
            self.engine,
            self.sealer,
            [
                Lane(number, uri.kind, anchor, judge)
                for number, (uri, anchor) in enumerate(
                    zip(self.opening.uris, self.opening.of(log_id), strict=True), 1
                )
            ],
        )
        # what we remember, or an operator, vouches for the database where an anchor cannot
        knows_nothing = memory.recall(memory.path_of(self.sealer.key_path)) is None
        publisher.compare(first=knows_nothing and self.sealer.accepted_loss is None)
        publisher.start()
        return publisher

    def _prune(self) -> None:
        """Go a step with months that two operators want dropped; say once in a while why not."""
        if not self.sealer.holds:
            return
        try:
            prune.step(self.engine, self.sealer.signer, self.sealer.principal)
        except PruneRefused as error:
            if monotonic() >= self._prune_said_at + PRUNE_SAID_EVERY_S:
                self._prune_said_at = monotonic()
                logger.error("prune_refused", extra={"code": error.code, "reason": error.public})  # noqa: TRY400 - our own words

    def _known(self) -> Sequence[PublicKey]:
        return (*self.sealer.signer.public, *self.trusted)

    def _seal(self) -> float:
        started = monotonic()
        try:
            sealed = self.sealer.step()
            if self.sealer.holds:
                self.sealer.accepted_loss = None  # it was for what was lost before, and is used up
                self._announce()
        except LogWentBack:
            raise
        except SyncwardError as error:
            self._failed("seal", error)
            return FAILED_PAUSE_S
        metrics.SEALING.set(int(self.sealer.holds))
        if not self.sealer.holds:
            return STAND_BY_S
        if sealed is not None:
            metrics.SEALED.inc(len(sealed.seqs))
            metrics.BATCHES.inc()
            if len(sealed.seqs) >= BATCH:
                return 0.0
        return max(0.0, SEAL_EVERY_S - (monotonic() - started))

    def _announce(self) -> None:
        """Say once with which keys we sign, and that one replaces another."""
        keys = self.sealer.signer.public
        active = keys[0].line
        if active in self._announced:
            return
        with transaction(self.engine) as tx:
            if not self._announced:
                lines = " ".join(key.line for key in keys)
                self._append(
                    tx, AuditAction.SEALER_STARTED, version=version("syncward"), keys=lines
                )
            if len(keys) > 1 and not self._rotation_is_known(tx, active):
                said = statement.signed(
                    self.sealer.signer,
                    sealing.state(tx).log_id,
                    AuditAction.SIGNER_ROTATED,
                    {"before": keys[1].line, "after": active},
                )
                self._append(tx, AuditAction.SIGNER_ROTATED, **said)
        self._announced.add(active)
        logger.info("sealer_started", extra={"keys": [key.name for key in keys]})

    def _rotation_is_known(self, tx: Connection, active: str) -> bool:
        log_id = sealing.state(tx).log_id
        return any(
            one.detail.get("after") == active
            and statement.is_signed(
                log_id, AuditAction.SIGNER_ROTATED, one.detail, self.sealer.signer.public
            )
            for one in seal_watch.rotations(tx)
        )

    def _append(
        self, tx: Connection, action: AuditAction, **detail: str | int | bool | None
    ) -> None:
        event = AuditEvent(
            action, TargetKind.INSTANCE, audit.INSTANCE_ID, self.sealer.principal, detail=detail
        )
        audit.append(tx, event)

    def _take_new_key(self) -> None:
        """Sign with what the key's file holds now; a file that cannot be used changes nothing."""
        stamp = private.stamp(self.sealer.key_path)
        if stamp == self._stamp:
            return
        before, self._stamp = self._stamp, stamp
        try:
            signer = signing.load(self.sealer.key_path)
        except KeyringError as error:
            logger.warning("signing_key_not_reloaded", extra={"reason": error.public})
            return
        if before is not None and signer.public != self.sealer.signer.public:
            logger.info("signing_key_reloaded", extra={"keys": [key.name for key in signer.public]})
        self.sealer.signer = signer

    def _measure(self) -> None:
        """Show how far behind the log is; say who holds it up; keep a quiet log."""
        with transaction(self.engine) as tx:
            lag = seal_watch.lag(tx)
            late = lag.seal > LAG_TOO_LONG_S and self.sealer.holds
            by = seal_watch.blocker(tx) if late else None
            if self.sealer.holds:
                seal_watch.renew(tx, self.sealer.holder, LEASE)
        metrics.SEAL_LAG.set(lag.seal)
        metrics.PUBLISH_LAG.set(lag.publish)
        metrics.LOG_SIZE.set(lag.size)
        if not late or monotonic() < self._lag_said_at + LAG_SAID_EVERY_S:
            return
        self._lag_said_at = monotonic()
        about: dict[str, object] = {"seconds": round(lag.seal, 1)}
        if by is not None:
            about |= {"pid": by.pid, "login": by.login, "database": by.database}
            about |= {"application": by.application}
        logger.warning("sealing_delayed", extra=about)

    @staticmethod
    def _failed(step: str, error: SyncwardError) -> None:
        metrics.STEPS_FAILED.labels(step).inc()
        logger.warning("sealer_step_failed", extra={"step": step, "reason": error.public})


def _build(settings: Settings, accepted_loss: str | None) -> Process:
    reasons = Reasons(all_reasons(settings, "sealer"))
    with reasons.collecting():
        exposition.read_token(settings)
    with reasons.collecting():
        check_reason(accepted_loss)
    key_path = settings.audit_signing_key or Path()
    signer = opening = None
    trusted: tuple[PublicKey, ...] = ()
    if settings.audit_signing_key is not None:
        with reasons.collecting():
            signer = signing.load(key_path)
        with reasons.collecting():
            memory.recall(memory.path_of(key_path))
    if settings.audit_public_key is not None:
        with reasons.collecting():
            trusted = tuple(signing.read_public(settings.audit_public_key))
    with reasons.collecting():
        opening = loading.load(settings)
    reasons.refuse_if_any()
    assert settings.database_url is not None  # noqa: S101 - else there was a reason
    assert signer is not None  # noqa: S101 - as above
    assert opening is not None  # noqa: S101 - as above
    BUILD.labels(version("syncward")).set(1)
    # its own thread, and those of anchors that look at the database
    engine = open_engine(settings.database_url.get_secret_value(), "sealer", pool_size=2)
    host = socket.gethostname()
    sealer = Sealer(
        engine=engine,
        signer=signer,
        key_path=key_path,
        principal=Principal("sealer", host),
        holder=f"{host}-{token_hex(3)}",
        accepted_loss=accepted_loss,
        trusted=trusted,
    )
    return Process(engine, sealer, opening, trusted)


def check_reason(text: str | None) -> None:
    """Refuse a reason that says nothing, or that no event can hold."""
    if text is not None and not (
        len(text.strip()) > 0 and len(text) <= _REASON_MAX and text.isprintable()
    ):
        raise ConfigError(
            f"--accept-loss: say in one line of at most {_REASON_MAX} characters why signed events "
            "are gone"
        )
