"""Open sealed logs and outputs, as operators do. What does not open is shown as such.

The event that says who reads is committed before anything is opened.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from cli.context import Cli
from cli.credentials import open_keyring
from crypto.cache import KeyCache
from crypto.envelope import Context, take_apart
from crypto.errors import CryptoError, UnknownRoot, UnsealError
from crypto.records import open_records
from crypto.roots import Sealed, WrapContext, Wrapped
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError, SyncwardError
from schemas.runs import Run, RunState
from schemas.sealed_lines import (
    SEALED_MARK,
    Place,
    Unpacked,
    line_context,
    output_context,
    unpacked,
)
from storage import audit
from storage.keystore import records_keys, roots
from storage.logs import StoredLine
from storage.outputs import StoredOutput

NOT_OURS = "it was changed, or moved here from elsewhere"
NO_KEY = "its key was deleted, or is of another installation"
TWICE = "a copy of another line"
GONE = "it is missing, and its run succeeded"
CLEAR = "its sealed part was removed"
OUT_OF_PLACE = "it stands in another place than it was written"


@dataclass(frozen=True, slots=True)
class OpenedLine:
    """A stored line with what it says, or why that cannot be said."""

    stored: StoredLine
    message: str | None
    problem: str | None = None


@dataclass
class Reader:
    """Opens the records of one run and keeps count of what is wrong with them."""

    cli: Cli
    run: Run
    problems: list[str] = field(default_factory=list)
    missing: int = 0
    stopped_early: bool = False  # whether there is an end was not looked at
    _keys: KeyCache | None = None
    _seen: dict[tuple[bytes, int], bytes] = field(default_factory=dict)  # -> its envelope
    _reached: dict[bytes, int] = field(default_factory=dict)
    _at_end: bool = False  # the last line seen is its attempt's last one, or none of ours

    def require_keys(self) -> None:
        """Refuse hosts that cannot open records, before anything is asked."""
        keyring = open_keyring(self.cli)
        if not keyring.can_unwrap("records"):
            raise ConfigError(
                "keyring: it opens no records, as a worker's; run this on an operator's host, "
                "with SYNCWARD_KEYRING naming operator.json"
            )
        self._keys = KeyCache(keyring)

    def page(self, lines: Sequence[StoredLine]) -> list[OpenedLine]:
        """Open one page of lines; lines that were stored twice after an error appear once."""
        places = [line_context(x.account_id, x.run_id, x.at, x.level, x.stream) for x in lines]
        answers = self._open([(x.envelope, p) for x, p in zip(lines, places, strict=True)])
        shown = []
        for line, answer in zip(lines, answers, strict=True):
            if line.envelope is None and line.message is not None:  # of the version before
                self._at_end = True
                shown.append(OpenedLine(line, line.message))
            elif isinstance(answer, bytes):
                shown += self._in_order(line, unpacked(answer))
            else:
                shown.append(self._refused(line, _why(answer)))
        return shown

    def document(self, found: StoredOutput) -> dict[str, Any]:
        """Open a run's document; SyncwardError, and an event, if it does not open."""
        if found.envelope is None:  # whole of the version before; this one leaves counts at most
            if found.document is None or SEALED_MARK in found.document:
                raise self._no_output(CLEAR)
            return found.document
        place = output_context(found.account_id, found.run_id)
        (answer,) = self._open([(found.envelope, place)])
        if isinstance(answer, bytes):
            opened: dict[str, Any] = json.loads(answer)
            return opened
        raise self._no_output(_why(answer))

    def require_document(self) -> None:
        """Raise if the run left none although all of its kind do that succeed."""
        if self.run.kind.leaves_document and self.run.state is RunState.SUCCEEDED:
            raise self._no_output(GONE)

    def _no_output(self, why: str) -> SyncwardError:
        self.problems.append(why)
        self._leave_event()
        return SyncwardError(
            f"run {self.run.run_id}: its output cannot be opened: {why}; "
            "docs/records.md says what may be the reason",
            code="unsealable",
        )

    def finish(self) -> None:
        """Raise, and leave an event, if anything was wrong with the log that was read."""
        if not self._at_end and not self.stopped_early and self._should_be_whole():
            self.missing += 1
        if not self.problems and not self.missing:
            return
        self._leave_event()
        parts = [f"{len(self.problems)} of its log lines cannot be opened"] if self.problems else []
        parts += [f"at least {self.missing} are missing"] if self.missing else []
        raise SyncwardError(
            f"run {self.run.run_id}: {', '.join(parts)}; who changed run_logs? "
            "docs/records.md says what may be the reason",
            code="unsealable",
        )

    def _should_be_whole(self) -> bool:
        """Say whether the log must have an end: the run succeeded, and not before logs had one."""
        if self.run.state is not RunState.SUCCEEDED or self.run.finished_at is None:
            return False
        if self._seen or self.problems:
            return True
        with self.cli.keystore.transaction() as keys:
            known = [root.created_at for root in roots(keys) if root.purpose == "records"]
        return bool(known) and self.run.finished_at >= min(known)

    def _open(
        self, items: Sequence[tuple[bytes | None, Place]]
    ) -> list[bytes | CryptoError | None]:
        """Open envelopes with one question for all their keys; None: there is no key."""
        assert self._keys is not None  # noqa: S101 - require_keys comes first
        ids = [_dek_id(envelope) for envelope, _ in items]
        with self.cli.keystore.transaction() as keys:
            stored = records_keys(keys, sorted({i for i in ids if i is not None}))
        answers: list[bytes | CryptoError | None] = []
        sealed: list[Sealed] = []
        for (envelope, place), dek_id in zip(items, ids, strict=True):
            key = stored.get(dek_id) if dek_id is not None else None
            if envelope is None or dek_id is None:
                answers.append(UnsealError())
            elif key is None:
                answers.append(None)
            else:
                answers.append(b"")  # filled below
                wrapped = Wrapped(key.root_id, key.wrapped)
                wrap = WrapContext(key.account_id, "records", key.dek_id)
                sealed.append(Sealed(wrapped, wrap, envelope, Context(*place)))
        opened = iter(open_records(self._keys, sealed))
        return [next(opened) if answer == b"" else answer for answer in answers]

    def _in_order(self, line: StoredLine, found: Unpacked) -> list[OpenedLine]:
        """Say if lines before this one are missing, or if it stands here a second time."""
        assert line.envelope is not None  # noqa: S101 - it was opened
        identity = (found.series, found.number)
        before = self._seen.get(identity)
        if before is not None:
            return [self._refused(line, TWICE)] if before == line.envelope else []
        self._seen[identity] = line.envelope
        reached = self._reached.get(found.series, 0)
        if found.number < reached:
            self.missing = max(0, self.missing - 1)  # it was counted as missing
            return [self._refused(line, OUT_OF_PLACE)]
        self.missing += max(0, found.number - reached - 1 - found.gap)
        self._reached[found.series] = found.number
        self._at_end = found.last
        return [OpenedLine(line, found.message)]

    def _refused(self, line: StoredLine, why: str) -> OpenedLine:
        self.problems.append(why)
        self._at_end = True  # more than that cannot be said
        return OpenedLine(line, None, why)

    def _leave_event(self) -> None:
        lost = all(why == NO_KEY for why in self.problems) and not self.missing
        event = AuditEvent(
            AuditAction.RECORD_REFUSED, TargetKind.RUN, self.run.run_id, self.cli.principal,
            account_id=self.run.account_id, outcome="error",
            reason="no_key" if lost else "unsealable", run_id=self.run.run_id,
            detail={"refused": len(self.problems), "missing": self.missing},
        )  # fmt: skip
        with self.cli.transaction() as tx:
            audit.append(tx, event)


def read_event(action: AuditAction, run: Run, principal: Principal) -> AuditEvent:
    """Make the event that says who reads a run's records."""
    return AuditEvent(
        action, TargetKind.RUN, run.run_id, principal,
        account_id=run.account_id, run_id=run.run_id,
    )  # fmt: skip


def opened_output(cli: Cli, run: Run, found: StoredOutput | None) -> dict[str, Any]:
    """Open a run's document, if it has one. The caller has committed the event of who reads it."""
    reader = Reader(cli, run)
    if found is None:
        reader.require_document()
        return {}
    reader.require_keys()
    return reader.document(found)


def _dek_id(envelope: bytes | None) -> UUID | None:
    try:
        return None if envelope is None else take_apart(envelope).dek_id
    except UnsealError:
        return None


def _why(answer: CryptoError | None) -> str:
    if answer is None:
        return NO_KEY
    return answer.public if isinstance(answer, UnknownRoot) else NOT_OURS
