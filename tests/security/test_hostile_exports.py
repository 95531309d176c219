"""Exports and proofs that somebody forged: both verifiers say the same, and neither pays for it.

Whoever forges an export writes its sums anew. `audit verify` and the script that ships with exports
share no code, so they must agree on each forgery: what one takes and the other does not would be
believed by somebody.
"""

import json
import os
import py_compile
import socket
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from audit import export, exported, proof, sealer, statement
from audit.checkpoint import anchor_line, time_text
from crypto import signing
from crypto.errors import KeyringError
from schemas.audit import AuditAction
from storage import audit_log

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "audit" / "standalone" / "verify.py"
EVENTS = "events/000000000000.jsonl"


@pytest.fixture
def log(grown_log):
    return grown_log(10, 10, 10)


def sums(directory: Path) -> None:
    """Write SHA256SUMS anew, as a forger would."""
    files = [p for p in directory.rglob("*") if p.is_file() and not p.is_symlink()]
    lines = (
        f"{sha256(p.read_bytes()).hexdigest()}  {p.relative_to(directory)}\n"
        for p in sorted(files)
        if p.name != "SHA256SUMS"
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


def claim_in_log(directory: Path) -> None:
    for key in ("size", "checkpoint_size", "log_size"):
        field("log.json", 0, key, 10**17)(directory)


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
                    ('"9999-12-31T23:59:59.999999Z"', 11), ('"0001-01-01T00:00:00.000000Z"', 11),
                    ('"\uff12026-11-28T04:30:00.000000Z"', 12)],
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
        add("events/000000000001.jsonl", b'{"index": 5, "missing": true}\n'),
        10,
    ),
    "an event said to be missing": (
        line(EVENTS, 15, lambda _: '{"index": 15, "missing": true}\n'),
        10,
    ),
    "missing is 1": (line(EVENTS, 15, lambda _: '{"index": 15, "missing": 1}\n'), 10),
    "missing and more": (
        line(EVENTS, 15, lambda _: '{"index": 15, "missing": true, "x": 0}\n'),
        10,
    ),
    "events out of order": (edit(EVENTS, swapped), 10),
    "a key more": (field(EVENTS, 15, "more", 1), 10),
    "a key less": (
        line(EVENTS, 15, lambda t: t.replace('"class": "B", ', "").replace('"class": "A", ', "")),
        10,
    ),
    "a key twice": (line(EVENTS, 15, twice), 10),
    "a key twice in a missing event": (
        line(EVENTS, 15, lambda _: '{"index": 15, "missing": false, "missing": true}\n'),
        10,
    ),
    "another order of keys": (
        line(EVENTS, 15, lambda t: json.dumps(dict(sorted(json.loads(t).items()))) + "\n"),
        10,
    ),
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
    "log.json: a key twice": (
        edit("log.json", lambda t: t.replace('"first": 0', '"first": 9, "first": 0')),
        12,
    ),
    "log.json: two lines": (edit("log.json", lambda t: t + t), 12),
    "log.json: a list": (edit("log.json", lambda _: "[]\n"), 12),
    "log.json: nested deep": (edit("log.json", lambda _: "[" * 200_000), 12),
    "log.json: empty": (edit("log.json", lambda _: ""), 12),
    "log.json: 2 MiB": (
        edit("log.json", lambda t: t.replace('"software": "', '"software": "' + "x" * (2 << 20))),
        12,
    ),
    "a checkpoint of another log": (foreign, 10),
    "a checkpoint twice": (line("checkpoints.jsonl", 1, lambda t: t + t), 10),
    "a checkpoint of nothing": (
        line("checkpoints.jsonl", 0, lambda t: t.replace("\\n11\\n", "\\n0\\n") + t),
        10,
    ),
    "a checkpoint is missing": (line("checkpoints.jsonl", 1, lambda _: ""), 10),
    "a checkpoint: full-width digits": (
        line("checkpoints.jsonl", 1, lambda t: t.replace("\\n21\\n", "\\n\uff12\uff11\\n")),
        10,
    ),
    "a checkpoint: escaped digits": (
        line("checkpoints.jsonl", 1, lambda t: t.replace("\\n21\\n", "\\n\\uff12\\uff11\\n")),
        10,
    ),
    "a checkpoint: a key more": (field("checkpoints.jsonl", 1, "more", 1), 10),
    "a checkpoint: a line of 2 MiB": (add("checkpoints.jsonl", b"x" * (2 << 20)), 10),
    "an epoch: a float": (word("epochs.jsonl", 0, "epoch", "1.0"), 10),
    "an epoch: true": (word("epochs.jsonl", 0, "epoch", "true"), 10),
    "an epoch: a key more": (field("epochs.jsonl", 0, "more", 1), 10),
    "an epoch more": (
        add(
            "epochs.jsonl",
            b'{"epoch": 2, "size": 12, "reason": "x", "lost_size": null, "lost_root": null}\n',
        ),
        10,
    ),
    "no epochs": (edit("epochs.jsonl", lambda _: ""), 10),
    "very many epochs": (edit("epochs.jsonl", lambda t: t * 2000), 10),
    "10^15 events": (claim(10**15), 10),
    "10^17 events in log.json": (claim_in_log, 11),
    "a file like a cache": (add("events/9__pycache__.jsonl"), 10),
    "a file below another directory": (add("more/x"), 10),
    "a file of full-width digits": (
        add("events/0000000000\uff13\uff11.jsonl", b'{"index": 31, "missing": true}\n'),
        10,
    ),
    "a file of a short name": (add("events/1.jsonl"), 10),
    "another file": (add("notes.txt"), 10),
    "a cache of Python": (add("__pycache__/log_format.cpython-311.pyc", b"x"), 10),
    "a name that is none": (
        add(
            "names.jsonl",
            b'{"id": "x", "kind": "operator", "name": "anna", "salt": "' + b"0" * 64 + b'"}\n',
        ),
        10,
    ),
    "a line of names that is none": (add("names.jsonl"), 10),
    "half a character in a name": (
        add(
            "names.jsonl",
            b'{"id": "x", "kind": "o", "name": "\\ud800", "salt": "' + b"0" * 64 + b'"}\n',
        ),
        10,
    ),
    **{
        f"{key} of an event: {raw[:20]}": (word(EVENTS, 15, key, raw), code)
        for key, cases in SEALED.items()
        for raw, code in cases
    },
    **{
        f"{key} of log.json: {raw[:20]}": (word("log.json", 0, key, raw), code)
        for key, cases in SAID.items()
        for raw, code in cases
    },
    **{
        f"{key} of a checkpoint: {raw[:20]}": (word("checkpoints.jsonl", 1, key, raw), code)
        for key, cases in POINTS.items()
        for raw, code in cases
    },
}


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


@pytest.mark.parametrize("kind", ["fifo", "socket", "symlink", "directory", "device"])
@pytest.mark.parametrize("name", ["hashes", "log.json", "SHA256SUMS", EVENTS, "events", "more"])
def test_what_is_no_plain_file_is_refused_at_once(log, name, kind):
    exported_ = log.export()
    path = exported_ / name
    subprocess.run(["rm", "-rf", path], check=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            os.chdir(path.parent)  # a socket's path must be short
            listening.bind(path.name)
            os.chdir(ROOT)
    elif kind == "symlink":
        path.symlink_to("/etc/hostname" if name != "events" else log.directory)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif name == "events":
        path.write_text("")
    else:
        path.mkdir()
    began = time.monotonic()
    code, lines, said = both(log, exported_)
    assert code == 10
    assert f"{name} is n" in said
    assert name in "\n".join(lines)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("isolated", [["-I"], []])
def test_the_script_runs_nothing_that_was_planted_beside_it_and_writes_nothing(log, isolated):
    directory = log.export()
    planted = log.directory / "planted.py"
    planted.write_text("import sys\nprint('planted')\nsys.exit(0)\n")
    py_compile.compile(
        str(planted), cache_from_source(str(directory / "log_format.py")), doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )  # fmt: skip
    (directory / "log_format").mkdir()
    (directory / "log_format" / "__init__.py").write_bytes(planted.read_bytes())
    sums(directory)
    before = sorted(directory.rglob("*"))
    words = [sys.executable, *isolated, directory / "verify.py", "--pubkey", log.pubkey]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd=directory)
    assert (ended.returncode, ended.stderr, "planted" in ended.stdout) == (10, "", False)
    assert "is no file of an export" in ended.stdout
    assert sorted(directory.rglob("*")) == before


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_the_script_runs_from_an_export_and_from_an_auditors_own_copy(log, where):
    directory, own = log.export(), log.directory / "own"
    own.mkdir()
    for name in export.SCRIPTS:
        (own / name).write_bytes((directory / name).read_bytes())
    words = ["verify.py"] if where == "here" else [own / "verify.py", directory]
    ended = subprocess.run(
        [sys.executable, *words, "--pubkey", log.pubkey],
        capture_output=True, text=True, check=False, cwd=directory if where == "here" else "/",
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert sorted(own.iterdir()) == [own / name for name in sorted(export.SCRIPTS)]


def test_an_anchor_that_is_younger_than_an_export_makes_it_incomplete_and_an_older_one_tampered(
    log,
):
    directory = log.export()
    log.grow(10, 10)
    anchor = log.anchor()
    code, lines, said = both(log, directory, anchor)
    assert code == 11
    assert "\n".join(lines).count("ask for a newer") == said.count("ask for a newer") == 1
    then = time_text(log.checkpoint(51).signed_at)  # when the last line of the anchor was signed
    field("log.json", 0, "exported_at", then)(directory)
    sums(directory)
    code, lines, said = both(log, directory, anchor)
    assert code == 10
    assert "cut off" in "\n".join(lines)
    assert "cut off" in said


def test_a_live_log_that_was_cut_is_tampered_also_if_the_sealers_clock_is_ahead(log):
    ahead = log.checkpoint(31)
    ahead = replace(ahead, size=40, signed_at=datetime.now(UTC) + timedelta(minutes=1))
    note = signing.note(ahead.text, signing.load(log.key).sign(ahead.text))
    anchor = log.directory / "ahead.anchor"
    anchor.write_text(anchor_line(note) + "\n")
    report = log.live(anchor)
    assert (report.exit_code, report.first_bad) == (10, 31), report.lines


def test_an_epoch_behind_the_end_of_a_complete_log_is_tampered(log):
    directory = log.export()
    row = {"epoch": 2, "size": 99, "reason": "x", "lost_size": None, "lost_root": None}
    add("epochs.jsonl", json.dumps(row).encode() + b"\n")(directory)
    sums(directory)
    assert both(log, directory)[0] == 10


def test_a_proof_that_is_no_file_is_refused_at_once(log):
    fifo = log.directory / "proof.json"
    os.mkfifo(fifo)
    assert proof.check(fifo, log.keys()).exit_code == 12
    assert log.standalone(log.directory, script=SCRIPT, proof=fifo)[0] == 12
    large = log.directory / "large.json"
    large.write_bytes(b'{"format": "syncward-audit-proof/1", ' + b"[" * (2 << 20))
    assert proof.check(large, log.keys()).exit_code == 10
    assert log.standalone(log.directory, script=SCRIPT, proof=large)[0] == 10


def test_a_sum_that_is_there_twice_or_is_none_is_found(log):
    original = log.export()
    for number, change in enumerate(
        (
            lambda t: t + "0" * 64 + "  hashes\n",
            lambda t: "0" * 64 + "  hashes\n" + t,
            lambda t: t + "x\n",
            lambda t: t + "\n",
            lambda t: t.replace("  hashes", " *hashes"),
            lambda t: t.upper(),
        )
    ):
        forged = log.directory / f"sums-{number}"
        subprocess.run(["cp", "-r", original, forged], check=True)
        (forged / "SHA256SUMS").write_text(change((forged / "SHA256SUMS").read_text()))
        assert both(log, forged)[0] == 10


# ── parts ─────────────────────────────────────────────────────────────────────────────────────


def test_an_export_that_is_not_complete_says_where_it_ends(log):
    code, lines, said = both(log, log.export(first=13, end=18))
    assert code == 0
    assert "ends at 21 of 31" in "\n".join(lines)
    assert "ends at 21 of 31" in said


PARTS = [
    (line("events/000000000011.jsonl", 0, lambda t: '{"index": 3, "missing": true}\n' + t), 10),
    (line("checkpoints.jsonl", 0, lambda _: ""), 10),
    (edit("checkpoints.jsonl", lambda _: ""), 10),
    (field("log.json", 0, "first", 12), 12),
    (field("log.json", 0, "frontier", ["00" * 32] * 3), 10),
    (field("log.json", 0, "frontier", ["00" * 32] * 2), 12),
    (add("hashes", b"x"), 10),
    (edit("checkpoints.jsonl", lambda t: t.splitlines(keepends=True)[0]), 10),
]  # fmt: skip


def test_a_part_that_was_forged_is_found(log):
    for number, (act, expected) in enumerate(PARTS):
        forged = log.export(f"part-{number}", first=13, end=18)
        act(forged)
        sums(forged)
        assert both(log, forged)[0] == expected, number


# ── what it costs ─────────────────────────────────────────────────────────────────────────────


#: Starts a process from a small one: a child of ours would count our own memory as its own.
_MEASURE = """
import resource, subprocess, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def measured(words: list[object]) -> tuple[int, float, int]:
    """Return (exit code, seconds, MB) of a process with 1 GiB of memory at most."""
    began = time.monotonic()
    command = [sys.executable, "-I", "-c", _MEASURE, *map(str, words)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(said[0]), time.monotonic() - began, int(said[1])


def commands(log, directory):
    yield [
        ROOT / ".venv/bin/syncward",
        "audit",
        "verify",
        "--export",
        directory,
        "--pubkey",
        log.pubkey,
    ]
    yield [sys.executable, "-I", "-B", SCRIPT, "--pubkey", log.pubkey, directory]


@pytest.mark.parametrize("size", [10**15, 10**17])
def test_a_claim_of_very_many_events_costs_nothing(log, size):
    forged = log.export()
    claim(size)(forged)
    sums(forged)
    for words in commands(log, forged):
        code, seconds, megabytes = measured(words)
        assert (code, seconds < 20, megabytes < 200) == (10, True, True), (seconds, megabytes)


def test_large_events_are_not_held_all_at_once(log):
    """A hundred million bytes of events, of which 32 MiB and a batch are held."""
    forged = log.export()
    first = json.loads((forged / EVENTS).read_text().splitlines()[0])
    with (forged / EVENTS).open("w") as file:
        for index in range(31, 4_031):
            file.write(json.dumps({**first, "index": index, "body": "x" * 65_000}) + "\n")
    point = json.loads((forged / "checkpoints.jsonl").read_text().splitlines()[-1])
    with (forged / "checkpoints.jsonl").open("a") as file:
        for size in range(131, 4_032, 100):
            text = point["text"].replace("\n31\n", f"\n{size}\n")
            file.write(json.dumps({**point, "text": text, "count": 100}) + "\n")
    with (forged / "hashes").open("ab") as file:
        file.write(b"x" * 32 * 4_000)
    for key in ("size", "checkpoint_size", "log_size"):
        field("log.json", 0, key, 4_031)(forged)
    sums(forged)
    for words in commands(log, forged):
        code, _, megabytes = measured(words)
        assert (code, megabytes < 250) == (10, True), megabytes


def test_no_sealer_signs_more_events_at_once_than_verifiers_take():
    assert sealer.BATCH <= exported.LARGEST_BATCH
    said = f"LARGEST_BATCH, MOST_EPOCHS = 1 << 20, {exported.LARGEST_BATCH}, "
    assert said in SCRIPT.with_name("log_format.py").read_text()


# ── proofs ────────────────────────────────────────────────────────────────────────────────────


def proven(log, index=5):
    with audit_log.snapshot(log.control.engine("auditor")) as tx:
        return proof.prove(tx, index)


def proof_says(log, document, name="p.json"):
    path = log.directory / name
    path.write_text(document if isinstance(document, str) else f"{json.dumps(document)}\n")
    report = proof.check(path, log.keys())
    code, said = log.standalone(log.directory, script=SCRIPT, proof=path)
    assert code == report.exit_code, (report.lines, said)
    return code


def test_a_proof_holds_nothing_that_it_does_not_prove(log):
    said = proven(log)
    assert list(said) == ["format", "event", "index", "size", "path", "note"]
    assert list(said["event"]) == list(exported.HASHED)
    assert proof_says(log, said) == 0
    for key, value in said["event"].items():
        assert proof_says(log, {**said, "event": {**said["event"], key: f"{value}x"}}) == 10


def test_a_proof_with_another_index_is_refused(log):
    for size in (31, 41):
        for index in (0, 5, size - 1):
            said = proven(log, index)
            assert proof_says(log, said) == 0
            for other in {0, 1, 4, 6, size // 2, size - 2, size - 1, size, size + 5, 10**17} - {
                index
            }:
                assert proof_says(log, {**said, "index": other}) == 10, (size, index, other)
        log.grow(10)


OTHER_PROOFS = [
    lambda t: t.replace('"index": 5', '"index": 5.0'),
    lambda t: t.replace('"index": 5', '"index": true'),
    lambda t: t.replace('"index": 5', '"index": -1'),
    lambda t: t.replace('"index": 5', '"index": 4, "index": 5'),
    lambda t: t.replace('"index": 5', '"index": NaN'),
    lambda t: t.replace('"index": 5', '"index": ' + "5" * 5000),
    lambda t: t.replace('"event": {', '"event": {"seq": 1, '),
    lambda t: t.replace('"size": 31', '"more": 1, "size": 31'),
    lambda t: t.replace('"size": 31', '"size": 32'),
    lambda t: t.replace('"path": [', '"path": ["' + "0" * 64 + '", '),
    lambda t: t.replace('"path": ["', '"path": ["\uff21\uff21'),
    lambda t: t.replace("\\n31\\n", "\\n\uff13\uff11\\n"),
    lambda t: t.rstrip(),
    lambda t: t + t,
]


def test_a_proof_in_another_form_is_refused(log):
    before = f"{json.dumps(proven(log))}\n"
    for number, change in enumerate(OTHER_PROOFS):
        assert change(before) != before, number
        assert proof_says(log, change(before)) == 10, number


# ── keys ──────────────────────────────────────────────────────────────────────────────────────


def test_a_line_of_a_key_must_be_that_of_its_bytes(log, tmp_path):
    directory = log.export()
    name, hash_, key = log.pubkey.read_text().strip().split("+", 2)
    other = b64encode(b"\2" + b64decode(key)[1:]).decode()
    for text in (f"{name}+00000000+{key}", f"{name}x+{hash_}+{key}", f"{name}+{hash_}+{other}",
                 f"{name}+{hash_}", f"{name}+{hash_}+{key[:-4]}", "# none", ""):  # fmt: skip
        pubkey = tmp_path / "bad.pub"
        pubkey.write_text(f"{text}\n")
        with pytest.raises(KeyringError):
            log.offline(directory, pubkey=pubkey)
        assert log.standalone(directory, script=SCRIPT, pubkey=pubkey)[0] == 12


def rotated(log):
    """Rotate the sealer's key; return the one before, as it is still in a thief's hands."""
    old = signing.load(log.key)
    log.pubkey  # noqa: B018 - it is written while the old key is the only one
    after = signing.rotate(log.key).line
    said = statement.signed(
        signing.load(log.key), log.control.one("SELECT log_id FROM audit.log"),
        AuditAction.SIGNER_ROTATED, {"before": old.public[0].line, "after": after},
    )  # fmt: skip
    log.say(AuditAction.SIGNER_ROTATED, said)
    log.seal()
    signing.retire(log.key)
    log.grow(5, 5)
    return old


def signed_again(directory: Path, number: int, signer) -> None:
    """Let another key sign one of the checkpoints of an export."""

    def act(text: str) -> str:
        said = json.loads(text)
        return json.dumps({**said, "signatures": signer.sign(said["text"])}) + "\n"

    line("checkpoints.jsonl", number, act)(directory)
    sums(directory)


def test_a_key_that_was_replaced_signs_nothing_more(log):
    old = rotated(log)
    directory = log.export()
    assert both(log, directory)[0] == 0
    points = (directory / "checkpoints.jsonl").read_text().splitlines()
    signed_again(directory, len(points) - 1, old)
    code, said = log.standalone(directory, script=SCRIPT)
    assert (code, "replaced before" in said) == (10, True), said
    assert log.offline(directory).exit_code == 10


def test_anchors_of_the_time_before_a_key_was_replaced_still_count(log):
    anchor = log.anchor("old.anchor")
    rotated(log)
    code, said = log.standalone(log.export(), anchor, script=SCRIPT)
    assert (code, "not counted" in said) == (0, False), said


@pytest.fixture
def stranger(tmp_path):
    signing.init(tmp_path / "stranger" / "key.json")
    return signing.load(tmp_path / "stranger" / "key.json")


def test_a_statement_of_an_unknown_key_cannot_be_verified_and_a_forged_one_is_tampered(
    log, stranger
):
    log_id = log.control.one("SELECT log_id FROM audit.log")
    detail = {"before": log.pubkey.read_text().strip(), "after": stranger.public[0].line}
    log.say(AuditAction.SIGNER_ROTATED,
            statement.signed(stranger, log_id, AuditAction.SIGNER_ROTATED, detail))  # fmt: skip
    log.seal()
    assert both(log, log.export("unknown"))[0] == 12
    signed = statement.signed(signing.load(log.key), log_id, AuditAction.SIGNER_ROTATED, detail)
    log.say(AuditAction.SIGNER_ROTATED, {**signed, "before": "x"})
    log.seal()
    assert both(log, log.export("forged"))[0] == 10


def test_a_checkpoint_of_an_unknown_key_is_no_fault_where_a_later_one_covers_it(log, stranger):
    covered = log.export("covered")
    signed_again(covered, 1, stranger)
    assert both(log, covered)[0] == 0
    last = log.export("last")
    signed_again(last, 2, stranger)
    assert both(log, last)[0] == 10
