"""With which key a worker seals records: one per account and month, made once."""

import threading
import time
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID, uuid4

import psycopg
import pytest

from crypto import keyring as keyrings
from crypto.envelope import take_apart
from crypto.errors import KmsDenied, KmsUnavailable
from schemas.errors import TransientError
from schemas.runs import RunState
from storage import accounts
from storage.logs import LogLine
from tests.world import OPERATOR
from workers import records as recording
from workers.records import RecordSealer

pytestmark = pytest.mark.integration

MAY = datetime(2026, 5, 31, 23, 59, 59, 999_999, tzinfo=UTC)
JUNE = datetime(2026, 6, 1, tzinfo=UTC)


class Kms:
    """The real keyring; a test says what its next answers cost."""

    def __init__(self, real) -> None:
        self._real = real
        self.calls: list[UUID] = []
        self.errors: dict[UUID, Exception] = {}
        self.takes_s = 0.0

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    def wrap(self, purpose, dek, context):
        if context.account_id.int:  # else it is the root's canary
            self.calls.append(context.account_id)
        time.sleep(self.takes_s)
        if context.account_id in self.errors:
            raise self.errors[context.account_id]
        return self._real.wrap(purpose, dek, context)


@pytest.fixture
def kms(world):
    return Kms(keyrings.load(str(world.directory / "keys" / "worker.json")))


@pytest.fixture
def sealer(world, kms):
    deps = world.deps
    return RecordSealer(deps.engine, kms, deps.keystore, deps.principal)


@pytest.fixture
def ids(world):
    with world.cli.transaction() as tx:
        return [
            accounts.create(
                tx, name, company="", plan="unlimited", principal=OPERATOR
            ).account_id
            for name in ("ada", "bob", "cyd")
        ]  # fmt: skip


def line(account_id: UUID, at: datetime = JUNE, text: str = "said") -> LogLine:
    return LogLine(uuid4(), account_id, at, "info", None, text)


def keys_of(world, account_id: UUID) -> list[str]:
    found = world.control.all(
        "SELECT to_char(month, 'YYYY-MM') FROM keystore.dek WHERE purpose = 'records' "
        "AND account_id = :id ORDER BY 1", id=account_id,
    )  # fmt: skip
    return [month for (month,) in found]


def test_a_line_belongs_to_the_month_of_its_own_time(world, sealer, ids):
    """However late it is sealed; and in UTC, whatever zone its time is written in."""
    west = JUNE.astimezone(timezone(timedelta(hours=-5)))
    assert west.month == 5
    sealed, left = sealer.lines(
        [line(ids[0], MAY), line(ids[0], JUNE), line(ids[0], west), line(ids[0], MAY)]
    )
    assert left == []
    deks = [take_apart(x.envelope).dek_id for x in sealed]
    assert deks[0] == deks[3] != deks[1] == deks[2]
    assert keys_of(world, ids[0]) == ["2026-05", "2026-06"]
    months = world.control.all(
        "SELECT body::jsonb -> 'detail' ->> 'month' FROM audit.event "
        "WHERE action = 'keys.created' ORDER BY seq"
    )
    assert months == [("2026-05",), ("2026-06",)]


def test_the_account_that_was_used_longest_ago_costs_one_key_more(
    world, sealer, kms, ids, monkeypatch
):
    monkeypatch.setattr(recording, "ACCOUNTS_MAX", 2)
    ada, bob, cyd = ids
    for account in (ada, bob, ada, cyd):  # bob goes: ada was used since
        assert sealer.lines([line(account)])[1] == []
    assert sealer.lines([line(ada), line(cyd)])[1] == []
    assert kms.calls == [ada, bob, cyd]
    assert sealer.lines([line(bob)])[1] == []
    assert kms.calls == [ada, bob, cyd, bob]
    assert len(keys_of(world, bob)) == 2


def test_eight_threads_that_need_a_key_at_once_make_one(world, sealer, kms, ids):
    kms.takes_s = 0.2
    at_once = threading.Barrier(8)
    answers: list[UUID] = []

    def seal() -> None:
        at_once.wait(20)
        (sealed,), _ = sealer.lines([line(ids[0])])
        answers.append(take_apart(sealed.envelope).dek_id)

    threads = [threading.Thread(target=seal) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 8
    assert len(set(answers)) == 1
    assert kms.calls == [ids[0]]
    assert keys_of(world, ids[0]) == ["2026-06"]


def test_a_kms_that_is_away_is_asked_once_for_all_accounts(sealer, kms, ids):
    kms.errors = {i: KmsUnavailable("KMS: away") for i in ids}
    _, left = sealer.lines([line(i) for i in ids for _ in range(5)])
    assert len(left) == 15
    assert kms.calls == [ids[0]]


def test_what_is_refused_to_one_account_is_not_refused_to_another(sealer, kms, ids):
    ada, bob, _ = ids
    kms.errors = {ada: KmsDenied("KMS: its policy does not let this worker wrap")}
    sealed, left = sealer.lines([line(ada), line(bob), line(ada), line(bob), line(ada)])
    assert {x.account_id for x in sealed} == {bob}
    assert [x.account_id for x in left] == [ada] * 3
    assert kms.calls == [ada, bob], "and the one is not asked for again at every line"
    with pytest.raises(KmsDenied):
        sealer.ready(ada)
    sealer.ready(bob)


def test_a_refusal_is_not_remembered_for_ever(sealer, kms, ids, monkeypatch):
    monkeypatch.setattr(recording, "ASK_AGAIN_S", 0.0)
    kms.errors = {ids[0]: KmsDenied("KMS: denied")}
    assert sealer.lines([line(ids[0])])[0] == []
    kms.errors = {}
    assert sealer.lines([line(ids[0])])[1] == []


def test_a_keystore_that_is_away_is_away_for_all_and_comes_back(
    apart, kms, ids, admin, monkeypatch
):
    world = apart
    sealer = RecordSealer(world.deps.engine, kms, world.deps.keystore, world.deps.principal)
    name = world.keystore_url.rsplit("/", 1)[1]
    shut(admin, name)
    with pytest.raises(TransientError) as first:
        sealer.ready(ids[0])
    with pytest.raises(TransientError) as second:
        sealer.ready(ids[1])
    assert second.value is first.value, "the second was told what the first one heard"
    assert kms.calls == [], "no key is wrapped that could not be stored"
    admin.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true")
    monkeypatch.setattr(recording, "ASK_AGAIN_S", 0.0)
    sealer.ready(ids[0])
    with psycopg.connect(world.keystore_url) as dba:
        found = dba.execute("SELECT account_id FROM keystore.dek WHERE purpose = 'records'")
        assert found.fetchall() == [(ids[0],)]
    assert world.control.one("SELECT count(*) FROM keystore.dek") == 0


def test_a_run_with_its_keystore_apart_is_read_with_keys_from_there(apart, shell, monkeypatch):
    world = apart
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": "{mode: replace}"})
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED
    assert world.control.one("SELECT count(*) FROM keystore.dek") == 0
    assert "succeeded after" in world.log(run.run_id)
    monkeypatch.setenv("SYNCWARD_KEYSTORE_URL", world.keystore_login)
    code, out, _ = shell("run", "logs", str(run.run_id), "-A", "acme")
    assert (code, "succeeded after" in out) == (0, True)
    monkeypatch.delenv("SYNCWARD_KEYSTORE_URL")
    code, out, _ = shell("run", "logs", str(run.run_id), "-A", "acme")
    assert (code, "its key was deleted" in out) == (1, True)


def shut(admin, name: str) -> None:
    admin.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")
    admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
    )
