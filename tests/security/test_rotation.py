"""Roots rotate, data keys are replaced, accounts are shredded; no run fails because of it."""

import json
import secrets
import threading
import time
from dataclasses import replace
from datetime import timedelta

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import event, text

from cli import credentials, key_rotation
from crypto import keyring as keyrings
from crypto.canary import make_canary
from crypto.errors import UnknownRoot
from crypto.kms import file
from schemas.audit import Principal
from schemas.errors import ConfigError, StartRefused, TransientError
from schemas.ids import new_id
from schemas.runs import RunState
from schemas.secret import Secret
from storage import accounts, connections, keystore, reseal, resources
from storage.engine import transaction
from workers import key_upkeep, run_sync
from workers.records import ASK_AGAIN_S

pytestmark = pytest.mark.integration

SOON = timedelta(seconds=20)


@pytest.fixture
def stored(world):
    """Two stored credentials; the worker holds a keyring of its own."""
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: merge, key: [id]}"})
    return world


@pytest.fixture
def workers_live(stored):
    """A worker that beats and looks after the keys every 0.1 s, as its threads would."""
    stop = threading.Event()
    upkeep = stored.key_upkeep()

    def go_on() -> None:
        while not stop.wait(0.1):
            upkeep.look()
            report(stored)

    thread = threading.Thread(target=go_on)
    report(stored)
    thread.start()
    yield stored
    stop.set()
    thread.join()


def report(world) -> None:
    """Beat as the worker: it says which roots it has."""
    roots = [one.root_id for one in world.deps.keyring.status()]
    world.control.act(
        "INSERT INTO workers (worker_id, version, slots, roots) VALUES ('w1', 'test', 8, :roots) "
        "ON CONFLICT (worker_id) DO UPDATE SET seen_at = clock_timestamp(), roots = :roots",
        roots=roots,
    )


def take_roots(world) -> None:
    world.deps.keyring.reload()
    report(world)


def keys_of(world):
    return world.control.all(
        "SELECT id, root_id, wrapped FROM keystore.dek WHERE purpose = 'credentials' ORDER BY id"
    )


def envelopes(world):
    return world.control.all("SELECT resource_id, envelope FROM credentials ORDER BY 1")


def rotate(world, purpose="credentials", **files) -> key_rotation.Rotated:
    found = key_rotation.Files(files.get("worker"), files.get("update"))
    return key_rotation.rotate(world.cli, purpose, found, patience=SOON)


def worker_file(world):
    return world.directory / "keys" / "worker.json"


def test_a_rotated_root_wraps_every_key_again_and_touches_no_envelope(workers_live):
    world = workers_live
    before, sealed = keys_of(world), envelopes(world)
    done = rotate(world, worker=worker_file(world))
    assert done.rewrapped == len(before) == 2
    after = keys_of(world)
    assert [k[0] for k in after] == [k[0] for k in before]
    assert {k[1] for k in after} == {done.root_id}
    assert not {k[2] for k in after} & {k[2] for k in before}
    assert envelopes(world) == sealed
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED
    states = dict(world.control.all("SELECT state, count(*) FROM keystore.root GROUP BY 1"))
    assert states["active"] >= 1
    assert states["decrypt_only"] == 1


def test_each_step_of_a_rotation_leaves_its_event(workers_live):
    rotate(workers_live, worker=worker_file(workers_live))
    with workers_live.cli.transaction() as tx:
        actions = [
            action
            for (action,) in tx.execute(
                text("SELECT action FROM audit.event WHERE target_kind = 'root' ORDER BY seq")
            )
        ]
    wanted = ["root.added", "root.added", "root.replaced", "root.activated", "keys.rewrapped"]
    assert actions == wanted


def test_a_new_root_is_not_used_before_every_worker_has_it(stored, tmp_path):
    world, update = stored, tmp_path / "update.json"
    report(world)
    with pytest.raises(TransientError, match="1 workers do not have it yet"):
        key_rotation.rotate(
            world.cli,
            "credentials",
            key_rotation.Files(None, update),
            patience=timedelta(0),
        )
    assert world.control.one("SELECT count(*) FROM keystore.root WHERE state = 'next'") == 1
    run, _ = world.sync()  # nothing has changed for runs
    assert run.state is RunState.SUCCEEDED
    file.merge(worker_file(world), update)  # carried to the worker's host
    upkeep = world.key_upkeep()
    upkeep.look()
    report(world)
    looking = threading.Timer(1.0, upkeep.look)
    looking.start()
    done = rotate(world)  # says nothing about files: it goes on where it was
    looking.join()
    assert {root for _, root, _ in keys_of(world)} == {done.root_id}


def test_what_was_sealed_with_the_old_root_during_a_rotation_is_wrapped_again(workers_live):
    world = workers_live
    old_keyring = keyrings.load(world.cli.settings.keyring)  # an operator who has not heard of it
    done = rotate(world, worker=worker_file(world))
    store_password(world, old_keyring)
    until(lambda: {root for _, root, _ in keys_of(world)} == {done.root_id})
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED


def store_password(world, keyring) -> None:
    """Do what `resource rotate shop` does, as an operator with this keyring."""
    with world.cli.inside() as (tx, account, _):
        found = resources.get(tx, "shop")
        credentials.store(
            world.cli, tx, account, keyring, resource_id=found.resource_id, field="password",
            version=found.secret_versions["password"] + 1,
            secret=Secret(world.pair.secret("source")["password"]),
        )  # fmt: skip


def until(condition, seconds=20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_records_keys_are_wrapped_again_by_the_operator(workers_live):
    world = workers_live
    records = world.deps.keyring
    dek_context = keyrings.WrapContext(
        world.control.one("SELECT id FROM accounts"), "records", new_id()
    )
    wrapped = records.wrap("records", secrets.token_bytes(32), dek_context)
    offer = keystore.RootOffer(
        wrapped.root_id, "records", "file", lambda: make_canary(records, "records")
    )
    with transaction(world.deps.engine) as tx:
        key = keystore.StoredKey(
            dek_context.dek_id, dek_context.account_id, wrapped.root_id, wrapped.blob
        )
        keystore.keep(tx, tx, key, offer, Principal("worker", "w1"))
    done = rotate(world, "records", worker=worker_file(world))
    assert (
        world.control.one("SELECT root_id FROM keystore.dek WHERE id = :id", id=dek_context.dek_id)
        == done.root_id
    )
    until(lambda: world.deps.keyring.active_root("records") == done.root_id)


def test_two_hosts_may_keep_the_first_key_of_a_root_at_the_same_moment(world):
    records, account, engine = world.deps.keyring, new_id(), world.deps.engine

    def keep(tx) -> None:
        context = keyrings.WrapContext(account, "records", new_id())
        wrapped = records.wrap("records", secrets.token_bytes(32), context)
        offer = keystore.RootOffer(
            wrapped.root_id, "records", "file", lambda: make_canary(records, "records")
        )
        key = keystore.StoredKey(context.dek_id, account, wrapped.root_id, wrapped.blob)
        keystore.keep(tx, tx, key, offer, Principal("worker", "w1"))

    asked: list[str] = []

    def be_quicker(*said: object) -> None:
        if "FROM keystore.root" in str(said[2]) and not asked:  # it was refused, and looks why
            asked.append(str(said[2]))
            with transaction(engine) as other:
                keep(other)

    event.listen(engine, "before_cursor_execute", be_quicker)
    with transaction(engine) as tx:
        keep(tx)
    event.remove(engine, "before_cursor_execute", be_quicker)
    assert asked
    assert world.control.one("SELECT count(*) FROM keystore.dek WHERE purpose = 'records'") == 2


def test_replaced_data_keys_seal_again_and_the_old_ones_wait_for_the_backups(stored):
    world = stored
    before, sealed = {k[0] for k in keys_of(world)}, dict(envelopes(world))
    key_rotation.replace(world.cli, everybody=False, wait=False)
    world.key_upkeep().look()
    after = dict(envelopes(world))
    assert after.keys() == sealed.keys()
    assert all(after[r] != sealed[r] for r in sealed)
    unused = world.control.all("SELECT id FROM keystore.dek WHERE unused_since IS NOT NULL")
    assert before & {k for (k,) in unused} == before & {
        k for (k,) in world.control.all("SELECT id FROM keystore.dek WHERE state = 'decrypt_only'")
    }
    assert len(unused) == 2
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED
    actions = [a for (a,) in world.control.all("SELECT action FROM audit.event")]
    assert actions.count("credential.resealed") == 2
    world.control.act(
        "UPDATE keystore.dek SET unused_since = now() - interval '31 days' "
        "WHERE unused_since IS NOT NULL"
    )
    world.key_upkeep().look()
    assert not world.control.one("SELECT count(*) FROM keystore.dek WHERE unused_since IS NOT NULL")
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED


class Killed(BaseException):
    """Ends a thread where it stands, as the end of its process would."""


def test_resealing_that_is_killed_anywhere_loses_and_doubles_nothing(stored, monkeypatch):
    """T6: 50 deaths at random statements, while credentials change beside it."""
    world, dice = stored, secrets.SystemRandom()
    originals = {
        (module, name): getattr(module, name)
        for module, name in (
            (reseal, "take"), (reseal, "put"),
            (keystore, "keep"), (keystore, "mark_unused"),
            (keystore, "to_replace"),
        )
    }  # fmt: skip
    deaths = 0

    def deadly(original):
        def call(*arguments, **options):
            if dice.random() < 0.4:
                raise Killed
            result = original(*arguments, **options)
            if dice.random() < 0.2:
                raise Killed
            return result

        return call

    for (module, name), original in originals.items():
        monkeypatch.setattr(module, name, deadly(original))
    while deaths < 50:
        keyed(world)  # and a minute later, for what a dead worker has taken
        try:
            world.key_upkeep().look()
        except Killed:
            deaths += 1
        if deaths % 10 == 5:
            change_password(world, originals)
    for (module, name), original in originals.items():
        monkeypatch.setattr(module, name, original)
    world.control.act(
        "UPDATE keystore.dek SET created_at = now() - interval '1 hour', taken_until = NULL"
    )
    world.key_upkeep().look()
    assert (
        world.control.one(
            "SELECT count(*) FROM keystore.dek "
            "WHERE state = 'decrypt_only' AND unused_since IS NULL"
        )
        == 0
    )
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED, run.error
    in_use = world.control.all(
        "SELECT encode(substr(envelope, 5, 16), 'hex')::uuid FROM credentials"
    )
    stored_keys = {k for (k,) in world.control.all("SELECT id FROM keystore.dek")}
    assert {k for (k,) in in_use} <= stored_keys


def keyed(world) -> None:
    """Have all keys replaced, past the functions that are deadly at the moment."""
    world.control.act(
        "UPDATE keystore.dek SET state = 'decrypt_only', taken_until = NULL "
        "WHERE purpose = 'credentials' "
        "AND id IN (SELECT encode(substr(envelope, 5, 16), 'hex')::uuid FROM credentials)"
    )


def change_password(world, originals) -> None:
    keep = keystore.keep
    keystore.keep = originals[keystore, "keep"]
    try:
        store_password(world, keyrings.load(world.cli.settings.keyring))
    finally:
        keystore.keep = keep


def test_a_key_that_two_workers_want_to_replace_is_replaced_once(stored):
    world = stored
    key_rotation.replace(world.cli, everybody=False, wait=False)
    workers = [threading.Thread(target=world.key_upkeep().look) for _ in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    resealed = world.control.one(
        "SELECT count(*) FROM audit.event WHERE action = 'credential.resealed'"
    )
    assert resealed == 2
    credentials_keys = world.control.one(
        "SELECT count(*) FROM keystore.dek WHERE purpose = 'credentials'"
    )
    assert credentials_keys == 4  # two in use, two that wait for the backups


def test_runs_go_on_while_roots_and_data_keys_rotate(workers_live):
    world = workers_live
    for _ in range(3):
        key_rotation.replace(world.cli, everybody=False, wait=False)
        rotation = threading.Thread(target=lambda: rotate(world, worker=worker_file(world)))
        rotation.start()
        while rotation.is_alive():
            run, _ = world.sync()
            assert run.state is RunState.SUCCEEDED, run.error
        rotation.join()
    assert world.control.one("SELECT count(*) FROM keystore.root WHERE purpose='credentials'") == 4


def test_a_root_is_retired_only_when_nothing_and_no_backup_needs_it(shell, workers_live):
    world = workers_live
    (first,) = world.control.all(
        "SELECT id FROM keystore.root WHERE purpose = 'credentials' AND state = 'active'"
    )[0]
    code, _, error = shell("keys", "retire", str(first))
    assert code == 1
    assert "is active" in error
    rotate(world, worker=worker_file(world))
    until(
        lambda: world.control.one("SELECT unused_since FROM keystore.root WHERE id = :id", id=first)
    )
    code, _, error = shell("keys", "retire", str(first))
    assert code == 1
    assert "backups that need it are kept until" in error
    world.control.act(
        "UPDATE keystore.root SET unused_since = now() - interval '31 days' WHERE id = :id",
        id=first,
    )
    assert shell("keys", "retire", str(first))[0] == 0
    known = {str(one.root_id) for one in keyrings.load(world.cli.settings.keyring).status()}
    assert str(first) not in known
    assert (
        world.control.one("SELECT state FROM keystore.root WHERE id = :id", id=first) == "retired"
    )


def test_a_root_that_still_wraps_keys_is_not_retired(shell, workers_live):
    world = workers_live
    (first,) = world.control.all(
        "SELECT id FROM keystore.root WHERE purpose = 'credentials' AND state = 'active'"
    )[0]
    rotate(world, worker=worker_file(world))
    world.control.act(
        "INSERT INTO keystore.dek (id, account_id, purpose, root_id, wrapped) SELECT "
        "gen_random_uuid(), gen_random_uuid(), 'credentials', :root, '' ", root=first,
    )  # fmt: skip
    world.control.act("UPDATE keystore.root SET unused_since = now() WHERE id = :id", id=first)
    code, _, error = shell("keys", "retire", str(first), "--force")
    assert code == 1
    assert "still wraps 1 data keys" in error


def test_the_keyring_of_another_installation_seals_nothing_and_starts_nothing(stored, tmp_path):
    world = stored
    operator_file, other_worker = keyrings.init(tmp_path / "other")
    with pytest.raises(StartRefused) as refused:
        key_upkeep.check_roots(keyrings.load(str(other_worker)), world.deps.keystore)
    assert "lacks the active credentials root" in refused.value.public

    with pytest.raises(ConfigError, match="of another installation"):
        store_password(world, keyrings.load(str(operator_file)))


def test_a_keyring_whose_root_was_exchanged_under_the_same_id_is_refused(stored, tmp_path):

    world = stored
    _, other = keyrings.init(tmp_path / "other")
    mine, foreign = json.loads(worker_file(world).read_text()), json.loads(other.read_text())
    for entry, strange in zip(mine["roots"], foreign["roots"], strict=True):
        entry.update({k: strange[k] for k in ("private", "public") if k in strange})
    forged = tmp_path / "forged.json"
    forged.touch(0o600)
    forged.write_text(json.dumps(mine))
    with pytest.raises(StartRefused, match="does not open what root"):
        key_upkeep.check_roots(keyrings.load(str(forged)), world.deps.keystore)


def test_a_worker_that_lacks_a_root_waits_for_it_instead_of_failing(stored, tmp_path):
    world = stored
    lacking = keyrings.load(str(copied(worker_file(world), tmp_path)))
    upkeep = world.key_upkeep()
    file.add_root(file.path_of(world.cli.settings.keyring), worker_file(world), "credentials")
    looking = threading.Timer(0.5, upkeep.look)
    report(world)
    looking.start()
    world.cli.__dict__.pop("keyring", None)
    rotate_known(world)
    looking.join()
    upkeep.look()

    lagging = replace(world.deps, keyring=lacking)
    asked = world.enqueue()
    for job in world.dispatch():
        run_sync.execute(job, lagging)
    found = world.run(asked.run_id)
    assert found.state is RunState.QUEUED
    assert found.error_code == UnknownRoot.code


def copied(path, directory):
    target = directory / "old-worker.json"
    target.touch(0o600)
    target.write_bytes(path.read_bytes())
    return target


def rotate_known(world) -> None:
    """Activate the root that the files hold already and have everything wrapped by it."""
    keyring = keyrings.load(world.cli.settings.keyring)
    (fresh,) = [one for one in keyring.status() if one.state == "next"]
    key_rotation._make_known(world.cli, keyring, "credentials", fresh.root_id)
    world.deps.keyring.reload()
    report(world)
    with world.cli.transaction() as tx:
        (root,) = [r for r in keystore.roots(tx) if r.root_id == fresh.root_id]
        keystore.activate(tx, tx, root, world.cli.principal)


# ── shredding, with a keystore of its own ────────────────────────────────────────────────────


def test_with_a_keystore_apart_the_control_database_holds_no_key_and_runs_work(apart):
    world = apart
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: merge, key: [id]}"})
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED, run.error
    assert world.control.one("SELECT count(*) FROM keystore.dek") == 0
    assert world.control.one("SELECT count(*) FROM keystore.root") == 0
    key_rotation.replace(world.cli, everybody=True, wait=False)
    world.key_upkeep().look()
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED, run.error
    report(world)
    looking = threading.Timer(1.5, world.key_upkeep().look)
    upkeep = threading.Timer(0.5, lambda: take_roots(world))
    upkeep.start()
    looking.start()
    rotate(world, worker=worker_file(world))
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED, run.error


def test_a_shredded_account_does_not_open_from_an_old_dump_beside_the_live_keystore(apart):
    """T7: yesterday's rows of the main database come back, the keys do not."""
    world = apart
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": "{mode: merge, key: [id]}"})
    world.sync()
    tables = (
        "accounts", "account_queues", "resources", "resource_queues", "credentials",
        "connections", "streams", "schedules",
    )  # fmt: skip
    dump = {t: world.control.all(f"SELECT * FROM {t}") for t in tables}
    columns = {
        t: [c for (c,) in world.control.all(
            "SELECT column_name FROM information_schema.columns WHERE table_name = :t "
            "AND table_schema = 'public' ORDER BY ordinal_position", t=t)]
        for t in tables
    }  # fmt: skip
    assert counted(world) > 0
    delete_all(world)
    assert counted(world) == 0, "the account's keys are gone"
    assert shredded_event(world)
    with psycopg.connect(world.control.admin_url) as dba:
        dba.execute("SET session_replication_role = replica")
        for table in tables:
            for row in dump[table]:
                dba.execute(
                    sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
                        sql.Identifier(table),
                        sql.SQL(", ").join(map(sql.Identifier, columns[table])),
                        sql.SQL(", ").join(sql.Placeholder() * len(row)),
                    ),
                    [psycopg.types.json.Jsonb(v) if isinstance(v, dict) else v for v in row],
                )
    asked = world.enqueue()
    world.step()
    found = world.run(asked.run_id)
    assert found.state is RunState.FAILED
    assert found.error_code == "unsealable"


def counted(world) -> int:
    with psycopg.connect(world.keystore_url) as dba:
        (count,) = dba.execute("SELECT count(*) FROM keystore.dek").fetchone() or (0,)
        return count


def delete_all(world) -> None:

    with world.cli.inside() as (tx, account, _):
        connections.delete(tx, account, connections.get(tx, "shop-to-lake"), world.cli.principal)
    for name in ("shop", "lake"):
        with world.cli.keystore.after() as last, world.cli.inside() as (tx, account, _):
            found = resources.get(tx, name)
            resources.delete(tx, last or tx, account, found, world.cli.principal)
    with world.cli.keystore.after() as last, world.cli.transaction() as tx:
        accounts.delete(
            tx, last or tx, accounts.get(tx, "acme"), world.cli.principal,
            backups=timedelta(days=7),
        )  # fmt: skip


def shredded_event(world) -> bool:
    return bool(
        world.control.one("SELECT count(*) FROM audit.event WHERE action = 'account.shredded'")
    )


def test_a_keystore_that_is_away_puts_the_run_back_and_loses_nothing(apart, admin):
    world = apart
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: merge, key: [id]}"})
    name = world.keystore_url.rsplit("/", 1)[1]
    admin.execute(
        sql.SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS false").format(sql.Identifier(name))
    )
    admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
    )
    asked = world.enqueue()
    world.step()
    found = world.run(asked.run_id)
    admin.execute(
        sql.SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS true").format(sql.Identifier(name))
    )
    assert found.state is RunState.QUEUED
    assert "keystore" in str(found.error)
    time.sleep(ASK_AGAIN_S + 0.2)
    world.control.act("UPDATE active_runs SET not_before = now()")
    world.step()
    assert world.run(asked.run_id).state is RunState.SUCCEEDED


def test_resource_and_account_take_their_keys_with_them(stored):
    world = stored
    assert world.control.one("SELECT count(*) FROM keystore.dek WHERE purpose='credentials'") == 2
    delete_all(world)
    assert world.control.one("SELECT count(*) FROM keystore.dek") == 0
