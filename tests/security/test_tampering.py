"""What somebody with every right in the control database does to stored credentials (T1-T5).

Whatever it is: the run is refused, the connection is paused with the reason, one class A event says
so, nothing arrives at the destination, and nothing is shown.
"""

import os

import pytest

from crypto import keyring as keyrings
from schemas.runs import RunState
from tests.security.test_rotation import store_password

pytestmark = pytest.mark.integration


@pytest.fixture
def stored(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: replace}"})
    return world


def is_refused(world) -> None:
    before = refusals(world)
    run, streams = world.sync()
    assert (run.state, run.error_code) == (RunState.FAILED, "unsealable")
    assert streams == {}
    assert world.control.all("SELECT state, state_reason FROM schedules") == [
        ("paused", "unsealable")
    ]
    assert refusals(world) == before + 1
    (table,) = world.pair.session("destination").execute(
        "SELECT to_regclass('acme.t')::text"
    ).fetchone()  # fmt: skip
    assert table is None


def refusals(world) -> int:
    return world.control.one(
        "SELECT count(*) FROM audit.event WHERE action = 'credential.refused' AND class = 'A'"
    )


#: One byte of each part: magic, format, suite, key id, layout, salt, commitment, text, tag.
PARTS = {"key id": 10, "salt": 30, "commitment": 60, "text": 78, "tag": -1}


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_byte_of_an_envelope(stored, part):
    rows = stored.control.all("SELECT resource_id, envelope FROM credentials")
    for resource_id, envelope in rows:
        changed = bytearray(envelope)
        changed[PARTS[part]] ^= 1
        replaced(stored, resource_id, bytes(changed))
    is_refused(stored)


def replaced(world, resource_id, envelope) -> None:
    world.control.act(
        "UPDATE credentials SET envelope = :e WHERE resource_id = :r", e=envelope, r=resource_id
    )


def test_a_flipped_byte_of_a_wrapped_key(stored):
    stored.control.act(
        "UPDATE keystore.dek SET wrapped = set_byte(wrapped, 40, get_byte(wrapped, 40) # 1)"
    )
    is_refused(stored)


def test_envelopes_of_two_resources_swapped(stored):
    (first, one), (second, two) = stored.control.all(
        "SELECT resource_id, envelope FROM credentials"
    )
    replaced(stored, first, two)
    replaced(stored, second, one)
    is_refused(stored)


def test_an_envelope_and_its_key_given_to_another_account(stored):
    stored.account("other")
    other = stored.control.one("SELECT id FROM accounts WHERE name = 'other'")
    stored.control.act("UPDATE keystore.dek SET account_id = :a", a=other)
    is_refused(stored)


@pytest.mark.parametrize(("column", "value"), [("field", "'token'"), ("version", "7")])
def test_an_envelope_under_another_field_or_version(stored, column, value):
    stored.control.act(f"UPDATE credentials SET {column} = {value}")
    is_refused(stored)


@pytest.mark.parametrize("content", [
    b"hunter2-in-clear", b"gAAAAABh" + b"x" * 80, b"\x80\x00\x00" + os.urandom(90),
    b'{"iv":"","ciphertext":""}', b"SY",
], ids=["plaintext", "fernet", "foreign bytes", "foreign document", "cut"])  # fmt: skip
def test_whatever_is_no_envelope_behind_our_first_two_bytes(stored, content):
    for resource_id, _ in stored.control.all("SELECT resource_id, field FROM credentials"):
        replaced(stored, resource_id, b"SY" + content if content != b"SY" else content)
    is_refused(stored)


def test_an_older_row_put_back_is_seen_by_doctor(stored, shell):
    """T5: encryption cannot tell an old password from the new one; the audit stream can."""
    world = stored
    assert "stored_secrets: " not in shell("doctor", "crypto")[1]
    store_password(world, keyrings.load(world.cli.settings.keyring))
    assert "stored_secrets: " not in shell("doctor", "crypto")[1]
    world.control.act("DELETE FROM credentials WHERE version = 2")
    code, out, _ = shell("doctor", "crypto")
    assert code == 1
    assert "WRONG  crypto.stored_secrets: acme/shop password" in out


def test_an_older_envelope_under_the_new_version_is_seen_and_refused(stored, shell):
    world = stored
    (resource_id, old) = world.control.all(
        "SELECT c.resource_id, envelope FROM credentials c JOIN resources r "
        "ON r.id = c.resource_id WHERE r.name = 'shop'"
    )[0]
    store_password(world, keyrings.load(world.cli.settings.keyring))
    world.control.act(
        "UPDATE credentials SET envelope = :e WHERE resource_id = :r AND version = 2",
        e=old, r=resource_id,
    )  # fmt: skip
    assert "crypto.stored_secrets: acme/shop password" in shell("doctor", "crypto")[1]
    is_refused(world)


def test_a_replaced_data_key_changes_the_digest_that_is_compared(stored, shell):
    from cli import key_rotation

    key_rotation.replace(stored.cli, everybody=False, wait=False)
    stored.key_upkeep().look()
    assert "stored_secrets: " not in shell("doctor", "crypto")[1]
