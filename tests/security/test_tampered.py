"""A superuser against the log (T37, T38, T39): what he does is found, at the right index.

Each act runs on a real database with the triggers taken off; then the live verifier, the verifier
of exports and the script that ships with every export must say the same.
"""

import ast
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from audit import export, statement
from audit.checkpoint import anchor_line
from audit.findings import Level
from crypto import signing
from schemas.audit import AuditAction
from storage import audit, audit_log, sealing
from storage.engine import transaction
from tests.sealed_log import SealedLog

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent

#: The event that is tampered with: in the second of three batches.
AT = 15


@pytest.fixture
def log(grown_log):
    return grown_log(10, 10, 10)


def rows_of(log, *indexes):
    return {f"s{n}": log.seq(i) for n, i in enumerate(indexes)}


LEAF = (
    "UPDATE audit.event SET leaf = audit.leaf(at, account_id, class, action, target_kind, "
    "target_id, login, client, body)"
)
TILE = (
    "UPDATE audit.tile SET hashes = overlay(hashes PLACING (SELECT leaf FROM audit.event "
    f"WHERE seq = :s0) FROM {AT} * 32 + 1) WHERE level = 0 AND n = 0"
)
EDIT = "UPDATE audit.event SET body = replace(body, 'success', 'refused') WHERE seq = :s0"
SWAP = (
    "UPDATE audit.event e SET {0} FROM audit.event o WHERE e.seq IN (:s0, :s1) "
    "AND o.seq IN (:s0, :s1) AND o.seq <> e.seq"
)
CONTENTS = ", ".join(f"{c} = o.{c}" for c in ("at", "body", "leaf"))

#: Name -> (statements, first bad index).
EVENTS = {
    "body": ([EDIT], AT),
    "time": (["UPDATE audit.event SET at = at + interval '1 us' WHERE seq = :s0"], AT),
    "time, far": (["UPDATE audit.event SET at = at - interval '2 days' WHERE seq = :s0"], AT),
    "account": (["UPDATE audit.event SET account_id = gen_random_uuid() WHERE seq = :s0"], AT),
    "account, none": (["UPDATE audit.event SET account_id = NULL WHERE seq = :s0"], AT),
    "login": (["UPDATE audit.event SET login = 'otto' WHERE seq = :s0"], AT),
    "client": (["UPDATE audit.event SET client = '10.0.0.1' WHERE seq = :s0"], AT),
    "action": (["UPDATE audit.event SET action = 'instance.paused' WHERE seq = :s0"], AT),
    "class": (["UPDATE audit.event SET class = 'B' WHERE seq = :s0"], AT),
    "field moved": ([("UPDATE audit.event SET login = login || client, client = '' "
                     "WHERE seq = :s0")], AT),
    "delete": (["DELETE FROM audit.event WHERE seq = :s0"], AT),
    "numbers swapped": ([
        "ALTER TABLE audit.event ALTER seq DROP IDENTITY",
        SWAP.format("seq = o.seq"),
        "ALTER TABLE audit.event ALTER seq ADD GENERATED ALWAYS AS IDENTITY (START 5000)",
    ], AT),
    "contents swapped": ([SWAP.format(CONTENTS)], AT),
    "deleted and put back": ([
        "CREATE TABLE public.kept AS SELECT * FROM audit.event WHERE seq = :s0",
        "DELETE FROM audit.event WHERE seq = :s0",
        ("INSERT INTO audit.event (account_id, class, action, target_kind, target_id, body, leaf, "
        "xid) SELECT account_id, class, action, target_kind, target_id, body, leaf, xid "
        "FROM public.kept"),
    ], AT),
    "leaf recomputed": ([EDIT, f"{LEAF} WHERE seq = :s0"], AT),
    "only the leaf": (["UPDATE audit.event SET leaf = sha256('x') WHERE seq = :s0"], AT),
    "leaf and tile": ([EDIT, f"{LEAF} WHERE seq = :s0", TILE], 11),
    "leaf, tile and roots": ([
        EDIT, f"{LEAF} WHERE seq = :s0", TILE,
        "UPDATE audit.checkpoint SET root = sha256(root) WHERE size > :at",
    ], 11),
    "tile": ([("UPDATE audit.tile SET hashes = overlay(hashes PLACING sha256('x') "
              "FROM :at * 32 + 1) WHERE level = 0 AND n = 0")], AT),
    "numbers of a batch": ([
        ("UPDATE audit.checkpoint SET seqs = seqs[2:2] || seqs[1:1] || seqs[3:] "
        "WHERE size > :at AND size - cardinality(seqs) <= :at")], 11),
    "a checkpoint": (["DELETE FROM audit.checkpoint WHERE size = 21"], 11),
    "a checkpoint's time": ([
        "UPDATE audit.checkpoint SET signed_at = signed_at + interval '1 ms' WHERE size = 21"], 11),
    "a checkpoint's epoch": (["UPDATE audit.checkpoint SET epoch = 2 WHERE size = 21"], 11),
    "a signature": ([
        ("UPDATE audit.checkpoint SET signatures = (SELECT signatures FROM audit.checkpoint "
        "ORDER BY size LIMIT 1) WHERE size = 21")], 11),
    "no signature": (["UPDATE audit.checkpoint SET signatures = '' WHERE size = 31"], 21),
    "size": (["UPDATE audit.log SET size = 30"], 30),
}  # fmt: skip


def test_the_log_is_as_these_tests_take_it_to_be(log):
    assert log.control.all("SELECT size FROM audit.checkpoint ORDER BY size") == [
        (11,), (21,), (31,)]  # fmt: skip
    agree(log, Level.NOTE, None)


def agree(log, level, index, *anchors, live=True):
    """All three say the same."""
    report = log.live(*anchors)
    exported = log.export(f"export-{len(list(log.directory.glob('export-*')))}")
    offline = log.offline(exported, *anchors)
    code, said = log.standalone(exported, *anchors)
    if live:
        assert (report.level, report.first_bad) == (level, index), report.lines
    assert (offline.level, offline.first_bad) == (level, index), offline.lines
    found = re.match(r"TAMPERED at index (\d+)", said)
    assert (code, int(found[1]) if found else None) == (offline.exit_code, index), said
    return report


@pytest.mark.parametrize("act", EVENTS)
def test_what_a_superuser_did_is_found_at_its_index(log, act):
    statements, index = EVENTS[act]
    log.tamper(*statements, at=AT, **rows_of(log, AT, AT + 1))
    report = agree(log, Level.TAMPERED, index)
    assert report.exit_code == 10
    assert re.match(rf"TAMPERED (at index|between) {index}\b", report.lines[0])


def test_an_anchor_adds_no_doubt_about_events_before_the_one_that_was_changed(log):
    anchor = log.anchor()
    log.tamper(EDIT, f"{LEAF} WHERE seq = :s0", at=AT, **rows_of(log, AT, AT + 1))
    agree(log, Level.TAMPERED, AT, anchor)


# ── the end cut off, another history ──────────────────────────────────────────────────────────

CUT = (
    "DELETE FROM audit.event WHERE seq > :s0",
    "DELETE FROM audit.checkpoint WHERE size > 21",
    (
        "UPDATE audit.log SET size = 21, published_size = 0, last_xid = c.last_xid, "
        "last_seq = c.last_seq FROM audit.checkpoint c WHERE c.size = 21"
    ),
    "UPDATE audit.tile SET hashes = substr(hashes, 1, 21 * 32) WHERE level = 0 AND n = 0",
)


def test_a_tail_cut_with_its_checkpoints_is_found_by_an_anchor(log):
    anchor = log.anchor()
    log.tamper(*CUT, **rows_of(log, 20))
    agree(log, Level.NOTE, None)  # what the database has left is in itself consistent
    report = agree(log, Level.TAMPERED, 21, anchor)
    assert "31 events, the log 21" in report.lines[0]


def test_a_tail_cut_in_the_tiles_too_late_is_found_without_one(log):
    log.tamper(*CUT[:3], **rows_of(log, 20))
    agree(log, Level.TAMPERED, 21)


def test_without_an_anchor_a_cut_shows_when_no_young_checkpoint_is_left(log, monkeypatch):
    monkeypatch.setattr("audit.verify.STALE", -log.checkpoint(31).signed_at.utcoffset())
    log.tamper(*CUT, **rows_of(log, 20))
    report = log.live()
    assert (report.level, report.exit_code) == (Level.INCOMPLETE, 11)
    assert "the end was cut off" in report.lines[0]


def test_a_fork_is_found_by_the_anchors_of_the_other_branch(log, admin, tmp_path):
    """Both go on with the same key; only a superuser with the signer's memory can do that."""
    log.control.disconnect()
    copy = f"{log.control.database}_fork"
    admin.execute(f'CREATE DATABASE "{copy}" TEMPLATE "{log.control.database}"')
    other = type(log.control)(log.control.cluster, copy, log.control.password)
    try:
        log.grow(10)
        anchor = log.anchor()
        log.key.with_name(f"{log.key.name}.last").unlink()
        fork = SealedLog(other, tmp_path)
        fork.grow(4, 6)
        assert log.live(anchor).level == Level.NOTE
        report = agree(fork, Level.TAMPERED, 31, anchor)
        assert "a fork" in report.lines[0]
        assert "between 31 and 40" in report.lines[0]
    finally:
        other.dispose()
        admin.execute(f'DROP DATABASE "{copy}" WITH (FORCE)')


def test_two_anchors_that_contradict_each_other_are_a_fork(log, tmp_path):
    point = log.checkpoint(21)
    signer = signing.load(log.key)
    forged = replace(point, root=bytes(32))
    anchor = log.anchor()
    second = tmp_path / "b.anchor"
    note = signing.note(forged.text, signer.sign(forged.text))
    second.write_text(f"Nov 28 host syncward: {anchor_line(note)} trailing\n")
    report = agree(log, Level.TAMPERED, 11, anchor, second)
    assert any("different checkpoints of 21" in line for line in report.lines)


def test_whoever_writes_to_an_anchor_cannot_accuse_the_log(log, tmp_path):
    signing.init(tmp_path / "other" / "key.json")
    other = signing.load(tmp_path / "other" / "key.json")
    point = replace(log.checkpoint(31), size=99, root=bytes(32))
    anchor = tmp_path / "b.anchor"
    forged = other.sign(point.text)
    name = signing.load(log.key).sign(point.text.replace("99", "98"))
    lines = [anchor_line(signing.note(point.text, s)) for s in (forged, name)]
    anchor.write_text("\n".join([*lines, "syncward-checkpoint AAAA", lines[0][:-9], "\x1b[2J"]))
    report = agree(log, Level.INCOMPLETE, None, anchor)  # it proves nothing, as an empty one
    assert any("not trusted" in line for line in report.lines)
    assert any("forged" in line for line in report.lines)


def test_an_anchor_that_cannot_be_read_leaves_the_answer_open(log, tmp_path):
    assert agree(log, Level.INCOMPLETE, None, tmp_path / "gone").exit_code == 11


# ── what only the live database shows ─────────────────────────────────────────────────────────


def test_transactions_that_were_swapped_are_found(log):
    """They are not sealed; the order that they gave is."""
    log.tamper(SWAP.format("xid = o.xid"), **rows_of(log, AT, AT + 1))
    report = log.live()
    assert (report.exit_code, report.first_bad) == (10, AT + 1)
    log.tamper("UPDATE audit.checkpoint SET last_xid = '999999' WHERE size = 31")
    assert log.live().exit_code == 10


def test_an_event_that_was_inserted_behind_is_found(log):
    log.tamper(
        "INSERT INTO audit.event (account_id, class, action, target_kind, target_id, body, at, xid,"
        " login, client, leaf) SELECT account_id, class, action, target_kind, target_id, "
        "replace(body, 'success', 'refused'), at + interval '1 us', xid, login, client, '\\x00' "
        "FROM audit.event WHERE seq = :s0",
        f"{LEAF} WHERE leaf = '\\x00'",
        # a number between those that are sealed: one that a rollback left free
        "ALTER TABLE audit.event ALTER seq DROP IDENTITY",
        "UPDATE audit.event SET seq = -5 WHERE body LIKE '%refused%'",
        "ALTER TABLE audit.event ALTER seq ADD GENERATED ALWAYS AS IDENTITY (START 5000)",
        **rows_of(log, AT),
    )
    report = log.live()
    assert report.exit_code == 10
    assert "event number -5" in report.lines[0]


def test_events_that_are_not_sealed_yet_are_counted(log):
    log.write(3)
    report = log.live()
    assert report.lines == ["note: 3 events are not sealed yet: nothing is proven about them"]


GUARDS = {
    "ALTER TABLE audit.event_default DISABLE TRIGGER no_change": "no_change of audit.event_default",
    "ALTER TABLE audit.event_default ENABLE TRIGGER no_change": "is not ENABLE ALWAYS",
    "DROP TRIGGER no_truncate ON audit.event_default": "no_truncate of audit.event_default",
    "ALTER TABLE audit.event DISABLE TRIGGER stamp": "stamp of audit.event",
    "DROP TRIGGER no_change ON audit.checkpoint": "no_change of audit.checkpoint",
    "DROP TRIGGER no_truncate ON audit.epoch": "no_truncate of audit.epoch",
    "ALTER TABLE accounts DISABLE TRIGGER audited": "audited of accounts",
    "DROP TRIGGER audited_state ON active_runs": "audited_state of active_runs",
    "DROP TRIGGER audited_envelope ON credentials": "audited_envelope of credentials",
    "ALTER TABLE keystore.root DISABLE TRIGGER audited": "audited of keystore.root",
    "GRANT UPDATE ON audit.event TO syncward_worker": "syncward_worker may UPDATE audit.event",
    "GRANT UPDATE (body) ON audit.event_default TO syncward_operator": "may UPDATE",
    "GRANT TRUNCATE ON audit.checkpoint TO syncward_sealer": "may TRUNCATE audit.checkpoint",
    "ALTER TABLE audit.event DISABLE ROW LEVEL SECURITY": "audit.event has no row security",
    "CREATE FUNCTION public.deny() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'; "
    "DROP TRIGGER no_change ON audit.epoch; CREATE TRIGGER no_change BEFORE UPDATE OR DELETE ON "
    "audit.epoch FOR EACH ROW EXECUTE FUNCTION public.deny(); ALTER TABLE audit.epoch ENABLE "
    "ALWAYS TRIGGER no_change": "calls another function",
}  # fmt: skip


@pytest.mark.parametrize("statements", GUARDS)
def test_a_protection_that_is_gone_is_found(log, statements):
    for one in statements.split("; "):
        log.control.act(one)
    report = log.live()
    assert (report.exit_code, report.first_bad) == (10, None)
    assert GUARDS[statements] in "\n".join(report.lines)


def test_another_name_behind_an_operator_is_found(log):
    log.control.act_plainly(
        "ALTER TABLE audit.principal DISABLE TRIGGER ALL; "
        "ALTER TABLE audit.principal DROP CONSTRAINT principal_check1; "
        "UPDATE audit.principal SET name = 'somebody' WHERE name = 'anna'; "
        "ALTER TABLE audit.principal ENABLE TRIGGER ALL; "
        "ALTER TABLE audit.principal ENABLE ALWAYS TRIGGER no_change; "
        "ALTER TABLE audit.principal ENABLE ALWAYS TRIGGER no_truncate"
    )
    report = log.live()
    assert (report.exit_code, report.first_bad) == (10, None)
    assert "is not the name that stands behind it" in "\n".join(report.lines)


def test_a_role_that_may_write_everything_is_found(log, admin):
    admin.execute("GRANT pg_write_all_data TO syncward_worker")
    try:
        report = log.live()
    finally:
        admin.execute("REVOKE pg_write_all_data FROM syncward_worker")
    assert "syncward_worker is a member of pg_write_all_data" in "\n".join(report.lines)
    assert log.live().level == Level.NOTE


def test_a_tile_above_the_events_is_checked_too(control, tmp_path):
    log = SealedLog(control, tmp_path)
    with transaction(control.engine("operator")) as tx:
        audit.append(tx, *(log.event(AuditAction.INSTANCE_READ, reason=str(n)) for n in range(700)))
    log.seal()
    assert log.live().level == Level.NOTE
    log.tamper("UPDATE audit.tile SET hashes = overlay(hashes PLACING sha256('x') FROM 33) "
               "WHERE level = 1")  # fmt: skip
    report = log.live()
    assert (report.exit_code, report.first_bad) == (10, 0)
    assert "tile 0 of level 1" in report.lines[0]
    log.tamper("DELETE FROM audit.tile WHERE level = 1")
    assert log.live().exit_code == 11
    log.tamper("DELETE FROM audit.tile WHERE level = 0 AND n = 1")
    agree(log, Level.INCOMPLETE, None)


# ── keys, and what the sealer says in the log ─────────────────────────────────────────────────


@pytest.fixture
def stranger(tmp_path):
    signing.init(tmp_path / "stranger" / "key.json")
    return signing.load(tmp_path / "stranger" / "key.json")


def pubkey_of(signer, path):
    path.write_text("".join(f"{key.line}\n" for key in signer.public[:1]))
    return path


def test_with_another_public_key_nothing_is_verified(log, stranger, tmp_path):
    pubkey = pubkey_of(stranger, tmp_path / "stranger.pub")
    exported = log.export()
    assert log.live(pubkey=pubkey).exit_code == 12
    assert log.offline(exported, pubkey=pubkey).exit_code == 12
    assert log.standalone(exported, pubkey=pubkey)[0] == 12


def test_a_log_without_a_checkpoint_cannot_be_verified(control, tmp_path):
    log = SealedLog(control, tmp_path)
    log.write(1)
    assert log.live().exit_code == 12


def signed_by_sealer(log, action, detail, signer=None):
    log_id = log.control.one("SELECT log_id FROM audit.log")
    return statement.signed(signer or signing.load(log.key), log_id, action, detail)


def test_a_rotated_key_is_trusted_by_the_word_of_the_one_before(log):
    pubkey = log.pubkey
    before = signing.load(log.key).public[0].line
    after = signing.rotate(log.key).line
    log.say(AuditAction.SIGNER_ROTATED, signed_by_sealer(
        log, AuditAction.SIGNER_ROTATED, {"before": before, "after": after}))  # fmt: skip
    log.seal()
    signing.retire(log.key)
    log.grow(5, 5)
    report = agree(log, Level.NOTE, None)
    assert (report.checkpoints, len(report.keys)) == (6, 2)
    pubkey.write_text(f"{after}\n")  # and who knows only the new one
    assert agree(log, Level.NOTE, None).checkpoints == 3


@pytest.mark.parametrize("who", ["nobody", "stranger"])
def test_a_key_that_was_slipped_in_is_not_trusted(log, stranger, who):
    detail = {"before": log.pubkey.read_text().strip(), "after": stranger.public[0].line}
    if who == "stranger":
        detail = signed_by_sealer(log, AuditAction.SIGNER_ROTATED, detail, stranger)
    log.say(AuditAction.SIGNER_ROTATED, detail)
    assert log.seal() == 32
    if who == "nobody":
        agree(log, Level.TAMPERED, 31)
        return
    report, offline = log.live(), log.offline(log.export())
    assert (report.level, offline.level) == (Level.UNVERIFIABLE, Level.UNVERIFIABLE)
    assert len(report.keys) == 1


def test_checkpoints_of_a_key_that_nobody_introduced_are_not_believed(log, stranger):
    for size in (21, 31):
        point = log.checkpoint(size)
        log.tamper("UPDATE audit.checkpoint SET signatures = :line WHERE size = :size",
                   line=stranger.sign(point.text), size=size)  # fmt: skip
    report = agree(log, Level.TAMPERED, 11)
    assert "no trusted key introduced" in report.lines[0]


PRUNED = {"request": "r", "before": "2026-01-01", "first_kept": 8, "also": "12,13", "size": 31,
          "sha256": "0" * 64, "partitions": "", "approved_by": "a",
          "requested_by": "b"}  # fmt: skip


def prune(log, gone, *, sign=True, **changes):
    detail = {**PRUNED, "root": log.checkpoint(31).root.hex(), **changes}
    if sign:
        detail = signed_by_sealer(log, AuditAction.AUDIT_PRUNED, detail)
    log.say(AuditAction.AUDIT_PRUNED, detail)
    log.seal()
    for index in gone:
        log.tamper("DELETE FROM audit.event WHERE seq = :s0", **rows_of(log, index))


GONE = [*range(8), 12, 13]


def test_after_a_prune_the_rest_verifies(log):
    prune(log, GONE)
    report = agree(log, Level.NOTE, None)
    assert "pruned (asked for by b, approved by a" in report.lines[0]


@pytest.mark.parametrize(("gone", "changes", "index"), [
    ([*GONE, 14], {}, 14),
    ([*GONE, 9], {}, 9),
    (GONE, {"sign": False}, 0),
    (GONE, {"root": "00" * 32}, 0),
    (GONE, {"size": 30}, 0),
    (GONE, {"first_kept": 99}, 0),
    (GONE, {"also": "12,99"}, 0),
    (GONE, {"also": "12"}, 13),
])  # fmt: skip
def test_a_prune_excuses_what_its_signed_record_names_and_nothing_else(log, gone, changes, index):
    prune(log, gone, **changes)
    agree(log, Level.TAMPERED, index)


def test_a_record_of_a_prune_counts_once_it_is_sealed(log):
    detail = {**PRUNED, "root": log.checkpoint(31).root.hex()}
    log.say(AuditAction.AUDIT_PRUNED, signed_by_sealer(log, AuditAction.AUDIT_PRUNED, detail))
    log.tamper("DELETE FROM audit.event WHERE seq = :s0", **rows_of(log, 3))
    agree(log, Level.TAMPERED, 3)


def begin_epoch(log, *, sign=True, lost=None, **changes):
    with transaction(log.control.admin_engine()) as tx:  # a sealer's needs its event at once
        seen = sealing.state(tx)
        number = sealing.begin_epoch(tx, seen, "restored: disk", lost=lost)
        detail = {"epoch": number, "size": seen.size, "why": "restored: disk"}
        if lost:
            detail |= {"lost_size": lost[0], "lost_root": lost[1].hex()}
        detail |= changes
        if sign:
            detail = signed_by_sealer(log, AuditAction.AUDIT_EPOCH_STARTED, detail)
    log.say(AuditAction.AUDIT_EPOCH_STARTED, detail)
    log.seal()


def test_a_loss_that_the_sealer_declared_excuses_what_anchors_hold(log):
    anchor = log.anchor()
    lost = (31, log.checkpoint(31).root)
    log.tamper(*CUT, **rows_of(log, 20))
    log.key.with_name(f"{log.key.name}.last").unlink()
    begin_epoch(log, lost=lost)
    log.grow(20)
    report = agree(log, Level.NOTE, None, anchor)
    assert "31 events had been signed" in report.lines[0]
    assert report.anchored == 3


@pytest.mark.parametrize(("lost", "changes"), [
    ((25, b"\0" * 32), {}), ((31, b"\0" * 32), {}), (None, {"lost_size": 31}), (None, {}),
])  # fmt: skip
def test_a_loss_that_is_declared_wrongly_excuses_nothing(log, lost, changes):
    anchor = log.anchor()
    log.tamper(*CUT, **rows_of(log, 20))
    log.key.with_name(f"{log.key.name}.last").unlink()
    begin_epoch(log, lost=lost, **changes)
    log.grow(20)
    agree(log, Level.TAMPERED, 21, anchor)


def test_an_epoch_that_the_sealer_did_not_sign_is_found(log):
    begin_epoch(log, sign=False)
    agree(log, Level.TAMPERED, 31)


def test_an_epoch_that_never_began_is_found(log):
    log.tamper("INSERT INTO audit.epoch (epoch, size, floor_seq, reason, lost_size, lost_root) "
               "VALUES (2, 21, 0, 'x', 99, sha256('x'))")  # fmt: skip
    agree(log, Level.TAMPERED, 21)


# ── an export that was damaged, or in part ────────────────────────────────────────────────────


KINDS = ["log.json", "epochs.jsonl", "checkpoints.jsonl", "events/000000000000.jsonl", "hashes",
         "verify.py", "log_format.py", "SHA256SUMS"]  # fmt: skip


def test_one_flipped_byte_in_any_file_of_an_export_is_found(log):
    exported = log.export()
    script = ROOT / "audit" / "standalone" / "verify.py"  # an auditor's own copy
    assert sorted(KINDS) == sorted(
        str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()
    )
    for kind in KINDS:
        whole = (exported / kind).read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 2):
            flipped = bytearray(whole)
            flipped[place] ^= 0x04
            (exported / kind).write_bytes(flipped)
            offline = log.offline(exported)
            code, said = log.standalone(exported, script=script)
            assert code == offline.exit_code, (kind, place, offline.lines, said)
            assert code in ({10, 12} if kind == "log.json" else {10, 11}), (kind, place, said)
            (exported / kind).write_bytes(whole)
    assert log.offline(exported).level == Level.NOTE


def test_a_file_that_is_missing_or_cut_is_found(log):
    exported = log.export()
    for kind in KINDS:
        if kind.endswith(".py"):
            continue
        whole = (exported / kind).read_bytes()
        for cut in (None, whole[: len(whole) // 2], whole + b"\n"):
            (exported / kind).unlink()
            if cut is not None:
                (exported / kind).write_bytes(cut)
            offline = log.offline(exported)
            code, said = log.standalone(exported)
            assert code == offline.exit_code != 0, (kind, offline.lines, said)
            if cut is None:
                assert code == (12 if kind == "log.json" else 11), (kind, offline.lines)
            (exported / kind).write_bytes(whole)


def test_a_part_of_the_log_is_exported_in_whole_batches_and_verifies(log):
    anchor = log.anchor()
    exported = log.export(first=13, end=18)
    report = log.offline(exported, anchor)
    assert (report.level, report.events, report.size) == (Level.NOTE, 10, 21)
    assert log.standalone(exported, anchor)[0] == 0
    line = (exported / "events" / "000000000011.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["index"] == 11
    assert log.offline(log.export("whole"), start=25).events == 10
    assert log.live(start=25).events == 10


def test_a_part_whose_beginning_was_changed_is_found(log):
    log.tamper("UPDATE audit.tile SET hashes = overlay(hashes PLACING sha256('x') FROM 33) "
               "WHERE level = 0")  # fmt: skip
    exported = log.export(first=13)
    assert (log.offline(exported).exit_code, log.standalone(exported)[0]) == (10, 10)
    assert log.live(start=25).exit_code == 10


@pytest.mark.parametrize("text", ["\n", "\x1b[2J", "\u2028", '"', "\\", "=cmd()|x", "\ud800"])
def test_whatever_stands_in_an_event_it_stays_one_line_and_the_same_bytes(log, text):
    log.write(1, text)
    log.seal()
    exported = log.export()
    raw = (exported / "events" / "000000000000.jsonl").read_bytes()
    assert (len(raw.splitlines()), raw.count(b"\n"), raw.isascii()) == (32, 32, True)
    assert b"\x1b" not in raw
    body = log.control.one("SELECT body FROM audit.event ORDER BY seq DESC LIMIT 1")
    assert json.loads(raw.splitlines()[-1])["body"] == body
    assert log.offline(exported).level == Level.NOTE
    assert log.standalone(exported)[0] == 0


def test_an_export_is_readable_by_its_owner_only(log):
    exported = log.export()
    modes = {oct(p.stat().st_mode & 0o777) for p in exported.rglob("*") if p.is_file()}
    assert modes == {"0o600"}
    assert {oct(p.stat().st_mode & 0o777) for p in (exported, exported / "events")} == {"0o700"}


@pytest.mark.parametrize("name", ["verify.py", "log_format.py"])
def test_the_script_that_ships_is_short_and_knows_nothing_of_ours(name):
    code = (ROOT / "audit" / "standalone" / name).read_text()
    prose = [ast.get_docstring(n, clean=False) or "" for n in ast.walk(ast.parse(code))
             if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)]  # fmt: skip
    lines = [x for x in code.splitlines() if x.strip()]
    assert len(lines) - sum(len(text.splitlines()) for text in prose) < 200
    imported = {
        name.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    ours = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert ours == (set() if name == "verify.py" else {"cryptography"})


def test_an_export_names_operators_only_if_asked_and_another_name_is_found(log, tmp_path):
    log.write(1)
    log.seal()
    assert not (log.export("plain") / "names.jsonl").exists()
    with (
        export.directory(tmp_path / "named") as partial,
        audit_log.snapshot(log.control.engine("auditor")) as tx,
    ):
        export.write(tx, partial, names=True, as_ocsf=True)
    named = tmp_path / "named"
    assert log.offline(named).level is Level.NOTE
    assert log.standalone(named)[0] == 0
    events = [json.loads(line) for line in (named / "ocsf.jsonl").read_text().splitlines()]
    assert [e["metadata"]["sequence"] for e in events] == list(range(len(events)))
    assert "anna" in (named / "ocsf.jsonl").read_text()
    path = named / "names.jsonl"
    path.write_text(path.read_text().replace("anna", "otto"))
    report = log.offline(named)
    assert report.exit_code == 10
    assert "a name that its id does not mean" in "\n".join(report.lines)
    assert log.standalone(named)[0] == 10  # by its sum
