"""Anchors that are down, hang, lie, were cut or rolled back: each on the real protocol."""

import json
import os
import re
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import botocore.exceptions
import botocore.session
import pytest
from moto.server import ThreadedMotoServer
from prometheus_client import REGISTRY

from audit import memory
from audit.anchors import loading, s3
from audit.anchors.base import AnchorFailed
from audit.anchors.file import File
from audit.anchors.loading import Opening
from audit.anchors.s3 import S3
from audit.anchors.syslog_tls import Syslog
from audit.checkpoint import Checkpoint, anchor_line, notes_in
from audit.main import Process
from audit.publisher import AnchorsNotCompared, Judge, Lane, Publisher
from audit.sealer import LogWentBack
from crypto import signing
from crypto.errors import KeyringError
from schemas import anchors
from schemas.anchors import S3Anchor, SyslogAnchor
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError, StartRefused
from schemas.settings import Settings
from storage import audit, sealing
from storage.engine import transaction
from tests.collector import Collector
from tests.sealers import until
from tests.tls_proxy import certificate

LOG = uuid4()


@pytest.fixture
def signer(tmp_path):
    key = tmp_path / "key" / "signer.json"
    signing.init(key)
    return signing.load(key)


def made(signer, size: int, *, epoch: int = 1, root: bytes | None = None, log=LOG):
    point = Checkpoint(log, size, root or bytes([size % 256]) * 32, epoch, datetime.now(UTC))
    return signing.note(point.text, signer.sign(point.text)), point


def newest(anchor) -> str | None:
    """The last note of the newest group."""
    return next((group[-1] for group in anchor.notes() if group), None)


# ── a file ──────────────────────────────────────────────────────────────────────────────────────


def test_a_file_grows_by_a_line_and_gives_the_last_one_back(tmp_path, signer):
    anchor = File(tmp_path / "log.anchor")
    assert newest(anchor) is None
    notes = [made(signer, size) for size in (1, 2, 3)]
    for note, point in notes:
        anchor.publish(note, point)
    lines = anchor.path.read_text().splitlines()
    assert lines == [anchor_line(note) for note, _ in notes]
    assert newest(anchor) == notes[-1][0]


@pytest.mark.parametrize("left", [1, 20, 200])
def test_a_torn_line_is_left_and_the_next_begins_on_its_own(tmp_path, signer, left):
    anchor = File(tmp_path / "log.anchor")
    (first, one), (second, two) = made(signer, 1), made(signer, 2)
    anchor.publish(first, one)
    whole = anchor.path.read_bytes()
    anchor.path.write_bytes(whole + anchor_line(second).encode()[:left])
    assert newest(anchor) == first
    anchor.publish(second, two)
    assert newest(anchor) == second
    assert anchor.path.read_bytes().startswith(whole)
    assert len(anchor.path.read_text().splitlines()) == 3


def test_a_file_is_no_link_no_pipe_and_not_waited_for_when_locked(tmp_path, signer, monkeypatch):
    note, point = made(signer, 1)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dir").mkdir()
    for name in ("link", "pipe", "dir", "none/at"):
        with pytest.raises(AnchorFailed):
            File(tmp_path / name).publish(note, point)
    assert not (tmp_path / "target").exists()
    anchor = File(tmp_path / "log")
    anchor.publish(note, point)
    monkeypatch.setattr("audit.anchors.file.TIMEOUT_S", 0.2)
    import fcntl

    with anchor.path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(AnchorFailed, match="locked"):
            anchor.publish(note, point)


def test_a_full_disk_is_a_failure_not_a_yes(signer):
    note, point = made(signer, 1)
    with pytest.raises(AnchorFailed):
        File(Path("/dev/full")).publish(note, point)


# ── syslog over TLS ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def files(tmp_path):
    return certificate(tmp_path, "localhost")


def syslog(collector, ca: Path, **changes) -> Syslog:
    given = {"host": "localhost", "port": collector.port, "ca": ca, "certificate": None,
             "key": None, "name": "localhost", **changes}  # fmt: skip
    return Syslog(SyslogAnchor(**given))


def test_a_collector_gets_rfc_5424_with_the_line_of_every_anchor(files, signer):
    with Collector(files) as there:
        anchor = syslog(there, files[0])
        notes = [made(signer, size) for size in (1, 2)]
        for note, point in notes:
            anchor.publish(note, point)
        until(lambda: len(there.messages) == 2)
        anchor.close()
    for message, (note, point) in zip(there.messages, notes, strict=True):
        header = r"<109>1 \d{4}-\d\d-\d\dT[\d:.]+Z \S+ syncward-sealer \d+ checkpoint - "
        assert re.match(header, message)
        assert notes_in(message) == [note]
        assert message.endswith(f"epoch=1 size={point.size}")
    assert newest(anchor) is None
    assert not anchor.readable


def test_a_collector_of_another_authority_or_name_gets_nothing(files, tmp_path, signer):
    other = certificate(tmp_path, "elsewhere", stem="other")
    with Collector(files) as there:
        for anchor, why in (
            (syslog(there, other[0]), "certificate does not hold"),
            (syslog(there, files[0], name="collector.example.com"), "certificate does not hold"),
            (syslog(there, tmp_path / "none.crt"), "does not exist"),
        ):
            with pytest.raises(AnchorFailed, match=why):
                anchor.publish(*made(signer, 1))
        assert there.messages == []


def test_plaintext_is_refused(files, signer):
    with Collector(files, "plain") as there, pytest.raises(AnchorFailed, match="TLS failed"):
        syslog(there, files[0]).publish(*made(signer, 1))


def test_a_client_certificate_is_shown_where_it_is_asked_for(files, tmp_path, signer):
    mine = certificate(tmp_path, "sealer")
    with Collector(files, clients=mine[0]) as there:
        with pytest.raises(AnchorFailed):
            syslog(there, files[0]).publish(*made(signer, 1))
        anchor = syslog(there, files[0], certificate=mine[0], key=mine[1])
        anchor.publish(*made(signer, 2))
        until(lambda: there.messages)
        anchor.close()
    assert len(there.messages) == 1


def test_a_collector_that_hangs_up_did_not_accept_and_one_that_is_back_is_found(files, signer):
    with Collector(files, "reset") as there:
        anchor = syslog(there, files[0])
        with pytest.raises(AnchorFailed):
            anchor.publish(*made(signer, 1))
        there.mode = "keep"
        anchor.publish(*made(signer, 2))
        until(lambda: len(there.messages) == 1)
        there.hang_up()  # it was restarted while the link was idle
        time.sleep(0.1)
        anchor.publish(*made(signer, 3))
        until(lambda: len(there.messages) == 2)
        anchor.close()


def test_a_collector_that_never_answers_is_given_up(files, signer, monkeypatch):
    monkeypatch.setattr("audit.anchors.syslog_tls.TIMEOUT_S", 0.3)
    with Collector(files, "hang") as there:
        started = time.monotonic()
        with pytest.raises(AnchorFailed, match="in time"):
            syslog(there, files[0]).publish(*made(signer, 1))
        assert time.monotonic() - started < 5


def test_bytes_that_nobody_acknowledges_are_not_accepted(files, signer, monkeypatch):
    """The collector's host stopped reading: its window is full, so bytes stay with us."""
    monkeypatch.setattr("audit.anchors.syslog_tls.TIMEOUT_S", 0.5)
    with Collector(files) as there:
        anchor = syslog(there, files[0])
        anchor.publish(*made(signer, 1))
        link = anchor._link
        assert link is not None
        monkeypatch.setattr("audit.anchors.syslog_tls.fcntl", Unacknowledged())
        with pytest.raises(AnchorFailed, match="in time"):
            anchor.publish(*made(signer, 2))
        assert anchor._link is None


class Unacknowledged:
    """What the kernel answers while the other host acknowledges nothing."""

    @staticmethod
    def ioctl(*_: object) -> bytes:
        return b"\1\0\0\0"


# ── S3 with Object Lock ─────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def store():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def login(tmp_path):
    path = tmp_path / "own" / "s3.credentials"
    path.parent.mkdir(mode=0o700)
    path.write_text("[default]\naws_access_key_id = AKIATEST\naws_secret_access_key = hidden-one\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def admin_client(store):
    return botocore.session.Session().create_client(
        "s3", region_name="us-east-1", endpoint_url=store,
        aws_access_key_id="admin", aws_secret_access_key=uuid4().hex,
    )  # fmt: skip


@pytest.fixture
def bucket(admin_client):
    name = f"anchors-{uuid4().hex[:8]}"
    admin_client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    return name


def anchor_in(store, bucket, login, **changes) -> S3:
    given = {"bucket": bucket, "prefix": "syncward", "endpoint": store, "region": "us-east-1",
             "retain_days": 30, "mode": "COMPLIANCE", "ca": None, **changes}  # fmt: skip
    return S3(S3Anchor(**given), LOG, lambda: s3.read_credentials(login))


def test_a_store_keeps_each_checkpoint_locked_and_gives_the_newest_back(
    store, bucket, login, signer, admin_client
):
    anchor = anchor_in(store, bucket, login)
    assert newest(anchor) is None
    notes = [made(signer, size) for size in (9, 10, 300, 5_000_000)]
    for note, point in notes:
        anchor.publish(note, point)
    assert newest(anchor) == notes[-1][0]
    listed = admin_client.list_objects_v2(Bucket=bucket)["Contents"]
    assert [one["Key"].rpartition("-")[2] for one in listed] == ["5000000", "300", "10", "9"]
    head = admin_client.head_object(Bucket=bucket, Key=listed[0]["Key"])
    assert head["ObjectLockMode"] == "COMPLIANCE"
    left = head["ObjectLockRetainUntilDate"] - datetime.now(UTC)
    assert timedelta(days=29) < left < timedelta(days=31)
    with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
        admin_client.delete_object(Bucket=bucket, Key=listed[0]["Key"], VersionId=head["VersionId"])
    admin_client.delete_object(Bucket=bucket, Key=listed[0]["Key"])  # a marker hides it
    assert newest(anchor) == notes[-1][0]
    note, point = made(signer, 4, epoch=2)  # after a loss that somebody accepted
    anchor.publish(note, point)
    assert newest(anchor) == note
    anchor.close()


def test_what_is_there_is_not_overwritten(store, bucket, login, signer, admin_client):
    anchor = anchor_in(store, bucket, login)
    note, point = made(signer, 7)
    anchor.publish(note, point)
    anchor.publish(note, point)  # again, after a crash: no harm
    other, same_size = made(signer, 7, root=b"x" * 32)
    with pytest.raises(AnchorFailed, match="another note is there"):
        anchor.publish(other, same_size)
    assert newest(anchor) == note
    key = admin_client.list_objects_v2(Bucket=bucket)["Contents"][0]["Key"]
    admin_client.put_object(Bucket=bucket, Key=key, Body=other.encode())  # another writer can
    assert newest(anchor) == note
    versions = admin_client.list_object_versions(Bucket=bucket)["Versions"]
    assert len(versions) == 2


def test_a_bucket_that_locks_nothing_is_refused(store, login, signer, admin_client):
    name = f"plain-{uuid4().hex[:8]}"
    admin_client.create_bucket(Bucket=name)
    with pytest.raises(AnchorFailed):
        anchor_in(store, name, login).publish(*made(signer, 1))
    with pytest.raises(AnchorFailed, match="NoSuchBucket"):
        anchor_in(store, "no-such-bucket", login).publish(*made(signer, 1))


def test_what_is_no_checkpoint_is_not_taken_for_one(store, bucket, login, admin_client, signer):
    anchor = anchor_in(store, bucket, login)
    admin_client.put_object(Bucket=bucket, Key=f"syncward/{LOG}/0", Body=b"nonsense")
    assert list(anchor.notes()) == [[f"syncward/{LOG}/0"]]
    note, point = made(signer, 1)
    anchor.publish(note, point)
    assert [note] in list(anchor.notes())


def test_a_store_that_is_away_or_never_answers_is_bounded_and_quotes_no_key(
    login, signer, monkeypatch
):
    monkeypatch.setattr("audit.anchors.s3.TIMEOUT_S", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for where in (f"http://127.0.0.1:{port}", "http://127.0.0.1:1"):
            started = time.monotonic()
            with pytest.raises(AnchorFailed) as caught:
                anchor_in(where, "bucket", login).publish(*made(signer, 1))
            assert time.monotonic() - started < 10
            assert "hidden-one" not in caught.value.public


def test_the_login_of_a_store_is_read_from_a_private_file_only(login):
    login.chmod(0o644)
    with pytest.raises(KeyringError, match="others can read it"):
        s3.read_credentials(login)
    login.chmod(0o600)
    login.write_text("[other]\naws_access_key_id = x\n")
    with pytest.raises(ConfigError, match=r"\[default\]"):
        s3.read_credentials(login)


# ── what only the file system can tell ──────────────────────────────────────────────────────────


def test_production_refuses_files_that_would_be_lost_with_what_they_protect(tmp_path):
    (tmp_path / "pg" / "sub").mkdir(parents=True)
    (tmp_path / "pg" / "PG_VERSION").write_text("18")
    (tmp_path / "data" / "x").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    uris = [(tmp_path / part).as_uri() for part in ("pg/sub/l", "data/x/l", "a/l", "b/l")]

    def load(profile: str) -> loading.Opening:
        return loading.load(Settings.model_validate({
            "profile": profile, "data_dir": tmp_path / "data", "audit_anchors": " ".join(uris),
        }))  # fmt: skip

    with pytest.raises(StartRefused) as refused:
        load("production")
    found = "\n".join(refused.value.reasons)
    assert "anchor 1 is in the data directory of a database" in found
    assert "anchor 2 is in the data directory;" in found
    assert "anchors 1 and 3 are on the same file system" in found
    assert len(load("development").uris) == 4


# ── the publisher, on a real log ────────────────────────────────────────────────────────────────


@pytest.fixture
def log(world):
    world.account()
    world.sealer().step()
    return world


class Lying:
    """An anchor that says what a test wants."""

    readable = True

    def __init__(self, *, held: str | None = None, fails: bool = False) -> None:
        self.held, self.fails = held, fails
        self.taken: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def publish(self, signed_note: str, checkpoint: Checkpoint) -> None:
        assert self.gate.wait(30)
        if self.fails:
            raise AnchorFailed("it is down")
        self.held = signed_note
        self.taken.append(checkpoint.size)

    def notes(self):
        assert self.gate.wait(30)
        return iter([[self.held]] if self.held else [])

    def close(self) -> None:
        return


def publisher(world, *anchors, sealer=None, trusted=()) -> Publisher:
    sealer = sealer or world.sealer()
    judge = Judge(sealer.engine, sealer, lambda: (*sealer.signer.public, *trusted))
    lanes = [Lane(n, "test", anchor, judge) for n, anchor in enumerate(anchors, 1)]
    return Publisher(sealer.engine, sealer, lanes)


def published(world) -> int:
    with transaction(world.control.engine("sealer")) as tx:
        return sealing.state(tx).published_size


def run(world, *anchors):
    """A holding sealer whose publisher looks until the test says that it is enough."""
    sealer = world.sealer()
    while sealer.step() is not None:
        pass
    made_ = publisher(world, *anchors, sealer=sealer)
    made_.compare(5)
    made_.start()
    return sealer, made_


def looking(made_, true, seconds=15.0):
    def once() -> object:
        made_.look()
        return true()

    return until(once, seconds)


def test_published_means_by_all_of_them_and_a_hanging_one_holds_up_nothing_else(log):
    good, bad = Lying(), Lying()
    sealer, made_ = run(log, good, bad)
    bad.gate.clear()
    size = log.control.one("SELECT size FROM audit.log")
    looking(made_, lambda: good.taken == [size])
    log.account("another")
    sealer.step()  # sealing goes on, and so does the other anchor
    looking(made_, lambda: len(good.taken) == 2)
    assert published(log) == 0
    bad.gate.set()
    looking(made_, lambda: published(log) == good.taken[-1])
    made_.stop()
    assert bad.taken[-1] == good.taken[-1]


def test_an_anchor_that_was_down_gets_the_newest_checkpoint_when_it_is_back(log):
    good, bad = Lying(), Lying(fails=True)
    sealer, made_ = run(log, good, bad)
    looking(made_, lambda: good.taken)
    log.account("another")
    sealer.step()
    looking(made_, lambda: len(good.taken) == 2)
    bad.fails = False
    looking(made_, lambda: published(log) == good.taken[-1])
    made_.stop()
    assert bad.taken[-1] == good.taken[-1]


def newest_note(world):
    with transaction(world.control.engine("sealer")) as tx:
        newest, seen = sealing.newest_checkpoint(tx), sealing.state(tx)
    assert newest is not None
    return newest, seen


@pytest.mark.parametrize("what", ["larger", "forked", "another_log"])
def test_an_anchor_that_holds_more_or_something_else_is_the_end(log, what):
    signer = log.sealer().signer
    newest, seen = newest_note(log)
    held = {
        "larger": made(signer, newest.size + 5, log=seen.log_id),
        "forked": made(signer, newest.size, root=b"x" * 32, log=seen.log_id),
        "another_log": made(signer, newest.size, root=newest.root),
    }[what][0]
    with pytest.raises(LogWentBack, match=r"anchor 1 \(test\) holds a checkpoint of \d+ events"):
        publisher(log, Lying(held=held)).compare()


def test_one_that_says_so_later_is_the_end_too(log):
    signer = log.sealer().signer
    _, seen = newest_note(log)
    anchor = Lying(fails=True)
    _, made_ = run(log, anchor)
    looking(made_, lambda: made_._lanes[0]._offer is not None)
    anchor.held = made(signer, 10_000, log=seen.log_id)[0]
    with pytest.raises(LogWentBack):
        looking(made_, lambda: False)
    made_.stop()


def foreign(number: str) -> float:
    name = "syncward_audit_anchor_foreign_notes_total"
    return REGISTRY.get_sample_value(name, {"anchor": number}) or 0.0


@pytest.mark.parametrize("what", ["nonsense", "unknown key", "another log", "forged", "copied"])
def test_what_our_key_did_not_sign_is_told_and_stops_nothing(log, what, signer, caplog):
    ours = log.sealer().signer
    _, seen = newest_note(log)
    unknown = made(signer, 10_000, log=seen.log_id)[0]
    held = {
        "nonsense": "nonsense",
        "unknown key": unknown,
        "another log": made(signer, 10_000)[0],
        "forged": made(ours, 10_000, log=seen.log_id)[0].replace("\n10000\n", "\n10001\n"),
        "copied": unknown.replace(signer.public[0].name, ours.public[0].name),
    }[what]
    bad, good, before = Lying(held=held), Lying(), foreign("2")
    with caplog.at_level("WARNING"):
        _, made_ = run(log, good, bad)
        looking(made_, lambda: published(log) == log.control.one("SELECT size FROM audit.log"))
    made_.stop()
    assert len(bad.taken) == 1
    told = [r.notes for r in caplog.records if r.message == "anchor_foreign_notes"]
    assert set(told) == {1}
    assert foreign("2") == before + len(told)


def test_what_our_key_signed_counts_however_many_others_stand_behind_it(log, signer, tmp_path):
    _, seen = newest_note(log)
    file = File(tmp_path / "log.anchor")
    file.publish(*made(log.sealer().signer, 10_000, log=seen.log_id))
    with file.path.open("a") as out:
        for n in range(500):  # some blocks
            out.write(f"{anchor_line(made(signer, 20_000 + n, log=seen.log_id)[0])}\n")
        out.write("x" * 200_000 + "\nsyncward-checkpoint !!\nsyncward-checkpoint c3lu\n")
    with pytest.raises(LogWentBack, match="holds a checkpoint of 10000 events"):
        publisher(log, file).compare()


def test_an_old_note_at_the_end_again_hides_no_newer_one(log, tmp_path):
    signer, (_, seen) = log.sealer().signer, newest_note(log)
    file = File(tmp_path / "log.anchor")
    for size in (10_000, 1):
        file.publish(*made(signer, size, log=seen.log_id))
    with pytest.raises(LogWentBack, match="holds a checkpoint of 10000 events"):
        publisher(log, file).compare()


# ── a sealer that remembers nothing ─────────────────────────────────────────────────────────────


def process(world, *uris: str, loss: str | None = None) -> Process:
    sealer = world.sealer()
    sealer.accepted_loss = loss
    return Process(sealer.engine, sealer, Opening(anchors.parse(" ".join(uris)).anchors, None))


@pytest.mark.parametrize("what", ["not mounted", "no file of ours", "only notes of others"])
def test_a_sealer_that_remembers_nothing_needs_every_anchor(log, tmp_path, signer, what):
    good = File(tmp_path / "good.anchor")
    newest_, seen = newest_note(log)
    good.publish(*made(log.sealer().signer, newest_.size, root=newest_.root, log=seen.log_id))
    bad = tmp_path / "bad" / "log.anchor"
    if what != "not mounted":
        bad.parent.mkdir()
    if what == "no file of ours":
        bad.symlink_to(good.path)
    if what == "only notes of others":
        File(bad).publish(*made(signer, 5, log=seen.log_id))
    uris = good.path.as_uri(), bad.as_uri()
    if what != "only notes of others":  # which it would then hold no more
        log.account("another")
        knowing = process(log, *uris)
        knowing.turn()  # it remembers: the anchor may come later
        knowing.close()
    memory.path_of(log.sealer().key_path).unlink()
    log.account("a-third")
    size = log.control.one("SELECT size FROM audit.log")
    with pytest.raises(AnchorsNotCompared, match=r"remembers nothing .*anchor 2 .*--accept-loss"):
        process(log, *uris).turn()
    assert log.control.one("SELECT size FROM audit.log") == size, "it sealed before it compared"
    told = process(log, *uris, loss="the mount is gone for good")
    told.turn()
    told.close()
    assert int(str(log.control.one("SELECT size FROM audit.log"))) > int(str(size))


def test_a_sealer_that_remembers_nothing_starts_where_all_anchors_agree(log, tmp_path):
    memory.path_of(log.sealer().key_path).unlink()
    one = process(log, (tmp_path / "log.anchor").as_uri())
    one.turn()
    one.close()
    assert memory.recall(memory.path_of(log.sealer().key_path)) is not None


def test_a_key_that_is_trusted_besides_counts(log, signer):
    _, seen = newest_note(log)
    held = made(signer, 10_000, log=seen.log_id)[0]
    with pytest.raises(LogWentBack):
        publisher(log, Lying(held=held), trusted=signer.public).compare()


def test_an_anchor_that_was_rolled_back_is_told_and_brought_up_to_date(log, caplog):
    good = Lying()
    sealer, made_ = run(log, good)
    first = looking(made_, lambda: good.held)
    log.account("another")
    sealer.step()
    looking(made_, lambda: published(log) == good.taken[-1] and len(good.taken) == 2)
    made_.stop()
    rolled = Lying(held=first)
    with caplog.at_level("ERROR"):
        sealer, made_ = run(log, rolled)
    assert [r.message for r in caplog.records] == ["anchor_went_back"]
    log.account("a-third")
    sealer.step()
    looking(made_, lambda: published(log) == rolled.taken[-1:][0] if rolled.taken else False)
    made_.stop()


def test_a_checkpoint_in_the_database_that_we_did_not_sign_is_never_published(log):
    good = Lying()
    _, made_ = run(log, good)
    log.control.act_plainly(
        "ALTER TABLE audit.checkpoint DISABLE TRIGGER ALL; "
        "UPDATE audit.checkpoint SET root = sha256('x')"
    )
    with pytest.raises(ConfigError, match="signed by none of our keys"):
        looking(made_, lambda: good.taken, 3)
    made_.stop()
    assert good.taken == []


def test_a_loss_is_learned_from_an_anchor_when_it_is_accepted(log):
    sealer = log.sealer()
    newest, seen = newest_note(log)
    lost = made(sealer.signer, newest.size + 5, log=seen.log_id)
    (sealer.key_path.with_name("signer.json.last")).unlink()
    sealer.accepted_loss = "restored"
    anchor = Lying(held=lost[0])
    publisher(log, anchor, sealer=sealer).compare()
    known = memory.recall(memory.path_of(sealer.key_path))
    assert known is not None
    assert (known.size, known.root) == (newest.size + 5, lost[1].root)
    sealer.step()
    body = json.loads(str(log.control.one(
        "SELECT body FROM audit.event WHERE action = 'audit.epoch_started'")))  # fmt: skip
    assert body["detail"]["lost_size"] == newest.size + 5
    fresh = log.sealer()
    publisher(log, anchor, sealer=fresh).compare()  # it still holds what is lost: explained
    larger = made(sealer.signer, newest.size + 6, log=seen.log_id)
    with pytest.raises(LogWentBack):  # but no more than that
        publisher(log, Lying(held=larger[0]), sealer=fresh).compare()


def test_an_epoch_that_nobody_signed_explains_nothing(log):
    sealer = log.sealer()
    newest, seen = newest_note(log)
    held = made(sealer.signer, newest.size + 5, log=seen.log_id)[0]
    forged = AuditEvent(
        AuditAction.AUDIT_EPOCH_STARTED, TargetKind.INSTANCE, audit.INSTANCE_ID,
        Principal("sealer", "me"),
        detail={"epoch": 2, "size": newest.size, "why": "x", "lost_size": 10_000,
                "lost_root": "00" * 32, "signature": "— x AAAA\n"},
    )  # fmt: skip
    with transaction(log.control.engine("sealer")) as tx:  # its login, without its key
        audit.append(tx, forged)
    log.control.act("UPDATE audit.log SET epoch = 2")
    log.control.act(
        "INSERT INTO audit.epoch (epoch, size, floor_seq, reason, lost_size, lost_root) "
        "VALUES (2, 1, 0, 'x', 10000, sha256(''))"
    )
    with pytest.raises(LogWentBack):
        publisher(log, Lying(held=held)).compare()
