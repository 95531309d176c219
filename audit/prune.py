"""Drop old months of the log with proof. `check_export` and `step` are where to start.

Two people decide, each by an event of their own; the sealer carries it out. It believes sealed
events only, whatever the table of requests says: first it seals a signed record of what goes, then,
once anchors hold that record, the database drops the months. Killed anywhere, it goes on there.
"""

import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine

from audit import statement
from audit.leaf import leaf
from crypto.signing import PublicKey, Signer
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError, SyncwardError
from storage import audit, audit_tail, prune, seal_watch, sealing
from storage.audit_tail import Filters, StoredEvent
from storage.engine import transaction
from storage.prune import Plan, Request

logger = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
_SUM = re.compile(r"([0-9a-f]{64})  ([a-z0-9_][a-zA-Z0-9_./-]*)")
_FIELDS = ("at", "account_id", "class", "action", "target_kind", "target_id", "login", "client",
           "body")  # fmt: skip
_HASHES = 256  # of a tile
_HASH = 32


class PruneRefused(SyncwardError):  # noqa: N818 - reads best where it is raised
    """What is asked for would lose something, or nobody may have it."""

    code = "audit_prune_refused"


# ── the export that a request names ──────────────────────────────────────────────────────────────


def check_export(tx: Connection, directory: Path, before: datetime, wanted: Plan) -> str:
    """Return the SHA-256 of an export's SHA256SUMS; PruneRefused unless it holds what would go.

    Every event that would go must stand in it, at its index, with the bytes that were sealed: the
    hash of each is made again from its line and compared with the table and with the tile.
    """
    digest = _sums(directory)
    state = sealing.state(tx)
    if _json(directory / "log.json").get("log_id") != str(state.log_id):
        raise PruneRefused(f"audit: {directory} is an export of another log")
    lines = _lines(directory)
    line: dict[str, Any] = {"index": -1}
    for event in _leaving(tx, before, wanted):
        while int(line["index"]) < (event.index or 0):
            line = next(lines, {"index": 2**63})
        if line["index"] != event.index or _hash(line) != event.leaf:
            raise PruneRefused(
                f"audit: {directory} does not hold the event at index {event.index} as it was "
                "sealed; export again: syncward audit export DIR"
            )
    return digest


def _leaving(tx: Connection, before: datetime, wanted: Plan) -> Iterator[StoredEvent]:
    """Yield what would go, by index; PruneRefused if an event is not what was sealed."""
    last = max([wanted.first_kept - 1, *wanted.also])
    begin, more, tile = 0, True, (-1, b"")
    while more and begin <= last:
        page = audit_tail.following(tx, Filters(until=before), begin=begin, limit=10_000)
        begin, more = page.end, page.more
        for event in page.events:
            index = event.index or 0
            if tile[0] != index // _HASHES:
                try:
                    tile = (index // _HASHES, sealing.tile(tx, 0, index // _HASHES))
                except KeyError:
                    tile = (index // _HASHES, b"")
            at = index % _HASHES * _HASH
            if tile[1][at : at + _HASH] != event.leaf:
                raise PruneRefused(
                    f"audit: the event at index {index} is not what was sealed; nothing is pruned. "
                    "Run: syncward audit verify"
                )
            yield event


def _sums(directory: Path) -> str:
    """Return the SHA-256 of SHA256SUMS, whose files are all there and as it says."""
    try:
        said = (directory / SUMS).read_bytes()
        for text in said.decode().splitlines():
            match = _SUM.fullmatch(text)
            if match is None or ".." in match[2]:
                raise PruneRefused(f"audit: {directory / SUMS} has a line that is none")
            with (directory / match[2]).open("rb") as file:
                digest = sha256()
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            if digest.hexdigest() != match[1]:
                raise PruneRefused(f"audit: {directory / match[2]} is not what was exported")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise PruneRefused(
            f"audit: {directory} is no complete export ({reason}); make one: syncward audit export"
        ) from None
    named = {text[66:] for text in said.decode().splitlines()}
    there = {str(path.relative_to(directory)) for path in directory.glob("events/*.jsonl")}
    if not {"log.json", *there} <= named:
        raise PruneRefused(f"audit: {directory / SUMS} does not name every file of the export")
    return sha256(said).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise PruneRefused(f"audit: {path} cannot be read") from None
    return said if isinstance(said, dict) else {}


def _lines(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of an export; what is no event has no index."""
    for path in sorted(directory.glob("events/*.jsonl")):
        with path.open("rb") as file:
            for text in file:
                try:
                    said = json.loads(text)
                except (ValueError, RecursionError):
                    said = None
                if isinstance(said, dict) and isinstance(said.get("index"), int):
                    yield said


def _hash(line: dict[str, Any]) -> bytes:
    return leaf(*(str(line.get(field) or "") for field in _FIELDS))


# ── the sealer's part ────────────────────────────────────────────────────────────────────────────


def step(engine: Engine, signer: Signer, principal: Principal) -> bool:
    """Go one step with an approved request; return whether there was one to go.

    PruneRefused if its events do not say what the request says: somebody forged it.
    """
    with transaction(engine) as tx:
        asked = prune.to_carry_out(tx)
        if asked is None:
            return False
        if asked.state == "approved":
            return _record(tx, asked, signer, principal)
        return _carry_out(tx, asked, signer, principal)


def _record(tx: Connection, asked: Request, signer: Signer, principal: Principal) -> bool:
    """Write the record, once request and approval are sealed and say what the row says."""
    sealed = _authorised(tx, asked)
    if not sealed:
        return False
    wanted = prune.plan(tx, asked.before)
    if wanted is None or wanted.unsealed or wanted != Plan(asked.first_kept, asked.also, False):  # noqa: FBT003 - the last field
        raise PruneRefused(
            f"audit: prune {asked.id} would not drop what was asked for; nothing is dropped. "
            "Ask again: syncward audit prune --before DATE --export DIR"
        )
    newest = sealing.newest_checkpoint(tx)
    assert newest is not None  # noqa: S101 - the request is sealed
    detail = statement.signed(
        signer,
        sealing.state(tx).log_id,
        AuditAction.AUDIT_PRUNED,
        {
            "request": str(asked.id),
            "before": f"{asked.before.astimezone(UTC):%Y-%m-%d}",
            "first_kept": asked.first_kept,
            "also": ",".join(map(str, asked.also)),
            "size": newest.size,
            "root": newest.root.hex(),
            "sha256": asked.sha256,
            "partitions": ", ".join(prune.months(tx, asked.before)),
            "approved_by": asked.approved_by,
            "requested_by": asked.requested_by,
        },
    )
    audit.append(tx, _event(AuditAction.AUDIT_PRUNED, principal, detail))
    prune.record(tx, asked.id)
    return True


def _authorised(tx: Connection, asked: Request) -> bool:
    """Say whether two sealed events ask and approve; PruneRefused if they never will."""
    request = _said(tx, asked.request_at, asked.request_seq, AuditAction.AUDIT_PRUNE_REQUESTED)
    approval = _said(tx, asked.approval_at, asked.approval_seq, AuditAction.AUDIT_PRUNE_APPROVED)
    if request is None or approval is None:
        raise PruneRefused(_forged(asked, "no event says so"))
    told, agreed = (audit_tail.said(event.body) for event in (request, approval))
    if (
        told.get("detail")
        != {
            "request": str(asked.id),
            "before": f"{asked.before.astimezone(UTC):%Y-%m-%d}",
            "first_kept": asked.first_kept,
            "also": len(asked.also),
            "sha256": asked.sha256,
        }
        or agreed.get("detail") != {"request": str(asked.id)}
        or [told.get("outcome"), agreed.get("outcome")] != ["success", "success"]
    ):
        raise PruneRefused(_forged(asked, "its events say something else"))
    if prune.is_withdrawn(tx, asked):
        raise PruneRefused(_forged(asked, "an event takes it back"))
    if request.login == approval.login:
        raise PruneRefused(_forged(asked, f"{request.login} asked and approved"))
    if [request.login, approval.login] != [asked.requested_by, asked.approved_by]:
        raise PruneRefused(_forged(asked, "its events are of other logins"))
    sealed = [event for event in (request, approval) if event.index is not None]
    for event in sealed:
        index = event.index or 0
        at = index % _HASHES * _HASH
        kept = sealing.tile(tx, 0, index // _HASHES)[at : at + _HASH]
        if not kept == event.leaf == _leaf_of(event):
            raise PruneRefused(_forged(asked, f"the event at index {index} was changed"))
    return len(sealed) == 2  # noqa: PLR2004 - both


def _forged(asked: Request, why: str) -> str:
    return (
        f"audit: prune {asked.id} is not carried out: {why}. Somebody changed the database past "
        "its rules; run: syncward audit verify"
    )


def _leaf_of(event: StoredEvent) -> bytes:
    at = f"{event.at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"
    account = str(event.account_id or "")
    return leaf(at, account, event.class_, event.action, event.target_kind, str(event.target_id),
                event.login, event.client, event.body)  # fmt: skip


def _said(
    tx: Connection, at: datetime | None, seq: int | None, action: AuditAction
) -> StoredEvent | None:
    found = audit_tail.one(tx, at, seq) if at is not None and seq is not None else None
    return found if found is not None and found.action == action else None


def _carry_out(tx: Connection, asked: Request, signer: Signer, principal: Principal) -> bool:
    """Drop the months, once the record is sealed and anchors hold it."""
    state = sealing.state(tx)
    told = _said(tx, asked.record_at, asked.record_seq, AuditAction.AUDIT_PRUNED)
    detail = audit_tail.said(told.body).get("detail") if told else None
    if (
        told is None
        or not isinstance(detail, dict)
        or detail.get("request") != str(asked.id)
        or not statement.is_signed(
            state.log_id, AuditAction.AUDIT_PRUNED, detail, _ours(tx, signer)
        )
    ):
        raise PruneRefused(
            _forged(asked, "its record is not ours")
            + f"; nothing was dropped, take it back: syncward audit prune --withdraw {asked.id}"
        )
    if not statement.is_signed(state.log_id, AuditAction.AUDIT_PRUNED, detail, signer.public):
        return _record(tx, asked, signer, principal)  # the key that signed it was retired since
    if told.index is None or told.index >= state.published_size:
        return False
    if not _authorised(tx, asked):
        return False
    dropped = prune.carry_out(tx, asked.id)
    gone: statement.Detail = {"partitions": ", ".join(dropped)}
    audit.append(tx, _event(AuditAction.PARTITIONS_DROPPED, principal, gone))
    logger.warning("audit_pruned", extra={"request": str(asked.id), "partitions": dropped})
    return True


def _ours(tx: Connection, signer: Signer) -> list[PublicKey]:
    """Return the keys that sign, and those that they replaced, as the last month's events say."""
    log_id, keys = sealing.state(tx).log_id, list(signer.public)
    for said in reversed(seal_watch.rotations(tx)):
        if said.detail.get("after") in {key.line for key in keys} and statement.is_signed(
            log_id, AuditAction.SIGNER_ROTATED, said.detail, keys
        ):
            keys.append(PublicKey.parse(str(said.detail.get("before"))))
    return keys


def _event(action: AuditAction, principal: Principal, detail: statement.Detail) -> AuditEvent:
    return AuditEvent(
        action, TargetKind.INSTANCE, audit.INSTANCE_ID, principal, detail=dict(detail)
    )


# ── what operators ask for ───────────────────────────────────────────────────────────────────────


def month(wanted: str) -> datetime:
    """Return the first moment of a month, given as its first day."""
    try:
        found = datetime.strptime(wanted, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise ConfigError(f"--before {wanted}: not a date like 2026-01-01") from None
    if found.day != 1:
        raise ConfigError(f"--before {wanted}: whole months only; give the first day of one")
    return found
