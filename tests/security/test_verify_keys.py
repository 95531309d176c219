"""Which keys a verifier believes, and until when: after a rotation, a theft, with some of them."""

import pytest

from audit import statement
from audit.checkpoint import anchor_line
from audit.findings import Level
from audit.sealer import Sealer
from crypto import signing
from schemas.audit import AuditAction, Principal
from tests.sealed_log import SealedLog

pytestmark = pytest.mark.integration


@pytest.fixture
def log(control, tmp_path):
    made = SealedLog(control, tmp_path)
    assert made.pubkey.exists()
    made.grow(9, 10)
    return made


def say(log, action, detail):
    log_id = log.control.one("SELECT log_id FROM audit.log")
    log.say(action, statement.signed(signing.load(log.key), log_id, action, detail))


def rotate(log):
    """Replace the key as an operator does; return the old file, and the new key's line."""
    stolen = log.directory / "audit" / "stolen.json"
    stolen.write_bytes(log.key.read_bytes())
    stolen.chmod(0o600)
    before = signing.load(log.key).public[0].line
    after = signing.rotate(log.key).line
    say(log, AuditAction.SIGNER_ROTATED, {"before": before, "after": after})
    log.seal()
    signing.retire(log.key)
    log.grow(5)
    return stolen, after


def both(log, pubkey=None, *anchors):
    """The live log and its export say the same."""
    report = log.live(*anchors, pubkey=pubkey)
    exported = log.export(f"export-{len(list(log.directory.glob('export-*')))}")
    assert log.offline(exported, *anchors, pubkey=pubkey).exit_code == report.exit_code
    return report


def sign_again(log, size, key):
    """Let another key sign what was signed."""
    point = log.checkpoint(size)
    log.tamper("UPDATE audit.checkpoint SET signatures = :line WHERE size = :size",
               line=signing.load(key).sign(point.text), size=size)  # fmt: skip


def test_a_key_that_was_replaced_signs_nothing_more(log):
    stolen, _ = rotate(log)
    assert both(log).exit_code == 0
    (size,) = log.grow(3)
    assert both(log).exit_code == 0
    sign_again(log, size, stolen)
    report = both(log)
    assert (report.exit_code, report.first_bad) == (10, size - 3)
    assert "a key that was replaced" in report.lines[0]


def test_while_both_sign_the_old_key_still_counts(log):
    """A second sealer has not got the new file yet."""
    old = log.directory / "audit" / "second.json"
    old.write_bytes(log.key.read_bytes())
    old.chmod(0o600)
    before = signing.load(log.key).public[0].line
    after = signing.rotate(log.key).line
    say(log, AuditAction.SIGNER_ROTATED, {"before": before, "after": after})
    size = log.seal()
    (later,) = log.grow(2)
    sign_again(log, later, old)
    assert later > size
    assert both(log).exit_code == 0


def test_what_a_replaced_key_says_in_the_log_is_not_believed(log):
    stolen, _ = rotate(log)
    kept, log.signer = log.signer, stolen.name
    before = signing.load(log.key).public[0].line
    say(log, AuditAction.SIGNER_ROTATED, {"before": before, "after": before})
    log.signer = kept
    size = log.seal()
    report = both(log)
    assert (report.exit_code, report.first_bad) == (10, size - 1)
    assert "was not signed by the sealer" in report.lines[0]


def test_an_anchored_note_of_a_replaced_key_does_not_accuse_the_log(log):
    stolen, _ = rotate(log)
    point = log.checkpoint(log.control.one("SELECT size FROM audit.log"))
    forged = point.text.replace(f"\n{point.size}\n", f"\n{point.size + 7}\n")
    anchor = log.anchor()
    note = signing.note(forged, signing.load(stolen).sign(forged))
    anchor.write_text(f"{anchor.read_text()}{anchor_line(note)}\n")
    report = both(log, None, anchor)
    assert (report.level, report.anchored) == (Level.NOTE, 4)
    assert "a key that was replaced before: not counted" in "\n".join(report.lines)


def test_with_the_new_key_alone_what_an_older_key_said_cannot_be_verified(log):
    detail = {"request": "r", "before": "2026-01-01", "first_kept": 0, "also": "", "size": 10,
              "root": log.checkpoint(10).root.hex(), "sha256": "0" * 64, "partitions": "",
              "approved_by": "a", "requested_by": "b"}  # fmt: skip
    say(log, AuditAction.AUDIT_PRUNED, detail)
    log.seal()
    _, after = rotate(log)
    assert both(log).exit_code == 0
    pubkey = log.directory / "new.pub"
    pubkey.write_text(f"{after}\n")
    report = both(log, pubkey)
    assert (report.exit_code, report.first_bad) == (12, None)
    assert "CANNOT VERIFY at index 20: audit.pruned is signed by a key that is not" in "\n".join(
        report.lines
    )


def test_with_the_new_key_alone_what_older_keys_signed_is_covered(log):
    _, after = rotate(log)
    pubkey = log.directory / "new.pub"
    pubkey.write_text(f"{after}\n")
    report = both(log, pubkey)
    assert (report.level, report.checkpoints) == (Level.NOTE, 2)
    assert "2 checkpoints up to 20 events are signed by keys that are not known" in "\n".join(
        report.lines
    )


def test_a_statement_with_a_forged_signature_is_tampered(log):
    before = signing.load(log.key).public[0].line
    log_id = log.control.one("SELECT log_id FROM audit.log")
    detail = {"before": before, "after": before}
    good = statement.signed(signing.load(log.key), log_id, AuditAction.SIGNER_ROTATED, detail)
    log.say(AuditAction.SIGNER_ROTATED, good | {"after": "somebody"})
    size = log.seal()
    report = both(log)
    assert (report.exit_code, report.first_bad) == (10, size - 1)


# ── anchors ───────────────────────────────────────────────────────────────────────────────────


def test_an_anchor_that_says_nothing_of_a_known_key_is_as_good_as_an_empty_one(log):
    empty, foreign, good = (log.directory / f"{x}.anchor" for x in ("empty", "foreign", "good"))
    empty.write_text("")
    signing.init(log.directory / "other" / "key.json")
    point = log.checkpoint(20)
    note = signing.note(point.text, signing.load(log.directory / "other" / "key.json").sign(
        point.text))  # fmt: skip
    foreign.write_text(f"{anchor_line(note)}\n")
    log.anchor(good.name)
    assert both(log, None, good).exit_code == 0
    for useless in (empty, foreign):
        report = both(log, None, good, useless)
        assert report.exit_code == 11
        assert f"{useless.name} holds no checkpoint" in report.lines[0]


def test_two_copies_of_one_anchor_both_count(log):
    copies = [log.anchor("a.anchor"), log.anchor("b.anchor")]
    assert both(log, None, *copies).exit_code == 0


def test_a_fork_below_an_accepted_loss_is_found(log):
    """The loss excuses what lay beyond it, not another history before."""
    point, seq = log.checkpoint(20), log.seq(19)
    log.grow(10)
    anchor = log.anchor()
    log.tamper(
        "DELETE FROM audit.event WHERE seq > :seq",
        "DELETE FROM audit.checkpoint WHERE size > 20",
        "UPDATE audit.log SET size = 20, published_size = 0, last_xid = c.last_xid, "
        "last_seq = c.last_seq FROM audit.checkpoint c WHERE c.size = 20",
        "UPDATE audit.tile SET hashes = substr(hashes, 1, 20 * 32) WHERE level = 0 AND n = 0",
        seq=seq,
    )
    accept_loss(log)
    log.grow(3)
    report = both(log, None, anchor)
    assert (report.exit_code, report.anchored) == (0, 3)
    other = point.text.replace("\n20\n", "\n10\n")
    below = log.directory / "below.anchor"
    note = signing.note(other, signing.load(log.key).sign(other))
    below.write_text(f"{anchor_line(note)}\n")
    report = both(log, None, anchor, below)
    assert report.exit_code == 10
    assert "another root of 10 events: a fork" in "\n".join(report.lines)


def accept_loss(log):
    """Start the sealer once as an operator does who restored a backup."""
    sealer = Sealer(log.control.engine("sealer"), signing.load(log.key), log.key,
                    Principal("sealer", "s"), "s", accepted_loss="restored")  # fmt: skip
    sealer.step()
    assert sealer.accepted_loss is None
    sealer.close()
