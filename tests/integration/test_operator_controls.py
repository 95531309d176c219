"""Drain, pauses, explain, filters, retention, promotion, presence: what operators control."""

import json
import threading
from dataclasses import replace

import pytest

from scheduler import ticks
from schemas.limits import PROMOTE_AFTER
from schemas.runs import (
    Claim,
    Explanation,
    Outcome,
    OutcomeKind,
    Priority,
    Rule,
    RunKind,
    RunOptions,
    RunState,
)
from storage import (
    accounts,
    claims,
    connections,
    explain,
    instance,
    reap,
    resources,
    retention,
    runs,
)
from storage.engine import transaction
from tests.world import OPERATOR

pytestmark = pytest.mark.integration

STREAMS = {"public.t": "{mode: merge, key: [id], cursor: xmin}"}


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        "INSERT INTO t SELECT g, 'v' FROM generate_series(1, 25) g",
    )
    world.apply(STREAMS)
    world.deps.heartbeat.beat()
    ticks.presence_tick(world.scheduler)
    return world


def why(shop, run_id, runs_max: int = 1_000) -> Explanation:
    with shop.cli.inside() as (tx, _, _name):
        return explain.explain(tx, run_id, runs_max=runs_max)


def claimed(shop) -> Claim:
    shop.enqueue()
    (job,) = shop.dispatch()
    claim = shop.claim(job)
    assert isinstance(claim, Claim)
    return claim


def finish(shop, claim: Claim, outcome: Outcome) -> None:
    with transaction(shop.deps.engine) as tx:
        claims.finish(tx, claim, outcome, shop.deps.principal)


# ── pauses ──────────────────────────────────────────────────────────────────────────────────────


def test_a_drained_instance_starts_nothing_and_loses_nothing(shop, shell):
    asked = shop.enqueue()
    code, out, _ = shell("drain", "--reason", "new disks", "--timeout", "5s")
    assert (code, out.startswith("drained: nothing runs")) == (0, True)
    assert shop.dispatch() == []
    found = why(shop, asked.run_id)
    assert (found.rule, "new disks" in found.sentence) == (Rule.INSTANCE_PAUSED, True)
    assert shell("drain", "--end")[:2] == (0, "runs start again\n")
    assert shell("drain", "--end")[1] == "nothing to end: the instance was not drained\n"
    shop.step()
    assert shop.run(asked.run_id).state is RunState.SUCCEEDED
    instance_events = [e for e in shop.events() if e.startswith("instance.")]
    assert instance_events == ["instance.paused", "instance.resumed"]


def test_drain_waits_for_what_runs_and_says_when_it_does_not_end(shop, shell):
    claim = claimed(shop)
    code, out, err = shell("drain", "--timeout", "1s")
    assert code == 1
    assert "1 runs are still busy" in out
    assert "1 runs are busy" in err
    ended = threading.Timer(1.0, finish, (shop, claim, Outcome(OutcomeKind.FAILED, "x", "x")))
    ended.start()
    assert json.loads(shell("drain", "--json")[1]) == {"drained": True, "busy": 0}
    ended.join()


def test_a_paused_account_starts_nothing_others_go_on(shop, shell):
    asked = shop.enqueue()
    assert shell("account", "pause", "acme", "--reason", "unpaid")[0] == 0
    assert shell("account", "pause", "acme")[1] == "account acme was paused already\n"
    assert "paused" in shell("account", "list")[1]
    assert shop.dispatch() == []
    assert why(shop, asked.run_id).rule is Rule.ACCOUNT_PAUSED
    assert shell("account", "resume", "acme")[0] == 0
    shop.step()
    assert shop.run(asked.run_id).state is RunState.SUCCEEDED
    assert shop.control.all("SELECT state, state_reason FROM accounts") == [("active", None)]


# ── explain ─────────────────────────────────────────────────────────────────────────────────────


def test_explain_names_every_rule(shop):
    asked = shop.enqueue()
    assert why(shop, asked.run_id).rule is Rule.TURN
    steps = [
        (Rule.NO_WORKER, "DELETE FROM workers"),
        (Rule.REDIS_DOWN, "UPDATE schedulers SET queue_down_since = now() - interval '1 hour'"),
        (Rule.NOT_BEFORE, "UPDATE active_runs SET not_before = now() + interval '90 s'"),
        (Rule.NO_SCHEDULER, "UPDATE schedulers SET seen_at = now() - interval '1 minute'"),
        (Rule.CONNECTION_PAUSED, "UPDATE schedules SET state = 'paused', state_reason = 'x'"),
        (Rule.ACCOUNT_PAUSED, "UPDATE account_queues SET paused = true"),
        (Rule.INSTANCE_PAUSED, "UPDATE instance SET state = 'paused'"),
    ]
    for rule, change in steps:  # each stands before those that hold already
        shop.control.act(change)
        assert why(shop, asked.run_id).rule is rule


def test_explain_follows_a_run_to_its_end(shop):
    asked = shop.enqueue()
    (job,) = shop.dispatch()
    assert why(shop, asked.run_id).rule is Rule.JOB_SENT
    claim = shop.claim(job)
    assert isinstance(claim, Claim)
    assert why(shop, asked.run_id).sentence == "worker w1 executes attempt 1"
    after = shop.enqueue()
    assert why(shop, after.run_id).rule is Rule.AFTER_CURRENT
    finish(shop, claim, Outcome(OutcomeKind.AWAITING_APPROVAL, "guard", "zero rows"))
    assert why(shop, asked.run_id).rule is Rule.AWAITING_APPROVAL
    with shop.cli.inside() as (tx, _, _name):
        runs.reject(tx, asked.run_id, OPERATOR)
    assert why(shop, asked.run_id).rule is Rule.ENDED


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        (Rule.GLOBAL_CAP, "SELECT 1"),
        (Rule.ACCOUNT_CAP, "UPDATE account_queues SET runs_max = 1"),
        (Rule.RESOURCE_CAP, "UPDATE resource_queues SET runs_max = 1"),
    ],
)
def test_explain_names_the_cap_that_is_full_and_when_it_may_start(shop, rule, change):
    first = claimed(shop)
    finish(shop, first, Outcome(OutcomeKind.FAILED, "x", "x"))  # runs take this long lately
    claimed(shop)
    second = another_connection(shop)
    shop.control.act(change)
    found = why(shop, second, runs_max=1 if rule is Rule.GLOBAL_CAP else 1_000)
    assert found.rule is rule
    assert found.expected_start is not None


def another_connection(shop):
    """A second connection over the same resources, with a run that waits."""
    with shop.cli.inside() as (tx, account, _name):
        found = connections.get(tx, "shop-to-lake")
        connections.create(
            tx,
            account,
            found.spec.model_copy(update={"name": "second"}),
            source=resources.get(tx, "shop"),
            destination=resources.get(tx, "lake"),
            next_due_at=None,
            principal=OPERATOR,
        )
        subject = connections.subject(connections.get(tx, "second"))
        return runs.enqueue(tx, subject, RunKind.SYNC, RunOptions(), OPERATOR).run_id


def test_explain_counts_those_that_go_first_by_weight(shop):
    ours = shop.enqueue().run_id
    with shop.cli.transaction() as tx:
        other = accounts.create(tx, "big", company="", plan="unlimited", principal=OPERATOR)
    shop.control.act(
        "INSERT INTO active_runs (subject_id, run_id, account_id, kind, state, trigger, "
        "scheduled_for, priority) SELECT gen_random_uuid(), gen_random_uuid(), :account, 'sync', "
        "'queued', 'schedule', now(), 5 FROM generate_series(1, 50)",
        account=other.account_id,
    )
    assert why(shop, ours).ahead == 1  # fifty wait elsewhere, but turns alternate
    shop.control.act("UPDATE account_queues SET weight = 4 WHERE account_id = :id",
                     id=other.account_id)  # fmt: skip
    assert why(shop, ours).ahead == 4


def test_explain_on_the_command_line(shop, shell):
    asked = shop.enqueue()
    code, out, _ = shell("run", "explain", "shop-to-lake")
    assert (code, "rule        turn" in out) == (0, True)
    assert json.loads(shell("run", "explain", str(asked.run_id), "--json")[1])["rule"] == "turn"
    missing = "018f0000-0000-7000-8000-000000000000"
    assert shell("run", "explain", missing)[0] == 1


# ── filters, promotion, retention ───────────────────────────────────────────────────────────────


def test_run_list_filters(shop, shell):
    finish(shop, claimed(shop), Outcome(OutcomeKind.FAILED, "connection_refused", "no"))
    waiting = shop.enqueue()

    def listed(*words: str) -> list[str]:
        return [r["state"] for r in json.loads(shell("run", "list", "--json", *words)[1])]

    assert listed() == ["queued", "failed"]
    assert listed("--state", "queued", "--state", "failed") == ["queued", "failed"]
    assert listed("--error", "connection_refused") == ["failed"]
    assert listed("--kind", "test") == []
    shop.control.act("UPDATE active_runs SET queued_at = now() - interval '3 h'")
    assert listed("--since", "2h") == ["failed"]
    code, _, err = shell("run", "list", "--since", "yesterday")
    assert (code, "is not a duration" in err) == (2, True)
    assert str(waiting.run_id) in shell("run", "list", "shop-to-lake", "--state", "queued")[1]


def test_a_run_that_waits_long_is_promoted_once_per_period(shop):
    shop.enqueue()
    shop.control.act(
        "UPDATE active_runs SET priority = 5, not_before = now() - :w", w=2.5 * PROMOTE_AFTER
    )
    for _ in range(4):
        with transaction(shop.scheduler.engine) as tx:
            reap.promote(tx)
    assert shop.control.one("SELECT priority FROM active_runs") == 3
    shop.control.act("UPDATE active_runs SET not_before = now() - interval '10 days'")
    for _ in range(9):
        with transaction(shop.scheduler.engine) as tx:
            reap.promote(tx)
    assert shop.control.one("SELECT priority FROM active_runs") == Priority.INTERACTIVE + 1


def old_run(shop, age: str) -> None:
    shop.sync()
    shop.deps.logs.flush()
    shop.control.act(
        f"UPDATE runs SET finished_at = now() - interval '{age}' "
        "WHERE finished_at = (SELECT max(finished_at) FROM runs)"
    )


def test_retention_forgets_what_the_plan_no_longer_keeps(shop, shell):
    shop.control.act("UPDATE accounts SET plan = 'standard'")
    old_run(shop, "29 days")
    old_run(shop, "31 days")
    code, out, _ = shell("retention", "--dry-run")
    assert (code, out.splitlines()[1].split()) == (0, ["acme", "30", "days", "1"])
    assert shell("retention")[1].startswith("removed 1 runs, ")
    counts = "SELECT (SELECT count(*) FROM runs), (SELECT count(*) FROM run_streams), "
    counts += "(SELECT count(DISTINCT run_id) FROM run_logs)"
    assert shop.control.all(counts) == [(1, 1, 1)]
    assert "retention.applied" in shop.events()
    assert ticks.retention_tick(shop.scheduler) == 0  # nothing is left to do


def test_retention_drops_months_that_no_plan_keeps_and_refuses_young_ones(shop):
    shop.control.act(
        "CREATE TABLE run_logs_202401 PARTITION OF run_logs "
        "FOR VALUES FROM ('2024-01-01') TO ('2024-02-01')"
    )
    shop.control.act("ALTER TABLE run_logs_202401 OWNER TO syncward_owner")
    with transaction(shop.scheduler.engine) as tx:
        assert retention.drop_months(tx, shop.scheduler.principal) == ["run_logs_202401"]
    assert "partitions.dropped" in shop.events()
    with (
        shop.scheduler.engine.connect() as tx,
        pytest.raises(Exception, match="at least one month"),
    ):
        tx.exec_driver_sql("SELECT drop_partitions(now(), now())").all()
    with shop.scheduler.engine.connect() as tx, pytest.raises(Exception, match="at least one day"):
        tx.exec_driver_sql("SELECT * FROM expire_runs(gen_random_uuid(), now(), 1)").all()


# ── presence ────────────────────────────────────────────────────────────────────────────────────


def families(scheduler: ticks.Scheduler) -> set[str]:
    scheduler.cluster.wait()
    return {family.name for family in scheduler.cluster.collect()}


def test_one_scheduler_exports_the_cluster_and_another_takes_over(shop):
    first = shop.scheduler
    second = replace(first, scheduler_id="second", cluster=type(first.cluster)())
    assert (ticks.presence_tick(first), ticks.presence_tick(second)) == (1, 0)
    assert ("syncward_queue_depth" in families(first), families(second)) == (True, set())
    shop.control.act(
        "UPDATE schedulers SET seen_at = now() - interval '1 min' WHERE scheduler_id = 'scheduler'"
    )
    assert ticks.presence_tick(second) == 1
    ticks.leave(second)
    assert ticks.presence_tick(first) == 1


def test_redis_is_down_only_if_no_scheduler_reaches_it(shop):
    with transaction(shop.scheduler.engine) as tx:
        instance.scheduler_seen(tx, "scheduler", "0", queue_alive=False)
        assert instance.schedulers(tx).queue_down_since is not None
        instance.scheduler_seen(tx, "other", "0", queue_alive=True)
        assert instance.schedulers(tx) == instance.Schedulers(2, None)
