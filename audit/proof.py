"""Prove one event: a document that needs neither the log nor us, only the public key."""

import re
from collections.abc import Sequence
from os.path import realpath
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from audit.checkpoint import Checkpoint
from audit.evidence import BODY, EvidenceCut
from audit.export import event_line
from audit.exported import (
    HASHED,
    HASHES,
    INT,
    LONGEST_LINE,
    STRING,
    TEXTS,
    form,
    plain,
    read,
)
from audit.findings import Level, Report
from audit.leaf import leaf
from audit.live import LiveEvidence
from audit.tree import ProofError, inclusion_proof, root_from_proof
from crypto.signing import PublicKey, note, parse_note, signed_by
from schemas.errors import NotFound, SyncwardError
from storage import audit_log

FORMAT = "syncward-audit-proof/1"
_BEGINS = f'{{"format": "{FORMAT}", '.encode()
_PROOF = form(
    format=f'"{FORMAT}"', event=form(**TEXTS).pattern.removesuffix("\n"), index=INT, size=INT,
    path=HASHES, note=STRING,
)  # fmt: skip
_INDEX = re.compile("[0-9]{1,18}")


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
    line = event_line(row)
    return {
        "format": FORMAT,
        "event": {name: line[name] for name in HASHED},  # what the leaf covers, and nothing else
        "index": index,
        "size": facts.largest,
        "path": [hash_.hex() for hash_ in path],
        "note": note(newest.text, newest.signatures),
    }


def find(event: str) -> int:
    """Return the index that a word names."""
    if _INDEX.fullmatch(event) is None:
        raise NotFound(
            "audit: no such event; name one by its index, a number (syncward audit tail)"
        )
    return int(event)


def check(path: Path, keys: Sequence[PublicKey]) -> Report:
    """Verify a proof's document with nothing but keys."""
    report = Report()
    try:
        with plain(Path(realpath(path))) as file:
            raw = file.read(LONGEST_LINE)
    except EvidenceCut as error:
        report.add(Level.UNVERIFIABLE, str(error))
        return report
    if not raw.startswith(_BEGINS):
        report.add(Level.UNVERIFIABLE, f"{path.name} is no proof of the format {FORMAT}")
        return report
    said = read(raw, _PROOF)
    if said is None:
        report.add(Level.TAMPERED, "the proof is not as `audit prove` writes it")
        return report
    try:
        _check(said, keys, report)
    except (ValueError, ProofError):
        report.add(Level.TAMPERED, "the proof is not whole")
    return report


def _check(said: dict[str, Any], keys: Sequence[PublicKey], report: Report) -> None:
    event, index = said["event"], said["index"]
    text, signatures = parse_note(said["note"])
    point = Checkpoint.parse(text)
    made = leaf(
        event["at"], event["account_id"] or "", event["class"], event["action"],
        event["target_kind"], event["target_id"], event["login"], event["client"], event["body"],
    )  # fmt: skip
    path = [bytes.fromhex(hash_) for hash_ in said["path"]]
    report.log_id, report.size, report.events = point.log_id, point.size, 1
    if said["size"] != point.size:
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
