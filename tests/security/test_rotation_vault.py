"""Rotation with Vault from end to end, each process with its policy of docs/keys.md alone."""

import threading
from dataclasses import replace
from datetime import timedelta

import pytest

from cli import key_rotation
from cli.context import Cli
from crypto import keyring as keyrings
from crypto.cache import KeyCache
from schemas.runs import RunState
from tests.bao import write_token
from tests.security.test_providers import bao, mounted  # noqa: F401 - fixtures
from workers.key_upkeep import KeyUpkeep
from workers.records import RecordSealer, write_sealed
from workers.run_log import LogWriter

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("bao")]


@pytest.fixture
def vaulted(world, mounted):  # noqa: F811 - a fixture
    """The world with its keys in Vault: an operator's token for the CLI, a worker's beside it."""
    settings = world.cli.settings.model_copy(update={"keyring": mounted.uri("operator")})
    world.cli.__dict__["settings"] = settings
    keyring, deps = mounted.open("worker"), world.deps
    records = RecordSealer(deps.engine, keyring, deps.keystore, deps.principal)
    logs = LogWriter(lambda lines: write_sealed(deps.engine, records, lines))
    world.deps = replace(deps, keyring=KeyCache(keyring), records=records, logs=logs)
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: merge, key: [id]}"})
    return world


@pytest.fixture
def custodian(vaulted, mounted):  # noqa: F811 - a fixture
    """A command line whose token has both policies for the time being."""
    token = mounted.bao.token(*(f"{mounted.mount}-{kind}" for kind in ("operator", "admin")))
    uri = mounted.bao.uri(mounted.mount, write_token(mounted.directory / "custodian.token", token))
    made = Cli(account="acme")
    settings = vaulted.cli.settings.model_copy(update={"keyring": uri})
    made.__dict__.update(settings=settings, engine=vaulted.cli.engine)
    return made


@pytest.fixture
def upkeep(vaulted):
    """The worker's thread for keys, with its heartbeat's row."""
    made = KeyUpkeep(
        vaulted.deps.keyring, vaulted.deps.keystore, vaulted.deps.settings, vaulted.deps.principal
    )
    made.begin()
    stop = threading.Event()

    def go_on() -> None:
        while not stop.wait(0.2):
            made.look()
            vaulted.control.act(
                "INSERT INTO workers (worker_id, version, slots, roots) "
                "VALUES ('w1', 'test', 8, :roots) ON CONFLICT (worker_id) "
                "DO UPDATE SET seen_at = clock_timestamp(), roots = :roots",
                roots=list(made.held),
            )

    thread = threading.Thread(target=go_on)
    thread.start()
    yield made
    stop.set()
    thread.join()


def roots_of_keys(world, purpose):
    return {
        root
        for (root,) in world.control.all(
            "SELECT root_id FROM keystore.dek WHERE purpose = :p AND unused_since IS NULL",
            p=purpose,
        )
    }


@pytest.mark.usefixtures("upkeep")
def test_both_roots_rotate_data_keys_are_replaced_and_everything_still_opens(vaulted, custodian):
    world, nowhere = vaulted, key_rotation.Files(None, None)
    first, _ = world.sync()
    assert first.state is RunState.SUCCEEDED, first.error
    for purpose in ("credentials", "records"):
        before = roots_of_keys(world, purpose)
        done = key_rotation.rotate(custodian, purpose, nowhere, patience=timedelta(seconds=30))
        assert roots_of_keys(world, purpose) == {done.root_id}
        assert done.root_id not in before
    key_rotation.replace(world.cli, everybody=False, wait=True)
    second, _ = world.sync()
    assert second.state is RunState.SUCCEEDED, second.error
    for run in (first, second):
        assert "succeeded after" in opened(world, run.run_id)


def opened(world, run_id) -> str:
    """Read a run's log with the operator's token."""
    keyring = keyrings.load(world.cli.settings.keyring)
    assert keyring.can_unwrap("records")
    assert not keyring.can_unwrap("credentials")
    return world.log(run_id)
