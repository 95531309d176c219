"""Roots come, wrap and go in keyring files: atomically, on every host, and never the wrong one."""

import json
import os
import subprocess
import sys
import threading
from base64 import b64encode
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from crypto import keyring as keyrings
from crypto.errors import KeyringError, UnknownRoot, UnsealError
from crypto.kms import document, file
from crypto.roots import PURPOSES, Purpose, WrapContext

CONTEXTS = {purpose: WrapContext(uuid4(), purpose, uuid4()) for purpose in PURPOSES}


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    return file.init(tmp_path / "keys")


def roots(path: Path) -> dict[UUID, tuple[str, str, bool]]:
    return {
        s.root_id: (s.purpose, s.state, s.can_unwrap) for s in keyrings.load(str(path)).status()
    }


def edit(path: Path, change: Any) -> None:
    """Change a keyring file as somebody with an editor would."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_new_root_unwraps_first_and_wraps_only_when_it_is_active(files, purpose: Purpose):
    operator, worker = (keyrings.load(str(path)) for path in files)
    wraps, opens = (operator, worker) if purpose == "credentials" else (worker, operator)
    before = wraps.active_root(purpose)
    old = wraps.wrap(purpose, b"k" * 32, CONTEXTS[purpose])
    made = file.add_root(files[0], files[1], purpose)
    assert (wraps.reload(), opens.reload()) == (True, True)
    assert (wraps.reload(), opens.reload()) == (False, False)
    assert wraps.active_root(purpose) == before
    assert opens.holds(made)
    assert not wraps.holds(made)
    for path in files:
        file.activate(path, made)
        assert path.stat().st_mode & 0o777 == 0o600
    wraps.reload()
    opens.reload()
    new = wraps.wrap(purpose, b"n" * 32, CONTEXTS[purpose])
    assert new.root_id == made == wraps.active_root(purpose)
    found = opens.unwrap_many([(old, CONTEXTS[purpose]), (new, CONTEXTS[purpose])])
    assert found == [b"k" * 32, b"n" * 32]
    assert [s.state for s in wraps.status() if s.root_id == before] == ["decrypt_only"]
    for path in files:
        file.drop_root(path, before)
    opens.reload()
    (gone,) = opens.unwrap_many([(old, CONTEXTS[purpose])])
    assert isinstance(gone, UnknownRoot)


def test_a_worker_file_on_another_host_gets_its_half_by_a_file_of_its_own(files, tmp_path):
    operator_file, worker_file = files
    update = tmp_path / "keys" / "update.json"
    for purpose in PURPOSES:
        made = file.carry(operator_file, update, purpose)
        assert update.stat().st_mode & 0o777 == 0o600
        assert list(roots(update)) == [made]
        assert roots(update)[made] == (purpose, "next", purpose == "credentials")
        assert roots(operator_file)[made] == (purpose, "next", purpose == "records")
        assert made not in roots(worker_file)
        assert file.merge(worker_file, update) == [made]
        assert file.merge(worker_file, update) == [], "twice does no harm"
        assert roots(worker_file)[made] == roots(update)[made]
        update.unlink()
    file.carry(operator_file, update, "records")
    with pytest.raises(KeyringError, match="exists already"):
        file.carry(operator_file, update, "records")


def test_a_worker_that_meets_a_root_looks_at_its_file_again(files, tmp_path):
    operator_file, worker_file = files
    worker = keyrings.load(str(worker_file))
    update = tmp_path / "keys" / "update.json"
    made = file.carry(operator_file, update, "credentials")
    file.activate(operator_file, made)
    wrapped = keyrings.load(str(operator_file)).wrap(
        "credentials", b"k" * 32, CONTEXTS["credentials"]
    )
    (unknown,) = worker.unwrap_many([(wrapped, CONTEXTS["credentials"])])
    assert isinstance(unknown, UnknownRoot)
    file.merge(worker_file, update)
    assert worker.unwrap_many([(wrapped, CONTEXTS["credentials"])]) == [b"k" * 32]


def test_a_file_that_became_wrong_is_not_read_and_the_roots_of_before_go_on(files):
    worker = keyrings.load(str(files[1]))
    wrapped = worker.wrap("credentials", b"k" * 32, CONTEXTS["credentials"])
    files[1].write_text("{}")
    with pytest.raises(KeyringError, match="not a keyring file"):
        worker.reload()
    assert worker.unwrap_many([(wrapped, CONTEXTS["credentials"])]) == [b"k" * 32]
    with pytest.raises(KeyringError, match="not a keyring file"):
        worker.reload()
    stranger = keyrings.Wrapped(uuid4(), wrapped.blob)
    (unknown,) = worker.unwrap_many([(stranger, CONTEXTS["credentials"])])
    assert isinstance(unknown, UnknownRoot)
    files[1].unlink()
    with pytest.raises(KeyringError, match="no such file"):
        worker.reload()


def test_the_wrong_root_is_neither_activated_nor_dropped(files):
    operator_file, _ = files
    active = next(r for r, (purpose, *_) in roots(operator_file).items() if purpose == "records")
    with pytest.raises(KeyringError, match="is the active one"):
        file.drop_root(operator_file, active)
    for change in (file.activate, file.drop_root):
        with pytest.raises(KeyringError, match="has no root"):
            change(operator_file, uuid4())
    made = file.add_root(files[0], files[1], "records")
    file.activate(operator_file, made)
    with pytest.raises(KeyringError, match="does not come back"):
        file.activate(operator_file, active)
    file.activate(operator_file, made)  # twice does no harm
    assert roots(operator_file)[made][1] == "active"


def test_nothing_is_written_if_the_other_file_is_wrong(files):
    before = [path.read_bytes() for path in files]
    files[0].chmod(0o644)
    for purpose in PURPOSES:
        with pytest.raises(KeyringError, match="chmod 600"):
            file.add_root(files[0], files[1], purpose)
    files[0].chmod(0o600)
    assert [path.read_bytes() for path in files] == before
    assert sorted(p.name for p in files[0].parent.iterdir()) == ["operator.json", "worker.json"]


def test_two_commands_at_once_lose_no_root(files):
    code = (
        "import sys; from pathlib import Path; from crypto.kms import file\n"
        "for _ in range(5): print(file.add_root(Path(sys.argv[1]), Path(sys.argv[2]), 'records'))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, files)], stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[3],
        )
        for _ in range(3)
    ]  # fmt: skip
    made = {UUID(line) for one in running for line in one.communicate(timeout=60)[0].split()}
    assert len(made) == 15
    for path in files:
        assert made <= set(roots(path))


def test_whoever_reads_while_a_file_changes_sees_old_or_new_roots(files):
    operator_file, worker_file = files
    stop, failures = threading.Event(), []

    def read() -> None:
        keyring = keyrings.load(str(worker_file))
        while not stop.is_set():
            try:
                keyring.reload()
                keyring.wrap("records", b"k" * 32, CONTEXTS["records"])
            except KeyringError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        made = file.add_root(operator_file, worker_file, "records")
        file.activate(worker_file, made)
    stop.set()
    reader.join(20)
    assert failures == []


# ── what is refused ──────────────────────────────────────────────────────────────────────────

SAMPLES = {
    "zeros": bytes(32),
    "ones": b"\xff" * 32,
    "a letter": b"A" * 32,
    "counted": bytes(range(32)),
    "counted from 1": bytes(range(1, 33)),
    "counted down": bytes(range(255, 223, -1)),
    "rfc 7748": bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"),
    "rfc 9180": bytes.fromhex("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8"),
    "docs": bytes(range(32, 64)),
}


#: A public half tells only of keys on a list what they are.
LISTED = sorted(SAMPLES.keys() - {"counted down", "docs"})


@pytest.mark.parametrize(
    ("half", "name"),
    [*(("private", name) for name in SAMPLES), *(("public", name) for name in LISTED)],
)
def test_a_key_that_everybody_knows_is_refused(files, half, name):
    key = SAMPLES[name]
    if half == "public":
        key = X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()

    def change(content):
        root = next(r for r in content["roots"] if half in r)
        root[half] = b64encode(key).decode()

    edit(files[1], change)
    with pytest.raises(KeyringError, match="sample key that everybody knows") as caught:
        keyrings.load(str(files[1]))
    assert b64encode(key).decode() not in str(caught.value)


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_a_public_half_that_makes_one_secret_with_everybody_is_refused(files, point):
    def change(content):
        root = next(r for r in content["roots"] if "public" in r)
        root["public"] = b64encode(point).decode()

    edit(files[0], change)
    with pytest.raises(KeyringError, match="sample key"):
        keyrings.load(str(files[0]))


def test_two_active_roots_and_two_of_one_id_are_refused(files):
    original = files[0].read_text()
    made = file.add_root(files[0], files[1], "records")

    def activate_all(content):
        for root in content["roots"]:
            root["state"] = "active"

    edit(files[0], activate_all)
    with pytest.raises(KeyringError, match="two roots for records are active"):
        keyrings.load(str(files[0]))
    edit(files[0], lambda content: content["roots"].append(content["roots"][0]))
    with pytest.raises(KeyringError, match="same id"):
        keyrings.load(str(files[0]))
    files[0].write_text(original)
    assert made not in roots(files[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["roots"][0].update(purpose="else"),
        lambda c: c["roots"][0].update(state="wrong"),
        lambda c: c["roots"][0].update(id="x"),
        lambda c: c["roots"][0].update(created_at="yesterday"),
        lambda c: c["roots"][0].pop("public"),
        lambda c: c["roots"][0].update(public="AAAA"),
        lambda c: c["roots"][0].update(public="no base64!"),
        lambda c: c.update(roots=[1]),
        lambda c: c.update(roots={"a": 1}),
        lambda c: c.pop("roots"),
    ],
    ids=range(10),
)
def test_a_file_of_another_shape_is_refused_without_quoting_it(files, change):
    edit(files[0], change)
    with pytest.raises(KeyringError, match="not a keyring file") as caught:
        keyrings.load(str(files[0]))
    assert caught.value.__cause__ is None
    assert "private" not in str(caught.value)


def test_a_directory_in_which_others_could_replace_the_file_is_refused(files):
    for mode in (0o777, 0o730, 0o702):
        files[0].parent.chmod(mode)
        with pytest.raises(KeyringError, match=f"chmod go-w {files[0].parent}"):
            keyrings.load(str(files[0]))
    files[0].parent.chmod(0o755)  # a mount of a container
    assert keyrings.load(str(files[0])).can_unwrap("records")


def test_a_keyring_in_a_databases_directory_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "PG_VERSION").write_text("18\n")
    operator_file, _ = file.init(tmp_path / "data" / "keys")
    with pytest.raises(KeyringError, match="data directory of a database"):
        keyrings.load(str(operator_file))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(files):
    os.chown(files[0], 12345, -1)
    with pytest.raises(KeyringError, match="belongs to another user; run: chown 0"):
        keyrings.load(str(files[0]))


def test_a_private_half_for_the_wrong_purpose_is_shown(files):
    """Whoever copies worker.json to the operator's host sees in `keys status` what it can open."""
    assert {s.purpose: s.can_unwrap for s in keyrings.load(str(files[0])).status()} == {
        "credentials": False, "records": True,
    }  # fmt: skip
    both = [*document.read(files[0])[0], *document.read(files[1])[0]]
    private = [entry for entry in both if "private" in entry]
    document.replace(files[0], private)
    status = keyrings.load(str(files[0])).status()
    assert all(s.can_unwrap for s in status)
    assert len(status) == 2


def test_a_root_of_one_purpose_does_not_unwrap_for_the_other(files):
    worker = keyrings.load(str(files[1]))
    wrapped = worker.wrap("credentials", b"k" * 32, CONTEXTS["credentials"])
    (refused,) = worker.unwrap_many([(wrapped, CONTEXTS["records"])])
    assert isinstance(refused, UnsealError)


def test_whatever_the_umask_is_new_files_are_private(tmp_path):
    old = os.umask(0)
    try:
        made = file.init(tmp_path / "keys")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in made} == {0o600}
    assert made[0].parent.stat().st_mode & 0o777 == 0o700


def test_without_an_active_root_nothing_is_wrapped(files):
    def retire(content):
        for root in content["roots"]:
            root["state"] = "decrypt_only"

    edit(files[0], retire)
    keyring = keyrings.load(str(files[0]))
    with pytest.raises(KeyringError, match="no active root for credentials"):
        keyring.wrap("credentials", b"k" * 32, CONTEXTS["credentials"])
