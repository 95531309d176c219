"""Keyring files: split by purpose, private, never overwritten, never shown."""

import json
import os
import pickle
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from crypto import keyring as keyrings
from crypto import selftest
from crypto.errors import CryptoError, KeyringError, SelfTestError, UnsealError
from crypto.fingerprint import fingerprint, matches
from crypto.keyring import WrapContext
from schemas.secret import Secret, looks_secret


def unwrap(keyring, wrapped, context):
    (found,) = keyring.unwrap_many([(wrapped, context)])
    if isinstance(found, CryptoError):
        raise found
    return found


@pytest.fixture
def files(tmp_path):
    return keyrings.init(tmp_path / "keys")


def test_the_operator_wraps_credentials_and_only_the_worker_unwraps(files):
    operator, worker = (keyrings.load(f"file://{path}") for path in files)
    context = WrapContext(uuid4(), "credentials", uuid4())
    dek = os.urandom(32)
    wrapped = operator.wrap("credentials", dek, context)
    assert unwrap(worker, wrapped, context) == dek
    assert not operator.can_unwrap("credentials")
    with pytest.raises(UnsealError):
        unwrap(operator, wrapped, context)


def test_records_are_the_other_way_round(files):
    operator, worker = (keyrings.load(str(path)) for path in files)
    assert operator.can_unwrap("records")
    assert not worker.can_unwrap("records")


@pytest.mark.parametrize("part", ["account_id", "purpose", "dek_id"])
def test_a_wrapped_key_opens_in_its_context_only(files, part):
    worker = keyrings.load(str(files[1]))
    context = WrapContext(account_id=uuid4(), purpose="credentials", dek_id=uuid4())
    wrapped = worker.wrap("credentials", b"k" * 32, context)
    other: Any = "records" if part == "purpose" else uuid4()
    with pytest.raises(UnsealError):
        unwrap(worker, wrapped, replace(context, **{part: other}))


def test_files_are_private_and_never_overwritten(files):
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o600
    assert files[0].parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(KeyringError, match="exists already"):
        keyrings.init(files[0].parent)


def test_a_file_others_can_read_is_refused_with_the_command_to_type(files):
    files[0].chmod(0o640)
    with pytest.raises(KeyringError, match=f"chmod 600 {files[0]}"):
        keyrings.load(str(files[0]))


def test_links_directories_missing_and_broken_files_are_refused(files, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(files[0])
    with pytest.raises(KeyringError, match="symbolic link"):
        keyrings.load(str(link))
    with pytest.raises(KeyringError, match="not a regular file"):
        keyrings.load(str(tmp_path))
    with pytest.raises(KeyringError, match="syncward keys init"):
        keyrings.load(str(tmp_path / "none.json"))
    files[0].write_text("{}")
    with pytest.raises(KeyringError, match="not a keyring file"):
        keyrings.load(str(files[0]))
    with pytest.raises(KeyringError, match="no such kind"):
        keyrings.load("env://transit/x")


def test_a_file_of_another_version_is_refused(files):
    document = json.loads(files[0].read_text())
    files[0].write_text(json.dumps({**document, "format": "syncward-keyring/9"}))
    with pytest.raises(KeyringError, match="another version"):
        keyrings.load(str(files[0]))


def test_keys_are_neither_shown_nor_pickled(files):
    private = json.loads(files[1].read_text())["roots"][0]["private"]
    keyring = keyrings.load(str(files[1]))
    shown = repr(keyring) + str(keyring) + repr(keyring.status()) + repr(keyring.__dict__)
    assert private not in shown
    with pytest.raises(TypeError):
        pickle.dumps(keyring)


def test_the_self_test_passes_for_both_files_and_notices_a_broken_answer(files, monkeypatch):
    for path in files:
        selftest.selftest(keyrings.load(str(path)))
    monkeypatch.setattr(selftest, "KNOWN_ENVELOPE", b"x")
    with pytest.raises(SelfTestError):
        selftest.selftest(keyrings.load(str(files[0])))


def test_a_fingerprint_knows_its_secret_and_no_other():
    stored = fingerprint(b"secret")
    assert matches(b"secret", stored)
    assert not matches(b"Secret", stored)
    assert not matches(b"secret", b"")
    assert fingerprint(b"secret") != stored


def test_a_secret_shows_itself_nowhere():
    secret = Secret("hunter2")
    assert secret.reveal() == "hunter2"
    assert "hunter2" not in f"{secret} {secret!r} {[secret]}"
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_names_that_look_secret_are_recognised():
    assert looks_secret("api-key")
    assert looks_secret("DB_PASSWORD")
    assert not looks_secret("batch_size")
