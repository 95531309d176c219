"""The sealer as a process: it takes over, is killed, changes keys, and stops where it must."""

import random
import time
import urllib.request

import pytest

from audit import statement
from audit.anchors.file import File
from audit.checkpoint import Checkpoint, notes_in
from crypto import signing
from storage import sealing
from storage.engine import transaction
from tests.collector import Collector
from tests.faults.test_processes import ports
from tests.protected import protect
from tests.sealers import (
    SealerProcess,
    busy,
    committed,
    events_of,
    settled,
    state,
    until,
)  # fmt: skip
from tests.tls_proxy import certificate

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

#: Of a lease and what a shared machine takes to look.
TAKEOVER_S = 10 + 5


@pytest.fixture
def place(world, tmp_path):
    """The file that is the only anchor."""
    directory = tmp_path / "elsewhere"
    directory.mkdir()
    world.account()
    return directory / "log.anchor"


def sealer(world, place, name="sealer", *words, **extra) -> SealerProcess:
    return SealerProcess(world, name, place.as_uri(), *words, **extra)


def notes(place) -> list[Checkpoint]:
    return [Checkpoint.parse(signing.parse_note(n)[0]) for n in notes_in(place.read_text())]


def doubled(world) -> int:
    query = "SELECT count(*) - count(DISTINCT seq) FROM audit.checkpoint, unnest(seqs) AS seq"
    return int(str(world.control.one(query)))


def test_it_seals_publishes_says_who_it_is_and_lets_go_when_asked(world, place):
    (port,) = ports(1)
    with sealer(world, place, SYNCWARD_METRICS_PORT=str(port)) as one:
        one.wait_for("sealer_started")
        until(lambda: settled(world), about="publishing")
        until(lambda: "syncward_audit_sealing 1.0" in metrics(port), about="metrics")
        shown = metrics(port)
        assert one.terminate() == 0
    assert events_of(world, "sealer.started")[0]["detail"]["keys"] == " ".join(
        key.line for key in signing.load(world.directory / "audit" / "signer.json").public
    )
    assert notes(place)[-1].size == state(world).size
    assert not state(world).held
    assert place.stat().st_mode & 0o777 == 0o640
    assert f"syncward_audit_log_size {float(state(world).size)}" in shown
    assert 'syncward_audit_anchor_failures_total{anchor="1"} 0.0' in shown
    sealed = next(
        ln for ln in shown.splitlines() if ln.startswith("syncward_audit_sealed_events_t")
    )
    assert float(sealed.split()[1]) == state(world).size


def metrics(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


@pytest.mark.parametrize("lease", ["cut short", pytest.param("in full", marks=pytest.mark.full)])
def test_two_of_them_one_seals_and_the_other_takes_over_from_one_that_is_killed(
    world, place, lease
):
    with sealer(world, place, "first") as first, sealer(world, place, "second") as second:
        first.wait_for("sealer_ready")
        second.wait_for("sealer_ready")
        until(lambda: first.said("sealer_started") or second.said("sealer_started"))
        holder, other = (first, second) if first.said("sealer_started") else (second, first)
        with busy(world):
            time.sleep(1)
            assert not other.said("sealer_started")
            holder.kill()
            killed = time.monotonic()
            if lease == "cut short":  # the rest of it is only waiting
                time.sleep(1)
                assert not other.said("sealer_started")
                world.control.act("UPDATE audit.log SET held_until = clock_timestamp()")
            other.wait_for("sealer_started", TAKEOVER_S)
            assert time.monotonic() - killed < TAKEOVER_S
        until(lambda: settled(world), about="sealing by the second")
        with sealer(world, place, "third") as third:
            third.wait_for("sealer_ready")
            assert other.terminate() == 0  # it lets go: nobody waits for its lease
            third.wait_for("sealer_started", 5)
    assert doubled(world) == 0


@pytest.mark.full
def test_a_quiet_log_stays_with_its_sealer(world, place):
    with sealer(world, place, "first") as first:
        first.wait_for("sealer_started")
        with sealer(world, place, "second") as second:
            second.wait_for("sealer_ready")
            time.sleep(25)
            assert not second.said("sealer_started")


@pytest.mark.parametrize("times", [2, pytest.param(12, marks=pytest.mark.full)])
def test_killed_at_random_moments_it_loses_nothing_and_doubles_nothing(world, place, times):
    chance = random.Random(times)
    with busy(world):
        for n in range(times):
            with sealer(world, place, f"killed-{n}") as one:
                one.wait_for("sealer_ready")
                time.sleep(chance.random() * 2)
                one.kill()
            # another must not wait for a dead one's lease in a fast test
            world.control.act("UPDATE audit.log SET held_until = '-infinity'")
    with sealer(world, place, "last") as one:
        one.wait_for("sealer_started")
        until(lambda: settled(world), about="sealing the rest")
    assert doubled(world) == 0
    found = notes(place)
    assert [n.size for n in found] == sorted(n.size for n in found)


def test_a_changed_key_is_taken_while_it_runs_and_both_sign_until_the_old_one_retires(
    world, place, shell, monkeypatch
):
    key = world.directory / "audit" / "signer.json"
    monkeypatch.setenv("SYNCWARD_AUDIT_SIGNING_KEY", str(key))
    with sealer(world, place) as one:
        one.wait_for("sealer_started")
        until(lambda: settled(world), about="publishing")
        old = signing.load(key).public[0]
        code, out, _ = shell("audit", "key", "rotate")
        assert code == 0
        new = signing.load(key).public[0]
        assert new.line in out
        code, _, err = shell("audit", "key", "retire")
        assert (code, "was published with both keys" in err) == (1, True)
        until(lambda: events_of(world, "signer.rotated"), about="the event")
        until(lambda: shell("audit", "key", "retire")[0] == 0, about="retiring")
        assert signing.load(key).public == (new,)
        one.wait_for("signing_key_reloaded")
        until(lambda: len(one.said("signing_key_reloaded")) == 2, about="the second reload")
        world.account("another")
        until(lambda: settled(world), about="publishing with the new key")
        time.sleep(0.3)
        one.terminate()
    (event,) = events_of(world, "signer.rotated")
    assert (event["detail"]["before"], event["detail"]["after"]) == (old.line, new.line)
    assert statement.is_signed(state(world).log_id, "signer.rotated", event["detail"], [old])
    signed = [signing.signed_by(*signing.parse_note(n), [old, new])
              for n in notes_in(place.read_text())]  # fmt: skip
    assert [signed[0], signed[-1]] == [[old], [new]]
    assert [new, old] in signed
    with transaction(world.control.engine("sealer")) as tx:
        newest = sealing.newest_checkpoint(tx)
    assert newest is not None
    assert newest.signatures.count("\n") == 1


def test_a_key_file_that_cannot_be_used_changes_nothing(world, place):
    key = world.directory / "audit" / "signer.json"
    with sealer(world, place) as one:
        one.wait_for("sealer_started")
        key.chmod(0o644)
        assert "others can read it" in one.wait_for("signing_key_not_reloaded")["reason"]
        world.account("another")
        until(lambda: settled(world), about="sealing all the same")
        key.chmod(0o600)


BACK = (
    "ALTER TABLE audit.checkpoint DISABLE TRIGGER ALL; DELETE FROM audit.checkpoint; "
    "DELETE FROM audit.tile; "
    "UPDATE audit.log SET size = 0, last_xid = '0', last_seq = 0, published_size = 0, "
    "held_until = '-infinity'"
)


@pytest.mark.parametrize(
    ("forgotten", "who"),
    [
        ("signer.json.last", "anchor 1 (file) holds"),
        ("log.anchor", "were signed here"),
        pytest.param("", "anchor 1 (file) holds", marks=pytest.mark.full),
    ],
)
def test_a_database_that_went_back_ends_it_until_somebody_says_why(world, place, forgotten, who):
    with sealer(world, place) as one:
        one.wait_for("sealer_started")
        until(lambda: settled(world), about="publishing")
        one.terminate()
    lost = state(world).size
    world.control.act_plainly(BACK)
    for file in (world.directory / "audit" / "signer.json.last", place):
        if file.name == forgotten:  # what one of the two does not know, the other does
            file.unlink()
    with sealer(world, place, "again") as one:
        why = one.refused()
    assert f"{lost} events of log" in why
    assert who in why
    assert "--accept-loss" in why
    assert state(world).size == 0
    with sealer(world, place, "accepted", "--accept-loss", "restored by ada") as one:
        one.wait_for("sealer_started")
        until(lambda: settled(world), about="publishing after the loss")
        one.terminate()
    (event,) = events_of(world, "audit.epoch_started")
    assert event["detail"]["lost_size"] == lost
    assert event["detail"]["why"] == "restored: restored by ada"
    assert notes(place)[-1].epoch == 2
    with sealer(world, place, "after") as one:  # and needs it no more
        one.wait_for("sealer_started")
        assert one.terminate() == 0


def test_a_running_one_ends_when_the_database_goes_back_under_it(world, place):
    with sealer(world, place) as one:
        one.wait_for("sealer_started")
        until(lambda: settled(world), about="publishing")
        world.control.act_plainly(BACK)
        assert "were signed here" in one.refused()


def test_a_database_that_is_away_is_waited_for(world, place):
    with sealer(world, place) as one:
        one.wait_for("sealer_started")
        world.control.act("UPDATE audit.log SET one = one")
        world.control.all(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'syncward-control:sealer' AND datname = current_database()"
        )
        world.account("another")
        until(lambda: settled(world), about="going on")
        assert one.process.poll() is None


@pytest.mark.parametrize("reason", ["", "two\nlines", "x" * 201])
def test_a_loss_is_not_accepted_without_a_reason(world, place, reason):
    with sealer(world, place, "sealer", "--accept-loss", reason) as one:
        assert "--accept-loss: say in one line" in one.refused()


def test_all_reasons_against_a_start_are_told_at_once(world, tmp_path):
    key = world.directory / "audit" / "signer.json"
    signing.init(key)
    key.chmod(0o644)
    (tmp_path / "base" / "sub").mkdir(parents=True)
    (tmp_path / "base" / "PG_VERSION").write_text("18")
    with SealerProcess(
        world, "sealer", (tmp_path / "base" / "sub" / "log").as_uri(), "--accept-loss", "",
        SYNCWARD_PROFILE="production", SYNCWARD_METRICS_TOKEN_FILE=str(tmp_path / "none.token"),
        SYNCWARD_AUDIT_PUBLIC_KEY="/none/at/all",
    ) as one:  # fmt: skip
        why = one.refused()
    for part in (
        "SYNCWARD_DATABASE_URL: the link", "needs at least two anchors", "metrics token",
        "--accept-loss", "signing key", "public key /none/at/all",
        "anchor 1 is in the data directory of a database",
    ):  # fmt: skip
        assert part in why
    with SealerProcess(world, "typo", "ftp://x file://relative s3://b?region=r") as one:
        assert one.process.wait(30) == 78
    why = one.log.read_text()
    for part in (
        "anchor 1: an unknown kind", "anchor 2: write three slashes", "anchor 3: endpoint=",
    ):  # fmt: skip
        assert part in why


@pytest.mark.parametrize("waits", ["already", pytest.param("from now", marks=pytest.mark.full)])
def test_who_delays_sealing_is_named_and_counted(world, place, waits):
    with sealer(world, place) as one:
        one.wait_for("sealer_started")
        with world.control.admin_engine().connect() as connection:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            connection.exec_driver_sql("SELECT pg_current_xact_id()")
            world.account("another")
            if waits == "already":
                world.control.act_plainly(
                    "INSERT INTO audit.event (at, class, action, target_kind, target_id, body) "
                    "SELECT now() - interval '10 s', class, action, target_kind, target_id, body "
                    "FROM audit.event ORDER BY seq DESC LIMIT 1"
                )
            found = one.wait_for("sealing_delayed", 20)
            assert (found["pid"], found["database"]) == (pid, world.control.database)
            assert found["seconds"] >= 5
            connection.rollback()
        until(lambda: settled(world), about="going on")
    assert committed(world) > 0


@pytest.mark.full
def test_an_anchor_in_a_torn_state_is_started_on_a_new_line(world, place):
    with sealer(world, place) as one:
        one.wait_for("sealer_started")
        until(lambda: settled(world), about="publishing")
        one.kill()
    place.write_bytes(place.read_bytes() + place.read_bytes()[:40])
    world.control.act("UPDATE audit.log SET held_until = '-infinity'")
    with sealer(world, place, "again") as one:
        one.wait_for("sealer_started")
        until(lambda: settled(world), about="publishing")
    newest = next(File(place).notes())[-1]
    assert Checkpoint.parse(signing.parse_note(newest)[0]).size == state(world).size


def test_in_production_it_needs_tls_a_login_of_its_own_and_two_anchors(world, tmp_path, admin):
    files = certificate(tmp_path, "localhost", stem="collector")
    file = tmp_path / "elsewhere" / "log.anchor"
    file.parent.mkdir()
    with protect(world, tmp_path, admin) as production, Collector(files) as collector:
        anchors = f"{file.as_uri()} syslog+tls://localhost:{collector.port}?ca={files[0]}"

        def start(login: str, name: str) -> SealerProcess:
            url = str(production.of(login)["database_url"])
            return SealerProcess(
                world, name, anchors, SYNCWARD_PROFILE="production", SYNCWARD_DATABASE_URL=url
            )

        with start("reads", "shared") as one:
            assert "is shared: it is also a member of syncward_auditor" in one.refused()
        with start("su", "superuser") as one:
            assert "is a superuser" in one.refused()
        with start("seals", "right") as one:
            one.wait_for("sealer_started")
            until(lambda: settled(world), about="publishing")
            assert one.terminate() == 0
        held = [Checkpoint.parse(signing.parse_note(n)[0]) for m in collector.messages
                for n in notes_in(m)]  # fmt: skip
        assert held[-1] == notes(file)[-1]
        assert held[-1].size == state(world).size
