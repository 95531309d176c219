"""Prove one event: a document that needs neither the log nor us, only the public key."""

import json
from binascii import Error as NoBase64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from audit.checkpoint import Checkpoint
from audit.evidence import BODY
from audit.export import event_line
from audit.exported import FIELDS
from audit.findings import Level, Report
from audit.leaf import leaf
from audit.live import LiveEvidence
from audit.tree import ProofError, inclusion_proof, root_from_proof
from crypto.signing import PublicKey, note, parse_note, signed_by
from schemas.errors import NotFound, SyncwardError
from storage import audit_log

FORMAT = "syncward-audit-proof/1"


def prove(tx: Connection, index: int) -> dict[str, Any]:
    """Return the proof that the newest checkpoint covers the event at this index."""
    evidence = LiveEvidence(tx)
    facts = evidence.facts()
    batch, newest = audit_log.batch_at(tx, index), evidence.batch(facts.largest)
    if batch is None or newest is None:
        raise NotFound(f"audit: no event at index {index} is sealed; {facts.largest} are sealed")
    row = next((r for r in audit_log.rows(tx, [batch]) if r[0] == index), None)
    if row is None or row[BODY] is None:
        raise NotFound(
            f"audit: the event at index {index} is not here: pruned (an export proves it), or run: "
            "syncward audit verify"
        )

    def fetch(level: int, n: int) -> bytes:
        return evidence.tiles(level, n, n)[n]

    try:
        path = inclusion_proof(index, facts.largest, fetch)
    except (KeyError, ProofError):
        raise SyncwardError(
            "audit: tiles are missing, nothing can be proven; run: syncward audit verify"
        ) from None
    return {
        "format": FORMAT,
        "event": event_line(row),
        "index": index,
        "size": facts.largest,
        "path": [hash_.hex() for hash_ in path],
        "note": note(newest.text, newest.signatures),
    }


def find(tx: Connection, event: str) -> int:
    """Return the index that an index or the hash of an event names."""
    if event.isdecimal():
        return int(event)
    try:
        index = audit_log.index_of_leaf(tx, bytes.fromhex(event))
    except ValueError:
        raise NotFound(
            "audit: name an event by its index or by the 64 digits of its hash"
        ) from None
    if index is None:
        raise NotFound("audit: no sealed event has this hash; one that is young may be sealed soon")
    return index


def check(path: Path, keys: Sequence[PublicKey]) -> Report:
    """Verify a proof's document with nothing but keys."""
    report = Report()
    try:
        said = json.loads(path.read_bytes())
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            raise ValueError(said)  # noqa: TRY301 - caught below
    except (OSError, ValueError, RecursionError):
        report.add(Level.UNVERIFIABLE, f"{path.name} is no proof of the format {FORMAT}")
        return report
    try:
        _check(said, keys, report)
    except (ValueError, KeyError, TypeError, AttributeError, ProofError, NoBase64):
        report.add(Level.TAMPERED, "the proof is not whole")
    return report


def _check(said: dict[str, Any], keys: Sequence[PublicKey], report: Report) -> None:
    event, index = said["event"], said["index"]
    if type(index) is not int or event.keys() != set(FIELDS):
        raise ValueError(index)
    text, signatures = parse_note(said["note"])
    point = Checkpoint.parse(text)
    made = leaf(
        event["at"], event["account_id"] or "", event["class"], event["action"],
        event["target_kind"], event["target_id"], event["login"], event["client"], event["body"],
    )  # fmt: skip
    path = [bytes.fromhex(hash_) for hash_ in said["path"]]
    report.log_id, report.size, report.events = point.log_id, point.size, 1
    if said["size"] != point.size or event["index"] != index or event["leaf"] != made.hex():
        report.add(Level.TAMPERED, "the proof contradicts itself", index)
    elif root_from_proof(made, index, point.size, path) != point.root:
        report.add(Level.TAMPERED, "the event is not what was sealed", index)
    try:
        signers = signed_by(text, signatures, keys)
    except ValueError:
        report.add(Level.TAMPERED, "the checkpoint is not what its key signed", index)
        return
    report.checkpoints = len(signers[:1])
    report.keys = [key.line for key in signers]
    if not signers:
        report.add(
            Level.UNVERIFIABLE,
            "the checkpoint is signed by a key that is not trusted here; give its public key",
        )
