"""Rotation interrupted, raced and abused: no key is mislabelled, lost or left behind."""

import json
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from cli import credentials, key_rotation
from cli.context import Cli
from crypto import keyring as keyrings
from crypto.canary import make_canary
from crypto.kms import file
from schemas.errors import ConfigError
from schemas.ids import new_id
from schemas.runs import RunState
from schemas.secret import Secret
from storage import keystore, resources, rewrap
from storage.engine import transaction
from storage.keystore import Keystore, RootOffer
from tests.security.test_providers import bao, mounted  # noqa: F401 - fixtures
from workers.records import RecordSealer

pytestmark = pytest.mark.integration


@pytest.fixture
def stored(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: merge, key: [id]}"})
    return world


def worker_file(world):
    return world.directory / "keys" / "worker.json"


def account(world):
    return world.control.one("SELECT id FROM accounts")


def has_roots(world) -> None:
    """The only worker reports every root that its file has."""
    world.deps.keyring.reload()
    roots = [one.root_id for one in world.deps.keyring.status()]
    world.control.act(
        "INSERT INTO workers (worker_id, version, slots, roots) VALUES ('w1', 'test', 8, :roots) "
        "ON CONFLICT (worker_id) DO UPDATE SET seen_at = clock_timestamp(), roots = :roots",
        roots=roots,
    )


def activated(world, purpose="credentials"):
    """Take a rotation to where a new root is active and nothing is wrapped by it yet."""
    own = file.path_of(world.cli.settings.keyring)
    root_id = file.add_root(own, worker_file(world), purpose)
    keyring = keyrings.load(world.cli.settings.keyring)
    root = key_rotation._make_known(world.cli, keyring, purpose, root_id)
    has_roots(world)
    with world.cli.transaction() as tx:
        keystore.activate(tx, tx, root, world.cli.principal)
    return root_id


def rotate(world, purpose, patience=20.0):
    return key_rotation.rotate(
        world.cli, purpose, key_rotation.Files(worker_file(world), None),
        patience=timedelta(seconds=patience),
    )  # fmt: skip


def records_that_open(world) -> list[bool]:
    keyring = keyrings.load(world.cli.settings.keyring)
    rows = world.control.all(
        "SELECT id, account_id, root_id, wrapped FROM keystore.dek WHERE purpose = 'records'"
    )
    found = keyring.unwrap_many(
        [
            (
                keyrings.Wrapped(root, bytes(wrapped)),
                keyrings.WrapContext(of_account, "records", dek_id),
            )
            for dek_id, of_account, root, wrapped in rows
        ]
    )
    return [isinstance(one, bytes) for one in found]


def under(world, root_id) -> int:
    return world.control.one("SELECT count(*) FROM keystore.dek WHERE root_id = :r", r=root_id)


# ── interrupted ──────────────────────────────────────────────────────────────────────────────


def test_a_rotation_of_records_that_died_after_its_commit_goes_on_without_mislabelling(stored):
    world = stored
    world.sync()
    fresh = activated(world, "records")  # and here the command died: its file says `next` still
    rotate(world, "records")
    assert records_that_open(world) == [True]
    assert under(world, fresh) == 1
    states = {one.root_id: one.state for one in keyrings.load(world.cli.settings.keyring).status()}
    assert states[fresh] == "active"


def test_another_operators_host_that_has_the_root_as_next_goes_on_with_it(stored, tmp_path):
    world = stored
    world.sync()
    fresh = activated(world, "records")
    other = tmp_path / "operator.json"
    other.touch(0o600)
    other.write_text(file.path_of(world.cli.settings.keyring).read_text())
    second = Cli(account="acme")
    settings = world.cli.settings.model_copy(update={"keyring": str(other)})
    second.__dict__.update(settings=settings, engine=world.cli.engine)
    key_rotation.rotate(
        second, "records", key_rotation.Files(None, None), patience=timedelta(seconds=5)
    )
    assert under(world, fresh) == 1
    assert records_that_open(world) == [True]


def test_a_host_that_never_got_the_root_rotates_nothing(stored, tmp_path):
    world = stored
    world.sync()
    own = file.path_of(world.cli.settings.keyring)
    old = tmp_path / "old.json"
    old.touch(0o600)
    old.write_text(own.read_text())
    activated(world, "records")
    stale = Cli(account="acme")
    settings = world.cli.settings.model_copy(update={"keyring": str(old)})
    stale.__dict__.update(settings=settings, engine=world.cli.engine)
    with pytest.raises(ConfigError, match="keyring does not have it"):
        key_rotation.rotate(
            stale, "records", key_rotation.Files(None, None), patience=timedelta(seconds=0)
        )
    assert records_that_open(world) == [True]


def test_a_worker_that_dies_on_the_last_batch_leaves_nothing_behind(stored):
    world = stored
    former = world.control.one(
        "SELECT id FROM keystore.root WHERE purpose = 'credentials' AND state = 'active'"
    )
    fresh = activated(world)
    with world.deps.engine.connect() as dying:
        dying.begin()
        (replaced,) = [one for one in keystore.roots(dying) if one.root_id == former]
        assert len(rewrap.stale(dying, replaced, but=set())) == 2
        world.key_upkeep().look()  # another worker finds the rows locked
        unused = "SELECT unused_since FROM keystore.root WHERE id = :id"
        assert world.control.one(unused, id=former) is None
        dying.rollback()
    world.key_upkeep().look()
    assert (under(world, former), under(world, fresh)) == (0, 2)
    assert world.control.one(unused, id=former) is not None


def test_a_root_that_is_replaced_in_the_middle_of_a_rewrap_ends_the_round(stored, monkeypatch):
    world = stored
    activated(world)
    honest = rewrap.stale

    def overtaken(keys, *arguments, **options):
        if not world.control.one("SELECT count(*) FROM keystore.root WHERE state = 'next'"):
            monkeypatch.setattr(rewrap, "stale", honest)
            activated(world)
        return honest(keys, *arguments, **options)

    monkeypatch.setattr(rewrap, "stale", overtaken)
    upkeep = world.key_upkeep()
    thread = threading.Thread(target=upkeep.look, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it goes round and round"
    events = world.control.all("SELECT body FROM audit.event WHERE action = 'keys.rewrapped'")
    assert [body for (body,) in events if json.loads(body)["detail"]["keys"] == 0] == []
    upkeep.look()
    active = world.control.one(
        "SELECT id FROM keystore.root WHERE purpose = 'credentials' AND state = 'active'"
    )
    assert under(world, active) == 2


def test_keys_that_do_not_open_do_not_hold_up_the_others(stored, monkeypatch):
    world = stored
    monkeypatch.setattr("storage.rewrap.BATCH", 1)
    former = world.control.one(
        "SELECT id FROM keystore.root WHERE purpose = 'credentials' AND state = 'active'"
    )
    world.control.act(
        "UPDATE keystore.dek SET wrapped = '\\x00' "
        "WHERE id = (SELECT min(id::text)::uuid FROM keystore.dek)"
    )
    fresh = activated(world)
    world.key_upkeep().look()
    assert (under(world, former), under(world, fresh)) == (1, 1)


def test_a_key_whose_credential_is_on_its_way_is_not_called_unused(apart, monkeypatch):
    """A separate keystore commits first; meanwhile all keys are replaced and a worker looks."""
    world = apart
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: merge, key: [id]}"})
    honest, fired = Keystore.beside, list[int]()

    @contextmanager
    def slow(self, tx):
        with honest(self, tx) as keys:
            yield keys
        if self is world.cli.keystore and not fired:
            fired.append(1)
            with self.transaction() as others, world.cli.transaction() as more:
                keystore.replace(more, others, None, world.cli.principal)
            world.key_upkeep().look()

    monkeypatch.setattr(Keystore, "beside", slow)
    with world.cli.inside() as (tx, found, _):
        credentials.store(
            world.cli, tx, found, keyrings.load(world.cli.settings.keyring),
            resource_id=resources.get(tx, "shop").resource_id, field="password", version=2,
            secret=Secret(world.pair.secret("source")["password"]),
        )  # fmt: skip
    assert fired
    in_use_survive(world)


def test_a_key_of_a_restored_control_database_is_not_forgotten(stored):
    world = stored
    sealed = world.control.all("SELECT resource_id, envelope FROM credentials")
    key_rotation.replace(world.cli, everybody=False, wait=False)
    world.key_upkeep().look()
    for resource_id, envelope in sealed:  # the control database of before comes back
        world.control.act(
            "UPDATE credentials SET envelope = :e WHERE resource_id = :r",
            e=envelope, r=resource_id,
        )  # fmt: skip
    world.control.act(
        "UPDATE keystore.dek SET unused_since = now() - interval '60 days' "
        "WHERE unused_since IS NOT NULL"
    )
    world.key_upkeep().look()
    world.key_upkeep().look()
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED, run.error


def in_use_survive(world) -> None:
    with psycopg.connect(world.keystore_url, autocommit=True) as dba:
        dba.execute(
            "UPDATE keystore.dek SET unused_since = now() - interval '60 days', "
            "created_at = created_at - interval '60 days' WHERE unused_since IS NOT NULL"
        )
    for _ in range(2):
        world.key_upkeep().look()
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED, run.error


# ── restarted and retired ────────────────────────────────────────────────────────────────────


def sealer(world, keyring) -> RecordSealer:
    deps = world.deps
    return RecordSealer(deps.engine, keyring, deps.keystore, deps.principal)


def test_a_restarted_worker_wraps_by_the_active_root_from_its_first_key_on(stored):
    world = stored
    world.sync()
    fresh = activated(world, "records")
    sealer(world, keyrings.load(str(worker_file(world)))).ready(account(world))
    assert under(world, fresh) == 1


def test_after_a_root_is_retired_restarted_workers_go_on_and_their_files_can_drop_it(stored):
    world = stored
    world.sync()
    former = world.control.one(
        "SELECT id FROM keystore.root WHERE purpose = 'records' AND state = 'active'"
    )
    fresh = activated(world, "records")
    rotate(world, "records")
    with world.cli.transaction() as tx:
        (root,) = [one for one in keystore.roots(tx) if one.root_id == former]
        assert keystore.retire(tx, tx, root, world.cli.principal)
    sealer(world, keyrings.load(str(worker_file(world)))).ready(account(world))
    file.drop_root(worker_file(world), former)
    left = {one.root_id: one.state for one in keyrings.load(str(worker_file(world))).status()}
    assert former not in left
    assert left[fresh] == "active"


def test_a_root_whose_update_file_was_lost_is_given_up_and_the_next_rotation_makes_another(
    stored, shell
):
    world = stored
    has_roots(world)
    own = file.path_of(world.cli.settings.keyring)
    lost = file.carry(own, world.directory / "update.json", "credentials")
    key_rotation._make_known(
        world.cli, keyrings.load(world.cli.settings.keyring), "credentials", lost
    )
    code, _, said = shell("keys", "rotate", "credentials", "--timeout", "0")
    assert (code, "1 workers do not have it yet" in said) == (1, True)
    assert shell("keys", "retire", str(lost))[0] == 0
    fresh = activated(world)
    world.key_upkeep().look()
    assert (lost != fresh, under(world, fresh)) == (True, 2)


@pytest.mark.parametrize("state", ["active", "retired"])
def test_a_root_in_use_and_one_that_is_retired_are_not_retired(stored, shell, state):
    world = stored
    (root,) = world.control.all("SELECT id FROM keystore.root WHERE purpose = 'credentials'")[0]
    world.control.act("UPDATE keystore.root SET state = :s WHERE id = :r", s=state, r=root)
    code, _, said = shell("keys", "retire", str(root), "--force")
    assert (code, f"is {state}; only" in said) == (1, True)


def test_retiring_one_version_at_a_kms_leaves_a_younger_replaced_one_able_to_open(
    stored,
    mounted,  # noqa: F811 - a fixture
):
    world = stored
    world.control.act("DELETE FROM keystore.dek WHERE purpose = 'records'")
    world.control.act("DELETE FROM keystore.root WHERE purpose = 'records'")
    admin, worker = mounted.open("admin"), mounted.open("worker")
    sealer(world, worker).ready(account(world))
    operator = Cli(account="acme")
    settings = world.cli.settings.model_copy(update={"keyring": mounted.uri("admin")})
    operator.__dict__.update(settings=settings, engine=world.cli.engine)
    versions = [world.control.one("SELECT id FROM keystore.root WHERE purpose = 'records'")]
    for _ in range(2):
        fresh = key_rotation._new_version(operator, admin, "records")
        with operator.transaction() as tx:
            keystore.activate(tx, tx, fresh, operator.principal)
        versions.append(fresh.root_id)
    world.control.act("UPDATE keystore.root SET state = 'retired' WHERE id = :r", r=versions[0])
    with operator.transaction() as tx:
        (first,) = [one for one in keystore.roots(tx) if one.root_id == versions[0]]
    key_rotation.drop_here(operator, first)
    reader = mounted.open("operator")
    reader.reload()
    assert [reader.holds(root) for root in versions] == [False, True, True]


def test_a_version_that_somebody_else_makes_at_the_kms_stops_nothing(stored, mounted):  # noqa: F811 - a fixture
    world = stored
    worker = mounted.open("worker")
    ready = sealer(world, worker)
    ready.ready(account(world))
    first = world.control.one("SELECT root_id FROM keystore.dek WHERE purpose = 'records'")
    mounted.open("admin").rotate("records")
    worker.reload()
    sealer(world, worker).ready(account(world))
    assert under(world, first) == 2


# ── what a login may do by SQL ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("role", ["worker", "operator"])
@pytest.mark.parametrize("statement", [
    "UPDATE keystore.root SET canary = 'x'",
    "UPDATE keystore.root SET state = 'retired'",
    "INSERT INTO keystore.root SELECT gen_random_uuid(), 'records', 'file', 'next', 'x'",
    "SELECT wrapped FROM keystore.dek",
    "UPDATE keystore.dek SET wrapped = 'x'",
])  # fmt: skip
def test_no_process_changes_the_keystore_past_its_functions(stored, role, statement):
    engine = stored.control.engine(role)
    with pytest.raises(DBAPIError, match="permission denied"), engine.begin() as tx:
        tx.execute(text(statement))


@pytest.mark.parametrize("call", [
    "keystore.activate_root(gen_random_uuid())", "keystore.retire_root(gen_random_uuid())",
    "keystore.shred_account(gen_random_uuid())", "keystore.records_keys('{}')",
    "keystore.shred_keys(gen_random_uuid(), '{}')", "keystore.replace_keys(NULL)",
])  # fmt: skip
def test_a_worker_neither_shreds_nor_turns_roots_nor_reads_records_keys(stored, call):
    engine = stored.control.engine("worker")
    with pytest.raises(DBAPIError, match="permission denied"), engine.begin() as tx:
        tx.execute(text(f"SELECT {call}"))


@pytest.mark.parametrize("call", [
    "keystore.credential_keys('{}')", "keystore.stale_credential_keys('{}', '{}', 1)",
    "credentials_of_keys('{}', 'x')", "sealed_credentials(gen_random_uuid(), gen_random_uuid())",
])  # fmt: skip
def test_an_operator_gets_neither_wrapped_keys_nor_envelopes_of_credentials(stored, call):
    engine = stored.control.engine("operator")
    with pytest.raises(DBAPIError, match="permission denied"), engine.begin() as tx:
        tx.execute(text(f"SELECT * FROM {call}"))


def test_envelopes_leave_without_a_lease_only_to_be_sealed_again_and_with_an_event(stored):
    world = stored
    ids = [k for (k,) in world.control.all("SELECT id FROM keystore.dek")]
    taken = text("SELECT * FROM credentials_of_keys(:ids, 'worker:x')")
    with world.deps.engine.begin() as tx:
        assert tx.execute(taken, {"ids": ids}).all() == []
    key_rotation.replace(world.cli, everybody=False, wait=False)
    with world.deps.engine.begin() as tx:
        assert len(tx.execute(taken, {"ids": ids}).all()) == 2
    bodies = [
        json.loads(body)
        for (body,) in world.control.all(
            "SELECT body FROM audit.event WHERE action = 'credential.unsealed'"
        )
    ]
    assert [(b["outcome"], b["principal"], b["reason"]) for b in bodies] == [
        ("attempted", "worker:x", "reseal")
    ] * 2


@pytest.mark.parametrize("move", [
    ("decrypt_only", "active"), ("retired", "active"), ("retired", "decrypt_only"),
    ("active", "next"), ("active", "retired"), ("next", "decrypt_only"),
])  # fmt: skip
def test_a_root_never_moves_back_whoever_asks(world, move):
    world.control.act(
        "INSERT INTO keystore.root (id, purpose, provider, state, canary) "
        "VALUES (gen_random_uuid(), 'records', 'file', :state, 'x')", state=move[0],
    )  # fmt: skip
    with pytest.raises(DBAPIError, match="does not change like that"):
        world.control.act_plainly(f"UPDATE keystore.root SET state = '{move[1]}'")


def test_a_key_is_not_wrapped_by_a_root_that_is_being_retired(stored):
    """`keys retire` and a store at once: whoever is first wins."""
    world = stored
    former = world.control.one(
        "SELECT id FROM keystore.root WHERE purpose = 'credentials' AND state = 'active'"
    )
    activated(world)
    world.key_upkeep().look()
    answers: list[bool] = []

    def put() -> None:
        with world.cli.transaction() as tx:
            key = keystore.StoredKey(new_id(), account(world), former, b"x")
            answers.append(keystore._put(tx, key, "credentials", None))

    with world.control.engine("operator").begin() as retiring:
        (root,) = [one for one in keystore.roots(retiring) if one.root_id == former]
        assert keystore.retire(retiring, retiring, root, world.cli.principal)
        storing = threading.Thread(target=put)
        storing.start()
        time.sleep(0.5)
        assert answers == []
    storing.join(20)
    assert answers == [False]


def test_heartbeats_say_which_roots_a_worker_has_without_asking_a_kms(stored):
    world = stored
    upkeep = world.key_upkeep()
    upkeep.begin()
    assert set(upkeep.held) == {one.root_id for one in world.deps.keyring.status()}


def test_only_the_first_root_of_a_purpose_is_active_at_once(world):
    keyring = world.deps.keyring

    def add(root_id) -> bool:
        offer = RootOffer(root_id, "records", "file", lambda: make_canary(keyring, "records"))
        with transaction(world.deps.engine) as tx:
            return keystore.add_root(tx, tx, offer, world.deps.principal)

    assert [add(new_id()), add(new_id()), add(new_id())] == [True, True, False]
    states = world.control.all("SELECT state FROM keystore.root ORDER BY created_at, id")
    assert sorted(state for (state,) in states) == ["active", "next"]
