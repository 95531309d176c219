"""A sealed log on a real database, for those who tamper with it, and its three verifiers."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import text

from audit import export
from audit.checkpoint import Checkpoint, anchor_line
from audit.exported import ExportEvidence
from audit.findings import Report
from audit.live import LiveEvidence, batch_of
from audit.sealer import Sealer
from audit.verify import Verifier
from crypto import signing
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from storage import audit, audit_log, sealing
from storage.engine import transaction
from tests.spare import auditor
from tests.world import Control

SAMPLE = Principal("operator", "anna")


@dataclass
class SealedLog:
    """A control database with events, the sealer's key, and anchors as files."""

    control: Control
    directory: Path
    signer: str = "signer.json"
    account: UUID = field(default_factory=uuid4)

    @property
    def key(self) -> Path:
        path = self.directory / "audit" / self.signer
        if not path.exists():
            signing.init(path)
        return path

    @property
    def pubkey(self) -> Path:
        path = self.directory / "audit.pub"
        if not path.exists():
            path.write_text(f"{signing.load(self.key).public[0].line}\n")
        return path

    def write(self, count: int, word: str = "tëst") -> None:
        """Write events in a transaction each."""
        for n in range(count):
            with transaction(self.control.engine("operator")) as tx:
                audit.append(tx, self.event(AuditAction.INSTANCE_READ, reason=f"{word} {n}"))

    def event(self, action: AuditAction, *, reason: str | None = None, **detail: Any) -> AuditEvent:
        return AuditEvent(
            action, TargetKind.INSTANCE, audit.INSTANCE_ID, SAMPLE,
            account_id=self.account, reason=reason, detail=detail,
        )  # fmt: skip

    def say(self, action: AuditAction, detail: dict[str, Any]) -> None:
        """Insert an event past our own code, as whoever holds a login may."""
        body = {"detail": detail, "outcome": "success", "principal": "sealer:s", "v": 1}
        with transaction(self.control.engine("sealer")) as tx:
            tx.execute(
                text(
                    "INSERT INTO audit.event (class, action, target_kind, target_id, body) "
                    "VALUES ('A', :action, 'instance', :target, :body)"
                ),
                {
                    "action": action.value,
                    "target": audit.INSTANCE_ID,
                    "body": json.dumps(body, sort_keys=True, separators=(",", ":")),
                },
            )

    def seal(self) -> int:
        """Seal all that is final; return the size of the log."""
        engine = self.control.engine("sealer")
        sealer = Sealer(engine, signing.load(self.key), self.key, Principal("sealer", "s"), "s")
        while sealer.step() is not None:
            pass
        sealer.close()
        with transaction(engine) as tx:
            return sealing.state(tx).size

    def grow(self, *counts: int) -> list[int]:
        """Write and seal so many events each; return the sizes."""
        sizes = []
        for count in counts:
            self.write(count)
            sizes.append(self.seal())
        return sizes

    def anchor(self, name: str = "a.anchor") -> Path:
        """Write all checkpoints as an anchor would hold them."""
        path = self.directory / name
        with transaction(self.control.engine("auditor")) as tx:
            log_id = sealing.state(tx).log_id
            rows = audit_log.batches(tx, after=0, most=10_000)
        notes = [batch_of(log_id, row) for row in rows]
        lines = [anchor_line(signing.note(n.text, n.signatures)) for n in notes]
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    def seq(self, index: int) -> Any:
        return self.control.one(
            "SELECT seqs[CAST(:i AS bigint) - (size - cardinality(seqs)) + 1] "
            "FROM audit.checkpoint WHERE size > :i ORDER BY size LIMIT 1", i=index,
        )  # fmt: skip

    def tamper(self, *statements: str, **parameters: object) -> None:
        """Change the log as its owner could: triggers off, and on again."""
        tables = ["audit.checkpoint", "audit.epoch", *(
            row[0] for row in self.control.all(
                "SELECT inhrelid::regclass::text FROM pg_inherits "
                "WHERE inhparent = 'audit.event'::regclass"))]  # fmt: skip
        for table in tables:
            for trigger in ("no_change", "no_truncate"):
                self.control.act(f"ALTER TABLE {table} DISABLE TRIGGER {trigger}")
        self.control.act("ALTER TABLE audit.event DISABLE TRIGGER stamp")
        for statement in statements:
            used = {k: v for k, v in parameters.items() if f":{k}" in statement}
            self.control.act(statement, **used)
        for table in tables:
            for trigger in ("no_change", "no_truncate"):
                self.control.act(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger}")
        self.control.act("ALTER TABLE audit.event ENABLE ALWAYS TRIGGER stamp")

    def keys(self, pubkey: Path | None = None) -> list[signing.PublicKey]:
        return signing.read_public(pubkey or self.pubkey)

    def live(self, *anchors: Path, pubkey: Path | None = None, start: int = 0) -> Report:
        with audit_log.snapshot(self.control.engine("auditor")) as tx:
            return Verifier(LiveEvidence(tx), self.keys(pubkey), anchors=anchors, start=start).run()

    def export(self, name: str = "export", first: int = 0, end: int | None = None) -> Path:
        path = self.directory / name
        with (
            export.directory(path) as partial,
            audit_log.snapshot(self.control.engine("auditor")) as tx,
        ):
            export.write(tx, partial, first=first, end=end)
        return path

    def offline(
        self, exported: Path, *anchors: Path, pubkey: Path | None = None, start: int = 0
    ) -> Report:
        with ExportEvidence.open(exported) as evidence:
            return Verifier(evidence, self.keys(pubkey), anchors=anchors, start=start).run()

    def standalone(
        self, exported: Path, *anchors: Path, pubkey: Path | None = None,
        script: Path | None = None, proof: Path | None = None,
    ) -> tuple[int, str]:  # fmt: skip
        """Run the script as an auditor would, with nothing of ours on the path."""
        words = [a for anchor in anchors for a in ("--anchor", str(anchor))]
        words += ["--proof", str(proof)] if proof else []
        ended = auditor().run(
            script or exported / "verify.py", "--pubkey", pubkey or self.pubkey, *words,
            *([exported] if script else []), directory=self.directory,
        )  # fmt: skip
        assert ended.stderr == ""
        return ended.returncode, ended.stdout

    def checkpoint(self, size: int) -> Checkpoint:
        with transaction(self.control.engine("auditor")) as tx:
            row = audit_log.batch_at(tx, size - 1)
            assert row is not None
            return Checkpoint.parse(batch_of(sealing.state(tx).log_id, row).text)
