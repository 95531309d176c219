"""T10: the KMS is away at each moment of a run, or answers wrong. Runs wait, nothing falls back.

The real file keyring stands behind a switch; everything else is built as workers/main.py does it.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from cli.apply import make_so
from cli.context import Cli
from crypto import keyring as keyrings
from crypto.cache import KeyCache
from crypto.errors import KmsUnavailable
from schemas.limits import ATTEMPTS_MAX
from schemas.runs import Run, RunKind, RunOptions, RunState
from storage import accounts, claims, connections, outputs, resources, runs
from storage.runs import Subject
from tests.world import OPERATOR, World
from workers import records as recording
from workers.records import RecordSealer, write_sealed
from workers.run_log import LogWriter

pytestmark = pytest.mark.integration

STREAMS = {"public.t": "{mode: append, cursor: xmin}", "public.u": "{mode: replace}"}


class SwitchedKms:
    """A keyring that asks the real one, unless it is switched to be away or to answer wrong."""

    def __init__(self, real) -> None:
        self._real = real
        self.away = False
        self.wrong = False
        self.asked = 0

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    def _ask(self) -> None:
        self.asked += 1
        if self.away:
            raise KmsUnavailable("KMS https://kms.test: not reachable; start it")

    def wrap(self, purpose, dek, context):
        self._ask()
        return self._real.wrap(purpose, dek, context)

    def wrap_many(self, purpose, items):
        self._ask()
        return self._real.wrap_many(purpose, items)

    def rewrap_many(self, items):
        self._ask()
        return self._real.rewrap_many(items)

    def unwrap_many(self, items):
        self._ask()
        found = self._real.unwrap_many(items)
        return [bytes(32) if isinstance(f, bytes) else f for f in found] if self.wrong else found


@pytest.fixture
def kms(world, monkeypatch):
    monkeypatch.setattr(recording, "ASK_AGAIN_S", 0.0)
    made = SwitchedKms(keyrings.load(str(world.directory / "keys" / "worker.json")))
    engine = world.deps.engine
    records = RecordSealer(engine, made, world.deps.keystore, world.deps.principal)
    world.deps = replace(
        world.deps,
        keyring=KeyCache(made),
        records=records,
        logs=LogWriter(lambda lines: write_sealed(engine, records, lines)),
    )
    for table in ("t", "u"):
        world.pair.source(
            f"CREATE TABLE {table} (id int PRIMARY KEY)",
            f"INSERT INTO {table} SELECT generate_series(1, 50)",
        )
    world.apply(STREAMS)
    return made


def waits(world: World, run: Run) -> None:
    """It is queued for the KMS, no attempt was counted, nothing stands in clear."""
    assert (run.state, run.error_code) == (RunState.QUEUED, "kms_unavailable")
    assert world.control.all("SELECT attempt, attempts_without_progress FROM active_runs") == [
        (0, 0)
    ]
    assert world.control.one("SELECT count(*) FROM leases") == 0
    nothing_in_clear(world)


def nothing_in_clear(world: World) -> None:
    assert world.control.one("SELECT count(*) FROM run_logs WHERE envelope IS NULL") == 0
    assert world.control.one("SELECT count(*) FROM run_logs WHERE message IS NOT NULL") == 0
    assert world.control.one("SELECT count(*) FROM run_outputs WHERE envelope IS NULL") == 0


def comes_again(world: World, kms: SwitchedKms, shell, run: Run, attempts: int = 2) -> str:
    """The KMS is back: the run succeeds as its first attempt; return its log, which is whole."""
    kms.away = False
    world.control.act("UPDATE active_runs SET not_before = now()")
    world.step()
    ended = world.run(run.run_id)
    assert (ended.state, ended.attempt) == (RunState.SUCCEEDED, 1), ended.error
    assert world.pair.same("t")
    assert world.pair.same("u")
    nothing_in_clear(world)
    code, out, err = shell("run", "logs", str(run.run_id), "-A", "acme")
    assert (code, err) == (0, "")
    assert out.count("attempt 1 begins") == attempts
    assert "succeeded after" in out.splitlines()[-1]
    times = [line.stored.at for line in world.lines(run.run_id)]
    assert times == sorted(times)
    assert "record.refused" not in world.events()
    return out


def asked(world: World) -> Run:
    run_id = world.enqueue().run_id
    world.step()
    return world.run(run_id)


def at_the_second_stream(monkeypatch, then: Callable[[], None]) -> list[str]:
    """Do something once, between the commits of the two streams of a run."""
    done: list[str] = []
    honest = claims.record_stream

    def hooked(tx, claim, result, position, principal):
        honest(tx, claim, result, position, principal)
        if not done:
            done.append(result.stream)
            then()

    monkeypatch.setattr(claims, "record_stream", hooked)
    return done


def evict(world: World, monkeypatch) -> None:
    """Let the worker forget the account's key, as it does for other accounts' at its limit."""
    with world.cli.transaction() as tx:
        other = accounts.create(tx, "other", company="", plan="unlimited", principal=OPERATOR)
    with monkeypatch.context() as inner:
        inner.setattr(recording, "ACCOUNTS_MAX", 1)
        world.deps.records.ready(other.account_id)


def test_away_before_the_attempt_the_run_waits_and_keeps_every_line(world, kms, shell):
    kms.away = True
    run = asked(world)
    waits(world, run)
    assert world.control.one("SELECT count(*) FROM run_logs") == 0, "no key, no line"
    assert "credential.refused" not in world.events()
    out = comes_again(world, kms, shell, run)
    assert "KMS https://kms.test: not reachable" in out


def test_away_when_credentials_are_to_be_opened_the_run_waits(world, kms, shell):
    (account,) = world.control.all("SELECT id FROM accounts")[0]
    world.deps.records.ready(account)
    kms.away = True
    run = asked(world)
    waits(world, run)
    out = world.log(run.run_id)
    assert "told to come back" in out, "its records key was there: the log is written at once"
    assert "rows extracted" not in out
    comes_again(world, kms, shell, run)


def test_away_in_mid_run_a_run_goes_on_with_the_keys_that_it_has(world, kms, shell, monkeypatch):
    hooked = at_the_second_stream(monkeypatch, lambda: setattr(kms, "away", True))
    run = asked(world)
    assert hooked == ["public.t"]
    assert run.state is RunState.SUCCEEDED
    before = kms.asked
    assert asked(world).state is RunState.SUCCEEDED, "so do the account's next ones, from memory"
    assert kms.asked == before
    comes_again(world, kms, shell, run, attempts=1)


def test_away_in_mid_run_a_run_that_needs_a_key_comes_again_and_reads_nothing_twice(
    world, kms, shell, monkeypatch
):
    def strike() -> None:
        evict(world, monkeypatch)
        kms.away = True

    hooked = at_the_second_stream(monkeypatch, strike)
    run = asked(world)
    assert hooked == ["public.t"]
    waits(world, run)
    out = comes_again(world, kms, shell, run)
    assert "public.t: already loaded by attempt 1" in out
    assert "public.u: already loaded by attempt 1" in out
    assert out.count("rows extracted") == 2


def test_away_at_the_end_a_document_is_not_stored_in_clear(world, kms, monkeypatch):
    honest = recording.RecordSealer.output

    def late(records, *arguments):
        evict(world, monkeypatch)
        kms.away = True
        return honest(records, *arguments)

    with world.cli.inside() as (tx, account, _name):
        found = resources.get(tx, "shop").resource_id
        subject = Subject(found, account.account_id, found)
        run_id = runs.enqueue(tx, subject, RunKind.DISCOVER, RunOptions(), OPERATOR).run_id
    with monkeypatch.context() as inner:
        inner.setattr(recording.RecordSealer, "output", late)
        world.step()
    waits(world, world.run(run_id))
    assert world.control.one("SELECT count(*) FROM run_outputs") == 0
    kms.away = False
    world.control.act("UPDATE active_runs SET not_before = now()")
    world.step()
    assert world.run(run_id).state is RunState.SUCCEEDED
    with world.cli.inside() as (tx, _, _name):
        assert outputs.stored(tx, run_id) is not None
    nothing_in_clear(world)


def test_away_for_longer_than_any_backoff_no_run_fails(world, kms, shell):
    kms.away = True
    run = asked(world)
    for _ in range(ATTEMPTS_MAX + 2):
        world.control.act("UPDATE active_runs SET not_before = now()")
        world.step()
        waits(world, world.run(run.run_id))
    comes_again(world, kms, shell, run, attempts=ATTEMPTS_MAX + 4)


def test_a_wrong_key_pauses_the_connection_and_leaves_one_event(world, kms, shell):
    kms.wrong = True
    run = asked(world)
    assert (run.state, run.error_code) == (RunState.FAILED, "unsealable")
    assert world.control.all("SELECT state, state_reason FROM schedules") == [
        ("paused", "unsealable")
    ]
    refused = "SELECT class, target_id FROM audit.event WHERE action = 'credential.refused'"
    assert world.control.all(refused) == [("A", run.run_id)]
    assert world.control.one("SELECT count(*) FROM run_streams") == 0
    nothing_in_clear(world)
    kms.wrong = False
    assert shell("connection", "resume", "acme/shop-to-lake")[0] == 0
    assert asked(world).state is RunState.SUCCEEDED, "the wrong key was not remembered"


def test_a_worker_goes_on_with_accounts_whose_keys_it_has(world, kms):
    path = world.document(STREAMS)
    path.write_text(path.read_text().replace("account: acme", "account: bert"))
    bert = Cli(account="bert")
    bert.__dict__.update(settings=world.cli.settings, engine=world.cli.engine)
    with bert.transaction() as tx:
        accounts.create(tx, "bert", company="", plan="unlimited", principal=OPERATOR)
    make_so(bert, path, write=True)
    assert asked(world).state is RunState.SUCCEEDED
    kms.away = True
    with bert.inside() as (tx, _, _name):
        subject = connections.subject(connections.get(tx, "shop-to-lake"))
        his = runs.enqueue(tx, subject, RunKind.SYNC, RunOptions(), OPERATOR)
    mine = world.enqueue()
    world.step()
    assert world.run(mine.run_id).state is RunState.SUCCEEDED
    assert "succeeded after" in world.log(mine.run_id), "another's lines that wait block nobody"
    with bert.inside() as (tx, _, _name):
        assert runs.get(tx, his.run_id).error_code == "kms_unavailable"
