"""With every file and database right of the host that runs the CLI, no stored credential opens."""

import re
import shutil

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from crypto import keyring as keyrings
from crypto.envelope import Context
from crypto.errors import UnsealError
from crypto.keyring import WrapContext, Wrapped
from crypto.kms.file import SUITE
from crypto.unseal import unseal_credential
from schemas.errors import ConfigError
from schemas.runs import RunState

pytestmark = pytest.mark.integration


@pytest.fixture
def stored(world):
    """A stored credential as a superuser of the control database sees it."""
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": "{mode: replace}"})
    return world


def rows(world):
    return world.control.all(
        "SELECT c.account_id, c.resource_id, c.field, c.version, c.envelope, d.id, d.root_id, "
        "d.wrapped FROM credentials c JOIN keystore.dek d "
        "ON d.id = encode(substr(c.envelope, 5, 16), 'hex')::uuid ORDER BY c.resource_id"
    )


def attempt(keyring, row) -> bytes:
    account, resource, field, version, envelope, dek_id, root_id, wrapped = row
    return unseal_credential(
        keyring,
        Wrapped(root_id=root_id, blob=bytes(wrapped)),
        WrapContext(account_id=account, purpose="credentials", dek_id=dek_id),
        bytes(envelope),
        Context(account, "resource", resource, field, version),
    )


def test_the_worker_keyring_opens_and_the_operator_keyring_does_not(stored):
    worker = keyrings.load(str(stored.directory / "keys" / "worker.json"))
    operator = keyrings.load(str(stored.directory / "keys" / "operator.json"))
    for row in rows(stored):
        assert attempt(worker, row).decode() in stored.pair.logins.values()
        with pytest.raises(UnsealError):
            attempt(operator, row)


def test_no_private_key_in_the_operators_file_unwraps_a_credential(stored):
    """Also past our own code: every private key of the file against every wrapped key."""
    import json
    from base64 import b64decode

    document = json.loads((stored.directory / "keys" / "operator.json").read_text())
    keys = [b64decode(r["private"]) for r in document["roots"] if "private" in r]
    assert keys, "the operator holds the private half of the records root"
    for account, _, _, _, _, dek_id, root_id, wrapped in rows(stored):
        info = WrapContext(account, "credentials", dek_id).info(root_id)
        for key in keys:
            with pytest.raises((InvalidTag, ValueError)):
                SUITE.decrypt(bytes(wrapped), X25519PrivateKey.from_private_bytes(key), info=info)


def test_no_password_stands_anywhere_in_the_control_database_or_the_operators_files(stored):
    run, _ = stored.sync()
    assert run.state is RunState.SUCCEEDED
    tables = stored.control.all(
        "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables "
        "WHERE schemaname IN ('public', 'audit', 'keystore')"
    )
    dump = "\n".join(
        str(row)
        for (table,) in tables
        for row in stored.control.all(f"SELECT t::text FROM {table} t")
    )
    files = [p for p in (stored.directory / "keys").iterdir() if p.name == "operator.json"]
    dump += "".join(p.read_text() for p in files)
    assert "shop-to-lake" in dump, "the search must see what is there"
    for password in stored.pair.logins.values():
        for form in (password, password.encode().hex(), password.encode().hex().upper()):
            assert form not in dump


def test_an_envelope_moved_to_another_row_does_not_open(stored):
    first, second = rows(stored)
    stored.control.act(
        "UPDATE credentials SET envelope = :e WHERE resource_id = :r", e=first[4], r=second[1]
    )
    run, _ = stored.sync()
    assert (run.state, run.error_code) == (RunState.FAILED, "unsealable")
    assert "cannot be opened" in (run.error or "")
    assert stored.control.all("SELECT state_reason FROM schedules") == [("unsealable",)]
    assert "credential.refused" in stored.events()


def test_plaintext_or_a_foreign_format_is_refused_by_the_table(stored):
    with pytest.raises(Exception, match="credentials_envelope_check"):
        stored.control.act_plainly("UPDATE credentials SET envelope = 'hunter2'")


def test_the_worker_reads_credentials_only_through_the_lease(stored):
    stored.control.act("UPDATE active_runs SET state = state")
    with pytest.raises(ConfigError, match="permission denied"):
        _read_as(stored, "worker")


def _read_as(stored, process: str) -> None:
    from sqlalchemy import text

    from storage.engine import transaction

    with transaction(stored.control.engine(process)) as tx:
        tx.execute(text("SELECT envelope FROM credentials"))


def test_unsealing_is_recorded_before_it_happens(stored):
    shutil.copy(stored.directory / "keys" / "worker.json", stored.directory / "copy.json")
    run, _ = stored.sync()
    events = stored.events(run.run_id)
    assert events.count("credential.unsealed") == 2
    assert events.index("run.started") < events.index("credential.unsealed")


def test_a_rotated_password_is_a_new_version_that_the_next_run_uses(stored):
    stored.apply({"public.t": "{mode: replace}"})
    versions = "SELECT field, version FROM credentials ORDER BY version"
    assert {v for _, v in stored.control.all(versions)} == {1}, "the same secret is no new version"
    stored.pair.session("source").execute("ALTER ROLE reader PASSWORD 'second-password'")
    old = stored.pair.logins["reader"]
    stored.pair.logins["reader"] = "second-password"
    try:
        stored.apply({"public.t": "{mode: replace}"})
        run, _ = stored.sync()
    finally:
        stored.pair.session("source").execute(f"ALTER ROLE reader PASSWORD '{old}'")
        stored.pair.logins["reader"] = old
    assert run.state is RunState.SUCCEEDED
    assert stored.control.one("SELECT max(version) FROM credentials") == 2


def test_an_event_never_carries_a_secret(stored):
    bodies = " ".join(b for (b,) in stored.control.all("SELECT body FROM audit.event"))
    assert re.search("credential|password", bodies)
    assert all(p not in bodies for p in stored.pair.logins.values())
