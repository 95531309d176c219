"""Exports and proofs that somebody forged: both verifiers say the same, and neither pays for it.

Whoever forges an export writes its sums anew. `audit verify` and the script that ships with exports
share no code, so they must agree on each forgery: what one takes and the other does not would be
believed by somebody.
"""

import json
import os
import resource
import socket
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from audit import exported, proof, sealer, statement
from audit.checkpoint import Checkpoint
from audit.findings import Level
from crypto import signing
from schemas.audit import AuditAction
from storage import audit_log
from tests.sealed_log import SealedLog

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "audit" / "standalone" / "verify.py"
EVENTS = "events/000000000000.jsonl"


@pytest.fixture
def log(control, tmp_path):
    made = SealedLog(control, tmp_path)
    made.grow(10, 10, 10)
    return made


def sums(directory: Path) -> None:
    """Write SHA256SUMS anew, as a forger would."""
    files = [p for p in directory.rglob("*") if p.is_file() and not p.is_symlink()]
    lines = (
        f"{sha256(p.read_bytes()).hexdigest()}  {p.relative_to(directory)}\n"
        for p in sorted(files)
        if p.name != "SHA256SUMS" and p.parent.name != "__pycache__"
    )
    (directory / "SHA256SUMS").write_text("".join(lines))


def both(log, directory, *anchors, pubkey=None):
    """Return what both say of an export, which must be the same."""
    report = log.offline(directory, *anchors, pubkey=pubkey)
    code, said = log.standalone(directory, *anchors, script=SCRIPT, pubkey=pubkey)
    assert code == report.exit_code, (report.lines, said)
    return code, report.lines, said


# ── forgeries ─────────────────────────────────────────────────────────────────────────────────


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def act(directory: Path) -> None:
        path = directory / name
        before = path.read_text()
        path.write_text(change(before))
        assert path.read_text() != before

    return act


def line(name: str, number: int, change: Callable[[str], str]) -> Callable[[Path], None]:
    """Change one line of a file."""

    def act(text: str) -> str:
        lines = text.splitlines(keepends=True)
        lines[number] = change(lines[number])
        return "".join(lines)

    return edit(name, act)


def field(name: str, number: int, key: str, value: object) -> Callable[[Path], None]:
    """Put another value into one line."""
    return line(
        name, number, lambda text: json.dumps({**json.loads(text), key: value}) + "\n"
    )  # fmt: skip


def word(name: str, number: int, key: str, raw: str) -> Callable[[Path], None]:
    """Put something that `json` would not write into one line."""

    def act(text: str) -> str:
        said = json.loads(text)
        return text.replace(f'"{key}": {json.dumps(said[key])}', f'"{key}": {raw}')

    return line(name, number, act)


def cut(events: int | None = None, points: int | None = None, hashes: int | None = None):
    def act(directory: Path) -> None:
        for name, count in ((EVENTS, events), ("checkpoints.jsonl", points)):
            if count is not None:
                kept = (directory / name).read_text().splitlines(keepends=True)[:count]
                (directory / name).write_text("".join(kept))
        if hashes is not None:
            (directory / "hashes").write_bytes((directory / "hashes").read_bytes()[:hashes])

    return act


def add(name: str, content: bytes = b"{}\n") -> Callable[[Path], None]:
    def act(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        with (directory / name).open("ab") as file:
            file.write(content)

    return act


def foreign(directory: Path) -> None:
    """Say in the middle that a checkpoint is of another log."""
    log_id = json.loads((directory / "log.json").read_text())["log_id"]
    other = "00000000" + log_id[8:]
    line("checkpoints.jsonl", 1, lambda text: text.replace(log_id, other))(directory)


def claim(size: int) -> Callable[[Path], None]:
    """Claim very many events in log.json and in the last checkpoint."""

    def act(directory: Path) -> None:
        for key in ("size", "checkpoint_size", "log_size"):
            field("log.json", 0, key, size)(directory)
        line("checkpoints.jsonl", 2, lambda text: text.replace("\\n31\\n", f"\\n{size}\\n"))(
            directory
        )

    return act


def twice(text: str) -> str:
    return text.replace('{"index": ', '{"index": 0, "index": ', 1)


def swapped(text: str) -> str:
    lines = text.splitlines(keepends=True)
    lines[4], lines[5] = lines[5], lines[4]
    return "".join(lines)


SEALED = {
    "index": [("-1", 10), ("Infinity", 10), ("NaN", 10), ("3.0", 10), ("true", 10), ("null", 10),
              ('"3"', 10), ("1" * 30, 10), ("1" * 5000, 10), ("1e400", 10), ("03", 10),
              ("99", 10), ("2", 10), ("[3]", 10)],
    "seq": [('"x"', 10), ("true", 10), ("1.0", 10), ("-1", 10), ("1" * 30, 10), ("null", 10)],
    "xid": [('"1"', 10), ("false", 10), ("1e3", 10)],
    "leaf": [("null", 10), ('"00"', 10), ('""', 10), ("0", 10)],
    "body": [("null", 10), ("{}", 10), ('"' + "x" * 70_000 + '"', 10)],
    "at": [("null", 10), ("1", 10)],
    "account_id": [("null", 10), ('""', 10), ("0", 10)],
}  # fmt: skip
SAID = {
    "first": [("true", 12), ("false", 12), ("0.0", 12), ("-1", 12), ("31", 12), ("1", 12),
              ('"0"', 12), ("1" * 30, 12), ("1" * 5000, 12), ("NaN", 12)],
    "size": [("31.0", 12), ('"31"', 12), ("null", 12), ("0", 12), ("32", 12), ("1" * 30, 12),
             ("21", 10), ("Infinity", 12)],
    "checkpoint_size": [("true", 12), ("30", 12), ("31.0", 12), ("41", 10)],
    "log_size": [("31.0", 12), ("true", 12), ("30", 10), ("41", 10), ("-31", 12)],
    "log_id": [("null", 12), ("7", 12), ('"x"', 12), ('"' + "0" * 32 + '"', 12),
               ('"00000000-0000-0000-0000-000000000000"', 10)],
    "exported_at": [('"2026-11-28T04:30:00.000000"', 12), ('"2026-11-28T04:30:00+00:00"', 12),
                    ("0", 12), ('"2026-13-28T04:30:00.000000Z"', 12),
                    ('"9999-12-31T23:59:59.999999Z"', 11), ('"0001-01-01T00:00:00.000000Z"', 0),
                    ('"２026-11-28T04:30:00.000000Z"', 12)],
    "frontier": [("null", 12), ("{}", 12), ('["' + "0" * 64 + '"]', 12), ('""', 12), ("[0]", 12)],
    "software": [("null", 12), ("7", 12)],
    "format": [('"syncward-audit-export/2"', 12), ("null", 12), ("{}", 12)],
}  # fmt: skip
POINTS = {
    "count": [("true", 10), ("10.0", 10), ("9", 10), ("0", 10), ("-10", 10), ('"10"', 10)],
    "last_seq": [('"x"', 10), ("true", 10), ("null", 10)],
    "last_xid": [("1.5", 10), ("1" * 30, 10)],
    "text": [("null", 10), ('""', 10), ("[]", 10)],
    "signatures": [("null", 10), ('"x"', 10), ("[]", 10)],
}  # fmt: skip

#: Name -> (what is done to an export, what both must say).
FORGERIES: dict[str, tuple[Callable[[Path], None], int]] = {
    "the range cut short": (cut(events=21, points=2, hashes=21 * 32), 11),
    "hashes cut": (cut(hashes=25 * 32), 11),
    "hashes cut within a hash": (cut(hashes=25 * 32 + 7), 11),
    "no hashes": (cut(hashes=0), 12),
    "events cut": (cut(events=21), 11),
    "no events": (cut(events=0), 11),
    "checkpoints cut": (cut(points=2), 10),
    "no checkpoints": (cut(points=0), 10),
    "hashes that go on": (add("hashes", bytes(32)), 10),
    "hashes that go on by a byte": (add("hashes", b"\n"), 10),
    "an extra event, -1": (add(EVENTS, b'{"index": -1, "missing": true}\n'), 10),
    "an extra event, behind": (add(EVENTS, b'{"index": 31, "missing": true}\n'), 10),
    "an extra event, twice": (add(EVENTS, b'{"index": 30, "missing": true}\n'), 10),
    "an event before the first file": (
        add("events/000000000001.jsonl", b'{"index": 5, "missing": true}\n'), 10),
    "an event said to be missing": (line(EVENTS, 15, lambda _: '{"index": 15, "missing": true}\n'), 10),
    "missing is 1": (line(EVENTS, 15, lambda _: '{"index": 15, "missing": 1}\n'), 10),
    "missing and more": (line(EVENTS, 15, lambda _: '{"index": 15, "missing": true, "x": 0}\n'), 10),
    "events out of order": (edit(EVENTS, swapped), 10),
    "a key more": (field(EVENTS, 15, "more", 1), 10),
    "a key less": (line(EVENTS, 15, lambda t: t.replace('"class": "B", ', "").replace('"class": "A", ', "")), 10),
    "a key twice": (line(EVENTS, 15, twice), 10),
    "a key twice in a missing event": (line(EVENTS, 15, lambda _: '{"index": 15, "missing": false, "missing": true}\n'), 10),
    "another order of keys": (line(EVENTS, 15, lambda t: json.dumps(dict(sorted(json.loads(t).items()))) + "\n"), 10),
    "spaces": (line(EVENTS, 15, lambda t: t.replace(": ", ":", 1)), 10),
    "an empty line": (line(EVENTS, 15, lambda t: f"\n{t}"), 10),
    "no newline at the end": (line(EVENTS, 30, lambda t: t.rstrip()), 10),
    "UTF-8": (line(EVENTS, 15, lambda t: t.replace("\\u00eb", "ë")), 10),
    "a mark before UTF-8": (edit(EVENTS, lambda t: f"\ufeff{t}"), 10),
    "nested deep": (add(EVENTS, b"[" * 200_000 + b"\n"), 10),
    "a line of 2 MiB": (add(EVENTS, b" " * (2 << 20) + b"\n"), 10),
    "a field moved": (line(EVENTS, 15, lambda t: t.replace("success", "refused")), 10),
    "an upper case leaf": (line(EVENTS, 15, lambda t: t[:-70] + t[-70:].upper()), 10),
    "log.json: a key more": (field("log.json", 0, "more", 1), 12),
    "log.json: a key twice": (edit("log.json", lambda t: t.replace('"first": 0', '"first": 9, "first": 0')), 12),
    "log.json: two lines": (edit("log.json", lambda t: t + t), 12),
    "log.json: a list": (edit("log.json", lambda _: "[]\n"), 12),
    "log.json: nested deep": (edit("log.json", lambda _: "[" * 200_000), 12),
    "log.json: empty": (edit("log.json", lambda _: ""), 12),
    "log.json: 2 MiB": (edit("log.json", lambda t: t.replace('"software": "', '"software": "' + "x" * (2 << 20))), 12),
    "a checkpoint of another log": (foreign, 10),
    "a checkpoint twice": (line("checkpoints.jsonl", 1, lambda t: t + t), 10),
    "a checkpoint of nothing": (line("checkpoints.jsonl", 0, lambda t: t.replace("\\n11\\n", "\\n0\\n") + t), 10),
    "a checkpoint is missing": (line("checkpoints.jsonl", 1, lambda _: ""), 10),
    "a checkpoint: full-width digits": (line("checkpoints.jsonl", 1, lambda t: t.replace("\\n21\\n", "\\n２１\\n")), 10),
    "a checkpoint: escaped digits": (line("checkpoints.jsonl", 1, lambda t: t.replace("\\n21\\n", "\\n\\uff12\\uff11\\n")), 10),
    "a checkpoint: a key more": (field("checkpoints.jsonl", 1, "more", 1), 10),
    "a checkpoint: a line of 2 MiB": (add("checkpoints.jsonl", b"x" * (2 << 20)), 10),
    "an epoch: a float": (word("epochs.jsonl", 0, "epoch", "1.0"), 10),
    "an epoch: true": (word("epochs.jsonl", 0, "epoch", "true"), 10),
    "an epoch: a key more": (field("epochs.jsonl", 0, "more", 1), 10),
    "an epoch more": (add("epochs.jsonl", b'{"epoch": 2, "size": 12, "reason": "x", "lost_size": null, "lost_root": null}\n'), 10),
    "no epochs": (edit("epochs.jsonl", lambda _: ""), 10),
    "very many epochs": (edit("epochs.jsonl", lambda t: t * 2000), 10),
    "10^15 events": (claim(10**15), 10),
    "10^17 events in log.json": (lambda d: [field("log.json", 0, k, 10**17)(d) for k in ("size", "checkpoint_size", "log_size")], 11),
    "a file like a cache": (add("events/9__pycache__.jsonl"), 10),
    "a file below another directory": (add("more/x"), 10),
    "a file of full-width digits": (add("events/００００００００００３１.jsonl", b'{"index": 31, "missing": true}\n'), 10),
    "a file of a short name": (add("events/1.jsonl"), 10),
    "another file": (add("notes.txt"), 10),
    "a cache of Python": (add("__pycache__/verify.cpython-311.pyc", b"x"), 0),
    "a name that is none": (add("names.jsonl", b'{"id": "x", "kind": "operator", "name": "anna", "salt": "' + b"0" * 64 + b'"}\n'), 10),
    "a line of names that is none": (add("names.jsonl"), 10),
    "half a character in a name": (add("names.jsonl", b'{"id": "x", "kind": "o", "name": "\\ud800", "salt": "' + b"0" * 64 + b'"}\n'), 10),
    **{f"{key} of an event: {raw[:20]}": (word(EVENTS, 15, key, raw), code)
       for key, cases in SEALED.items() for raw, code in cases},
    **{f"{key} of log.json: {raw[:20]}": (word("log.json", 0, key, raw), code)
       for key, cases in SAID.items() for raw, code in cases},
    **{f"{key} of a checkpoint: {raw[:20]}": (word("checkpoints.jsonl", 1, key, raw), code)
       for key, cases in POINTS.items() for raw, code in cases},
}  # fmt: skip


def test_both_say_the_same_of_every_forgery(log):
    """One log for all of them; each is told apart by its name."""
    original = log.export()
    wrong = []
    for number, (name, (act, expected)) in enumerate(FORGERIES.items()):
        forged = log.directory / f"forged-{number}"
        subprocess.run(["cp", "-r", original, forged], check=True)
        act(forged)
        sums(forged)
        report = log.offline(forged)
        code, said = log.standalone(forged, script=SCRIPT)
        if (report.exit_code, code) != (expected, expected):
            wrong.append((name, expected, report.exit_code, code, report.lines[:2], said[:300]))
    assert not wrong, "\n".join(map(str, wrong))
