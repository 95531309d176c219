"""`syncward doctor`: says what is wrong on real servers, and nothing when nothing is."""

import json
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import redis

from cli.checks import AREAS
from embedded.valkey import Server
from scheduler import ticks
from schemas.health import DatabaseHealth, OldTransaction, QueueHealth, ScheduleHealth
from storage import instance, sealing
from storage.engine import transaction
from workers.enqueue import JobQueue, open_client

pytestmark = pytest.mark.integration


@pytest.fixture
def sound(world, monkeypatch):
    """An installation in which somebody is home."""
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": "{mode: replace}"})
    world.deps.heartbeat.beat()
    ticks.presence_tick(world.scheduler)
    sealer = world.sealer()
    while sealer.step() is not None:
        pass
    with transaction(sealer.engine) as tx:
        sealing.published(tx, sealing.state(tx).size)
    public = world.directory / "signer.pub"
    public.write_text(f"{sealer.signer.public[0].line}\n")
    monkeypatch.setenv("SYNCWARD_AUDIT_PUBLIC_KEY", str(public))
    return world


@pytest.fixture
def own_redis(tmp_path, monkeypatch, shell):  # noqa: ARG001 - its URL goes over the shell's
    """A Redis that a test may spoil, in the place of the shared one."""
    with Server(tmp_path / "vk", durable=True, guard_parent=True) as server:
        monkeypatch.setenv("SYNCWARD_REDIS_URL", server.url)
        yield server


def wrong(shell, *areas: str) -> dict[str, str]:
    code, out, _ = shell("doctor", *areas, "--json")
    answer = json.loads(out)
    found = {f"{c['area']}.{c['name']}": c["wrong"] for c in answer["checks"] if c["wrong"]}
    assert (code, answer["ok"]) == ((1, False) if found else (0, True))
    return found


@pytest.mark.usefixtures("sound", "own_redis")
def test_nothing_is_wrong_with_a_sound_installation(shell):
    assert wrong(shell) == {}
    code, out, _ = shell("doctor")
    assert (code, out.splitlines()[-1].endswith("nothing is wrong")) == (0, True)
    assert out.count("ok     ") == sum(1 + len(area.checks) for area in AREAS.values())


def test_the_control_database_is_asked_in_earnest(sound, shell):
    control = sound.control
    assert wrong(shell, "db") == {}
    control.act("DROP TABLE slots_" + str(control.one("SELECT to_char(now(), 'YYYYMM')")))
    control.act(
        "INSERT INTO slots (connection_id, scheduled_for, outcome) "
        "VALUES (gen_random_uuid(), now() - interval '9 years', 'queued')"
    )
    control.act("UPDATE alembic_version SET version_num = '0001'")
    found = wrong(shell, "db")
    assert set(found) == {"db.migrated", "db.partitions", "db.default_partitions"}
    assert "revision 0001" in found["db.migrated"]
    assert "slots_default" in found["db.default_partitions"]


def test_the_audit_log_is_asked_in_earnest(sound, shell, monkeypatch):
    assert wrong(shell, "audit") == {}
    sound.account("another")
    control = sound.control
    part = control.one("SELECT max(tableoid::regclass::text) FROM audit.event")
    control.act(f"ALTER TABLE {part} DISABLE TRIGGER no_change")
    control.act("UPDATE audit.event SET at = at - interval '1 min'")
    control.act("UPDATE audit.log SET held_until = now() - interval '1 s'")
    control.act("ALTER TABLE audit.checkpoint ENABLE TRIGGER no_truncate")
    monkeypatch.delenv("SYNCWARD_AUDIT_PUBLIC_KEY")
    found = wrong(shell, "audit")
    assert set(found) == {
        "audit.sealer", "audit.seal_lag", "audit.triggers", "audit.public_key",
    }  # fmt: skip
    assert "no sealer is alive; sealer-1 was" in found["audit.sealer"]
    assert "an event has waited 6" in found["audit.seal_lag"]
    assert "no_truncate of audit.checkpoint is not ENABLE ALWAYS" in found["audit.triggers"]
    assert f"no_change of {part} is disabled" in found["audit.triggers"]


def test_what_no_anchor_has_accepted_for_long_is_found(sound, shell):
    sound.control.act("UPDATE audit.log SET published_size = 1")
    sound.control.act_plainly(
        "ALTER TABLE audit.checkpoint DISABLE TRIGGER no_change; "
        "UPDATE audit.checkpoint SET signed_at = signed_at - interval '2 min'; "
        "ALTER TABLE audit.checkpoint ENABLE ALWAYS TRIGGER no_change"
    )
    assert set(wrong(shell, "audit")) == {"audit.publish_lag"}


def test_rows_of_a_default_partition_move_as_the_page_says(sound, shell):
    page = Path("docs/operations.md").read_text(encoding="utf-8")
    script = page.split("```sql\n")[1].split("```")[0]
    sound.sync()
    sound.control.act("UPDATE runs SET finished_at = '2024-01-15'")
    assert "runs_default" in wrong(shell, "db")["db.default_partitions"]
    with psycopg.connect(sound.control.admin_url, autocommit=True) as dba:
        dba.execute(script)
    assert wrong(shell, "db") == {}
    assert sound.control.one("SELECT count(*) FROM runs_202401") == 1


def test_a_control_database_that_is_away_is_the_finding(shell, monkeypatch, sound):
    url = sound.cli.settings.database_url.get_secret_value()
    monkeypatch.setenv("SYNCWARD_DATABASE_URL", url.replace(f":{sound.control.cluster.port}", ":1"))
    found = wrong(shell, "db", "schedule")
    assert set(found) == {"db.reachable", "schedule.reachable"}
    assert sound.control.password not in str(found)


@pytest.mark.usefixtures("sound")
def test_redis_is_asked_in_earnest(shell, own_redis):
    client = redis.Redis.from_url(own_redis.url)
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("appendonly", "no")
    client.set("sessions:1", "of somebody else")
    found = wrong(shell, "redis")
    assert set(found) == {"redis.memory_policy", "redis.append_only", "redis.dedicated"}
    assert "allkeys-lru" in found["redis.memory_policy"]
    client.close()
    text = shell("doctor", "redis")[1]
    assert "do   redis-cli CONFIG SET maxmemory-policy noeviction" in text


def test_keys_of_the_queue_are_not_foreign(sound, own_redis):
    queue = JobQueue(open_client(own_redis.url))
    sound.enqueue()
    for job in sound.dispatch():
        queue.send(job)
    assert queue.health().foreign_keys == 0
    queue.close()


@pytest.mark.usefixtures("sound")
def test_a_redis_that_is_away_refuses_or_is_not_set_says_which(shell, monkeypatch, own_redis):
    user, _, rest = own_redis.url.removeprefix("redis://").partition("@")
    monkeypatch.setenv("SYNCWARD_REDIS_URL", f"redis://{user.split(':')[0]}:wrong-word@{rest}")
    assert "refuses the login" in wrong(shell, "redis")["redis.reachable"]
    own_redis.stop()
    monkeypatch.setenv("SYNCWARD_REDIS_URL", own_redis.url)
    out = shell("doctor", "redis")[1]
    assert "cannot be reached" in out
    assert user.split(":")[1] not in out
    monkeypatch.delenv("SYNCWARD_REDIS_URL")
    assert "is not set" in wrong(shell, "redis")["redis.reachable"]


def test_a_lost_redis_is_said_by_doctor_as_by_explain_and_metric(sound, shell):
    with transaction(sound.scheduler.engine) as tx:
        instance.scheduler_seen(tx, "scheduler", "0", queue_alive=False)
    assert "no scheduler reaches Redis since" in wrong(shell, "schedule")["schedule.queue_up"]


def test_the_schedule_is_asked_in_earnest(sound, shell):
    sound.control.act("DELETE FROM workers")
    sound.control.act("DELETE FROM schedulers")
    sound.control.act("UPDATE instance SET state = 'paused', state_reason = 'new disks'")
    sound.control.act("UPDATE schedules SET state = 'paused', state_reason = 'credentials'")
    sound.enqueue()
    sound.control.act(
        "UPDATE active_runs SET deferred_for = interval '2 h', state = 'running', "
        "lease_token = gen_random_uuid()"
    )
    found = wrong(shell, "schedule")
    assert set(found) == {
        f"schedule.{name}"
        for name in (
            *("workers", "schedulers", "instance", "paused_connections"),
            *("deferred_runs", "invariants"),
        )
    }
    assert found["schedule.instance"] == "drained: new disks"
    assert found["schedule.paused_connections"] == "1 connections are paused: credentials 1"
    assert "running_without_lease 1" in found["schedule.invariants"]


@pytest.mark.usefixtures("sound")
def test_a_pause_that_an_operator_wanted_is_nothing_wrong(shell):
    shell("connection", "pause", "shop-to-lake")
    assert wrong(shell, "schedule") == {}


# ── what a test cannot bring about cheaply, by the facts alone ──────────────────────────────────

DATABASE = DatabaseHealth("1", "1", 0.001, 0.0, None, (), ())
REDIS = QueueHealth(maxmemory_policy="noeviction", append_only=True)
SCHEDULE = ScheduleHealth(None, 1, None, 1, 4, 0, 0.0, 0, 0, {}, {}, 0)


@pytest.mark.parametrize(
    ("area", "facts", "name"),
    [
        ("db", replace(DATABASE, latency_s=0.2), "latency"),
        ("db", replace(DATABASE, clock_offset_s=-90.0), "clock"),
        ("db", replace(DATABASE, oldest=OldTransaction("session 7", 7200)), "old_transactions"),
        ("redis", replace(REDIS, latency_s=0.2), "latency"),
        ("redis", replace(REDIS, maxmemory_policy=None), "memory_policy"),
        ("schedule", replace(SCHEDULE, workers=2, slots=0, draining=2), "workers"),
        ("schedule", replace(SCHEDULE, late_s=100.0), "lateness"),
        ("schedule", replace(SCHEDULE, stuck=1), "stuck_runs"),
        ("schedule", replace(SCHEDULE, dead_rows=10**6), "dead_rows"),
    ],
)
def test_facts_that_are_wrong_are_found(area, facts, name):
    found = [check.name for check in AREAS[area].checks if check.wrong(facts)]
    assert found == [name]
