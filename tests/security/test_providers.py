"""Every kind of keyring keeps the same promises: files, and a real OpenBao over TLS."""

import logging
import os
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import pytest

from crypto import keyring as keyrings
from crypto.cache import KeyCache
from crypto.canary import check_canary, make_canary
from crypto.errors import (
    CryptoError,
    KeyringError,
    KmsDenied,
    KmsUnavailable,
    UnknownRoot,
    UnsealError,
)
from crypto.kms import file, transit, vault
from crypto.roots import PURPOSES, Keyring, Purpose, WrapContext, Wrapped
from crypto.selftest import selftest
from schemas.errors import Deferral
from schemas.failures import FAILURES, Who
from schemas.runs import RunState
from tests.bao import Bao, write_token

pytestmark = pytest.mark.xdist_group("bao")

#: In a plaintext, an error or a header of a server: it must come out nowhere.
MARK = "s3cr3t-of-the-server"


_OPENED: list[Keyring] = []


def opened(uri: str) -> vault.VaultKeyring:
    """Open a keyring of a Vault; its connections are closed after the test."""
    keyring = vault.load(uri)
    _OPENED.append(keyring)
    return keyring


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _OPENED:
        _OPENED.pop().close()


@pytest.fixture(scope="session")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bao]:
    with Bao(tmp_path_factory.mktemp("bao")) as server:
        yield server


@dataclass
class Provider:
    """The keyrings of an operator's and of a worker's host, and how their roots are changed."""

    operator: Keyring
    worker: Keyring
    rotate: Callable[[Purpose], None]
    retire: Callable[[Purpose], None]

    def wraps(self, purpose: Purpose) -> Keyring:
        return self.operator if purpose == "credentials" else self.worker

    def unwraps(self, purpose: Purpose) -> Keyring:
        return self.worker if purpose == "credentials" else self.operator


def of_files(directory: Path) -> Provider:
    files = file.init(directory / "keys")
    operator, worker = (keyrings.load(f"file://{path}") for path in files)

    def rotate(purpose: Purpose) -> None:
        root_id = file.add_root(*files, purpose)
        for path in files:
            file.activate(path, root_id)
        assert operator.reload()
        assert worker.reload()

    def retire(purpose: Purpose) -> None:
        for path, keyring in zip(files, (operator, worker), strict=True):
            for root in keyring.status():
                if root.purpose == purpose and root.state == "decrypt_only":
                    file.drop_root(path, root.root_id)
            keyring.reload()

    return Provider(operator, worker, rotate, retire)


@dataclass
class Vault:
    """A mount of its own on the server of this session."""

    bao: Bao
    mount: str
    directory: Path

    def uri(self, kind: str) -> str:
        token = self.bao.token(f"{self.mount}-{kind}")
        return self.bao.uri(self.mount, write_token(self.directory / f"{kind}.token", token))

    def open(self, kind: str) -> vault.VaultKeyring:
        return opened(self.uri(kind))


@pytest.fixture
def mounted(bao: Bao, tmp_path: Path) -> Vault:
    mount = f"t{uuid4().hex[:8]}"
    bao.mount(mount)
    return Vault(bao, mount, tmp_path)


def of_vault(mounted: Vault) -> Provider:
    operator, worker, admin = (mounted.open(kind) for kind in ("operator", "worker", "admin"))

    def rotate(purpose: Purpose) -> None:
        made = admin.rotate(purpose)
        assert operator.reload()
        assert operator.active_root(purpose) == made
        worker.reload()

    def retire(purpose: Purpose) -> None:
        admin.retire_below(purpose, admin.active_root(purpose))
        operator.reload()
        worker.reload()

    return Provider(operator, worker, rotate, retire)


@pytest.fixture(params=["file", "vault"])
def provider(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Provider]:
    made = (
        of_files(tmp_path)
        if request.param == "file"
        else of_vault(request.getfixturevalue("mounted"))
    )
    yield made
    made.operator.close()
    made.worker.close()  # twice for some: it does no harm


def context(purpose: Purpose) -> WrapContext:
    return WrapContext(uuid4(), purpose, uuid4())


def batch(keyring: Keyring, purpose: Purpose, count: int):
    deks = [os.urandom(32) for _ in range(count)]
    contexts = [context(purpose) for _ in range(count)]
    wrapped = keyring.wrap_many(purpose, list(zip(deks, contexts, strict=True)))
    return deks, list(zip(wrapped, contexts, strict=True))


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_key_comes_back_where_it_belongs_and_nowhere_else(provider, purpose):
    dek, right = os.urandom(32), context(purpose)
    wrapped = provider.wraps(purpose).wrap(purpose, dek, right)
    opener = provider.unwraps(purpose)
    assert opener.unwrap_many([(wrapped, right)]) == [dek]
    other = next(p for p in PURPOSES if p != purpose)
    for wrong in (
        replace(right, account_id=uuid4()),
        replace(right, dek_id=uuid4()),
        replace(right, purpose=other),
    ):
        (refused,) = opener.unwrap_many([(wrapped, wrong)])
        assert isinstance(refused, UnsealError)
        assert str(refused) == "cannot be opened"


@pytest.mark.parametrize("purpose", PURPOSES)
def test_whoever_wraps_cannot_unwrap(provider, purpose):
    wraps = provider.wraps(purpose)
    right = context(purpose)
    wrapped = wraps.wrap(purpose, b"k" * 32, right)
    assert not wraps.can_unwrap(purpose)
    assert not wraps.holds(wrapped.root_id)
    try:
        (found,) = wraps.unwrap_many([(wrapped, right)])
    except KmsDenied:
        return
    assert isinstance(found, UnsealError)


def test_a_batch_keeps_its_order_and_fails_item_by_item(provider):
    deks, items = batch(provider.operator, "credentials", 600)
    assert provider.worker.unwrap_many(items) == deks
    wrapped, right = items[3]
    items[3] = (wrapped, replace(right, account_id=uuid4()))
    items[7] = (replace(items[7][0], blob=items[7][0].blob[:-5] + b"AAAAA"), items[7][1])
    items[9] = (Wrapped(wrapped.root_id, b"foreign"), items[9][1])
    stranger = uuid4()
    items[11] = (Wrapped(stranger, items[11][0].blob), items[11][1])
    found = provider.worker.unwrap_many(items)
    assert {n for n, one in enumerate(found) if isinstance(one, CryptoError)} == {3, 7, 9, 11}
    assert [one for one in found if isinstance(one, bytes)] == [
        dek for n, dek in enumerate(deks) if n not in {3, 7, 9, 11}
    ]
    unknown = found[11]
    assert isinstance(unknown, UnknownRoot)
    assert unknown.code == "root_unknown"
    assert str(stranger) in unknown.public
    assert "copy the new keyring file here" in unknown.public
    assert provider.worker.unwrap_many([]) == []


def test_both_purposes_go_through_one_call(provider):
    """A host that may open both (in tests; no policy of ours) gets each in its place."""
    deks, credentials = batch(provider.operator, "credentials", 2)
    _, records = batch(provider.worker, "records", 1)
    mixed = [credentials[0], records[0], credentials[1]]
    try:
        found = provider.worker.unwrap_many(mixed)
    except KmsDenied:
        found = provider.worker.unwrap_many(credentials)
        assert found == deks
        return
    assert (found[0], found[2]) == (deks[0], deks[1])
    assert isinstance(found[1], UnsealError)


def test_a_root_is_named_alike_everywhere(provider):
    for purpose in PURPOSES:
        wraps, opens = provider.wraps(purpose), provider.unwraps(purpose)
        assert wraps.active_root(purpose) == opens.active_root(purpose)
        wrapped = wraps.wrap(purpose, b"k" * 32, context(purpose))
        assert wrapped.root_id == wraps.active_root(purpose)
        assert opens.holds(wrapped.root_id)
        assert opens.can_unwrap(purpose)
        (shown,) = [s for s in wraps.status() if s.purpose == purpose]
        assert (shown.root_id, shown.state) == (wrapped.root_id, "active")
        assert (shown.can_wrap, shown.can_unwrap) == (True, False)
        assert abs(time.time() - shown.created_at.timestamp()) < 600


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_rotation_wraps_again_and_the_old_root_can_go(provider, purpose):
    wraps, opens = provider.wraps(purpose), provider.unwraps(purpose)
    deks, old = batch(wraps, purpose, 5)
    before = wraps.active_root(purpose)
    provider.rotate(purpose)
    now = wraps.active_root(purpose)
    assert now != before
    assert opens.unwrap_many(old) == deks, "what was wrapped before still opens"
    assert wraps.wrap(purpose, b"k" * 32, context(purpose)).root_id == now
    moved = (old[0][0], replace(old[0][1], account_id=uuid4()))
    again = opens.rewrap_many([*old, moved])
    assert isinstance(again[-1], UnsealError), "a rewrap keeps a key where it belongs"
    fresh = [one for one in again if isinstance(one, Wrapped)]
    assert {one.root_id for one in fresh} == {now}
    contexts = [c for _, c in old]
    assert opens.unwrap_many(list(zip(fresh, contexts, strict=True))) == deks
    provider.retire(purpose)
    assert not opens.holds(before)
    assert opens.holds(now)
    assert all(isinstance(one, CryptoError) for one in opens.unwrap_many(old))
    assert opens.unwrap_many(list(zip(fresh, contexts, strict=True))) == deks


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_canary_tells_the_right_keyring_from_another(provider, purpose, tmp_path):
    wraps, opens = provider.wraps(purpose), provider.unwraps(purpose)
    root_id, canary = wraps.active_root(purpose), make_canary(wraps, purpose)
    assert check_canary(opens, purpose, root_id, canary)
    assert not check_canary(opens, purpose, root_id, canary[:-1] + bytes([canary[-1] ^ 1]))
    assert not check_canary(opens, purpose, uuid4(), canary)
    assert not check_canary(opens, purpose, root_id, b"")
    other = of_files(tmp_path / "other")
    assert not check_canary(other.unwraps(purpose), purpose, root_id, canary)


def test_the_self_test_passes_in_less_than_a_second_on_both_hosts(provider):
    started = time.perf_counter()
    selftest(provider.operator)
    selftest(provider.worker)
    assert time.perf_counter() - started < 2.0
    selftest(KeyCache(provider.worker))


def test_keyrings_show_and_pickle_nothing(provider):
    import pickle

    assert len(repr(provider.worker)) < 60
    with pytest.raises(TypeError):
        pickle.dumps(provider.worker)


def test_a_key_is_wrapped_for_its_own_purpose_only(provider):
    with pytest.raises(ValueError, match="purpose of its context"):
        provider.operator.wrap("credentials", b"k" * 32, context("records"))


# ── what only a KMS can do wrong ─────────────────────────────────────────────────────────────


def test_the_servers_own_policies_stop_what_a_host_may_not_do(mounted):
    operator, worker = mounted.open("operator"), mounted.open("worker")
    _, items = batch(operator, "credentials", 1)
    _, records = batch(worker, "records", 1)
    for forbidden in (
        lambda: operator.unwrap_many(items),
        lambda: operator.wrap("records", b"k" * 32, records[0][1]),
        lambda: worker.unwrap_many(records),
        lambda: worker.rotate("credentials"),
        lambda: operator.retire_below("credentials", operator.active_root("credentials")),
    ):
        with pytest.raises(KmsDenied, match=r"docs/keys\.md") as caught:
            forbidden()
        assert caught.value.code == "kms_denied"
    assert (operator.can_unwrap("records"), worker.can_unwrap("records")) == (True, False)


def test_a_misspelt_name_makes_no_key_and_a_key_that_is_not_derived_is_refused(mounted, tmp_path):
    token = write_token(tmp_path / "all.token", mounted.bao.token("root"))
    uri = mounted.bao.uri(mounted.mount, token)
    with pytest.raises(KmsDenied, match="has no"):
        opened(uri.replace("/syncward?", "/synkward?")).wrap(
            "credentials", b"k" * 32, context("credentials")
        )
    listed = mounted.bao.ask("LIST", f"{mounted.mount}/keys")["data"]["keys"]
    assert sorted(listed) == ["syncward-credentials", "syncward-records"]
    mounted.bao.ask("POST", f"{mounted.mount}/keys/plain-credentials", type="aes256-gcm96")
    with pytest.raises(KeyringError, match="not derived"):
        opened(uri.replace("/syncward?", "/plain?")).active_root("credentials")
    with pytest.raises(KmsDenied, match="has no"):
        opened(mounted.bao.uri("nowhere", token)).status()


def test_a_token_is_read_again_when_its_file_changes_and_after_a_refusal(mounted):
    keyring = mounted.open("worker")
    path = mounted.directory / "worker.token"
    first = path.read_text().strip()
    _, items = batch(mounted.open("operator"), "credentials", 1)
    assert keyring.can_unwrap("credentials")
    mounted.bao.revoke(first)
    with pytest.raises(KmsDenied):
        keyring.unwrap_many(items)
    write_token(path, mounted.bao.token(f"{mounted.mount}-worker"))
    assert isinstance(keyring.unwrap_many(items)[0], bytes)
    write_token(path, mounted.bao.token(f"{mounted.mount}-operator"))
    with pytest.raises(KmsDenied):
        keyring.unwrap_many(items)
    assert not keyring.can_unwrap("credentials"), "another token has other rights"


def test_somebody_elses_rotation_is_noticed_and_used_only_when_it_is_preferred(mounted):
    operator, worker = mounted.open("operator"), mounted.open("worker")
    before = operator.active_root("credentials")
    assert operator.prefer(before)
    assert worker.active_root("credentials") == before
    fresh = mounted.open("admin").rotate("credentials")
    operator.reload()
    _, items = batch(operator, "credentials", 1)
    assert items[0][0].root_id == operator.active_root("credentials") == before != fresh
    assert operator.prefer(fresh)
    deks, items = batch(operator, "credentials", 1)
    assert items[0][0].root_id == operator.active_root("credentials") == fresh
    assert worker.unwrap_many(items) == deks
    assert worker.holds(fresh)
    assert not worker.reload()


def test_a_root_that_is_not_of_this_key_is_not_retired(mounted):
    admin = mounted.open("admin")
    with pytest.raises(KeyringError, match="no live version"):
        admin.retire_below("credentials", admin.active_root("records"))


def test_sealed_and_stopped_servers_make_runs_wait(bao, mounted, tmp_path):
    worker = mounted.open("worker")
    _, items = batch(mounted.open("operator"), "credentials", 1)
    cache = KeyCache(worker)
    cache.unwrap_many(items)
    bao.seal()
    try:
        with pytest.raises(KmsUnavailable, match="sealed") as caught:
            worker.unwrap_many(items)
        assert isinstance(cache.unwrap_many(items)[0], bytes), "until its time is over"
        cache.flush()
        with pytest.raises(KmsUnavailable):
            cache.unwrap_many(items)
    finally:
        bao.unseal()
    assert isinstance(caught.value, Deferral)
    assert caught.value.retry_after is not None
    assert caught.value.retry_after.total_seconds() == 15
    assert FAILURES[caught.value.code].who is Who.TIME_TOLD
    assert isinstance(worker.unwrap_many(items)[0], bytes), "and then all is well again"
    with Bao(tmp_path) as other:
        other.mount("transit")
        token = write_token(tmp_path / "t", other.token("transit-worker"))
        alone = opened(other.uri("transit", token))
        assert len(alone.status()) == 2
        other.stop()
        with pytest.raises(KmsUnavailable, match="cannot be reached"):
            alone.reload()


def test_a_certificate_that_is_not_trusted_is_not_asked(mounted, tmp_path):
    uri = mounted.uri("worker")
    untrusted = uri.split("&ca=")[0]
    with pytest.raises(KmsUnavailable, match="certificate that is not trusted"):
        opened(untrusted).active_root("records")
    empty = tmp_path / "ca.pem"
    empty.write_text("")
    with pytest.raises(KeyringError, match="holds no certificates"):
        opened(f"{untrusted}&ca={empty}")


@pytest.mark.integration
def test_a_run_waits_while_the_kms_is_away_and_then_succeeds(world, mounted):
    """T10: on real servers, with both policies; nothing falls back to an older key or a file."""
    world.cli.__dict__["settings"] = world.cli.settings.model_copy(
        update={"keyring": mounted.uri("operator")}
    )
    cache = KeyCache(mounted.open("worker"))
    world.deps = replace(world.deps, keyring=cache)
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1), (2)")
    world.apply({"public.t": "{mode: replace}"})
    selftest(cache)
    mounted.bao.seal()
    try:
        run, _ = world.sync()
        assert (run.state, run.error_code) == (RunState.QUEUED, "kms_unavailable")
        assert run.attempt == 0, "waiting is no attempt"
        assert "sealed" in (run.error or "")
        assert "run.requeued" in world.events(run.run_id)
    finally:
        mounted.bao.unseal()
    world.control.act("UPDATE active_runs SET not_before = now() - interval '1 s'")
    world.step()
    assert world.run(run.run_id).state is RunState.SUCCEEDED
    mounted.bao.revoke((mounted.directory / "worker.token").read_text().strip())
    cache.flush()
    refused, _ = world.sync()
    assert (refused.state, refused.error_code) == (RunState.FAILED, "kms_denied")
    said = (refused.error or "") + world.log(refused.run_id)
    assert not [secret for secret in world.pair.logins.values() if secret in said]


# ── servers that are none, or ill ────────────────────────────────────────────────────────────


class Ill:
    """Accepts connections and answers each request with the same bytes, piece by piece."""

    def __init__(self, *pieces: bytes, pause_s: float = 0.0) -> None:
        self._pieces, self._pause_s = pieces, pause_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.asked = 0
        self.heard = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=[connection], daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        self.asked += 1
        self.heard += connection.recv(65536)
        try:
            for piece in self._pieces:
                connection.sendall(piece)
                time.sleep(self._pause_s)
        except OSError:
            pass
        connection.close()


def http(status: str, body: str = f'{{"errors": ["{MARK}"]}}', *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return ("\r\n".join([*lines, "", ""]) + body).encode()


def keyring_at(port: int, directory: Path) -> vault.VaultKeyring:
    token = write_token(directory / "token", MARK)
    return opened(f"vault+http://127.0.0.1:{port}/transit/syncward?token={token}")


def everything_said(error: BaseException) -> str:
    """Tracebacks, texts and attributes of an exception and of whatever hangs on it."""
    said = ""
    todo: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while todo:
        one = todo.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        said += "".join(traceback.format_exception(one)) + repr(one) + repr(one.args)  # noqa: TID251 - what it would say is what is tested
        said += repr({k: str(v) for k, v in getattr(one, "__dict__", {}).items()})
        todo += [one.__cause__, one.__context__]
    return said


GOOD_KEY = (
    '{"data": {"derived": true, "exportable": false, "keys": {"1": 1}, '
    '"latest_version": 1, "min_decryption_version": 1}}'
)


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (http("500 Error"), KmsUnavailable, "status 500"),
        (http("503 Sealed"), KmsUnavailable, "sealed"),
        (http("429 Slow"), KmsUnavailable, "status 429"),
        (http("307 There", "", "Location: http://127.0.0.1:1/"), KmsUnavailable, "status 307"),
        (http("403 No"), KmsDenied, "refuses this host's token"),
        (http("404 No"), KmsDenied, "has no"),
        (http("400 Bad"), KeyringError, "not derived"),
        (http("200 OK", MARK), KmsUnavailable, "no Vault answers"),
        (http("200 OK", f'["{MARK}"]'), KmsUnavailable, "no Vault answers"),
        (http("200 OK", GOOD_KEY.replace("true", "false")), KeyringError, "not derived"),
        (http("200 OK", GOOD_KEY.replace('"1": 1', '"1": {}')), KeyringError, "which versions"),
        (http("200 OK", GOOD_KEY.replace('{"1": 1}', "[]")), KeyringError, "which versions"),
        (f"SSH-2.0-{MARK}\r\n".encode(), KmsUnavailable, "cannot be reached"),
    ],
)
def test_no_answer_of_a_server_is_ever_quoted(tmp_path, caplog, answer, error, said):
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    with Ill(answer) as ill:
        keyring = keyring_at(ill.port, tmp_path)
        with pytest.raises(error, match=said) as caught:
            keyring.active_root("records")
        assert f"X-Vault-Token: {MARK}".lower().encode() in ill.heard.lower()
    assert MARK not in everything_said(caught.value)
    assert MARK not in caplog.text
    assert "/v1/" not in caplog.text, "the clients' own lines stay off"


def test_a_lost_connection_is_tried_once_more_and_not_for_ever(tmp_path):
    with Ill(b"") as ill:
        with pytest.raises(KmsUnavailable):
            keyring_at(ill.port, tmp_path).active_root("records")
        assert ill.asked == 2


@pytest.mark.parametrize("drips", [False, True])
def test_a_server_that_hangs_or_drips_is_left_within_the_timeout(tmp_path, monkeypatch, drips):
    monkeypatch.setattr(transit, "READ_S", 0.5)
    monkeypatch.setattr(transit, "TOTAL_S", 1.0)
    pieces = [http("200 OK", " " * 500)[:-480], *[b" "] * 200] if drips else [b"", b""]
    with Ill(*pieces, pause_s=0.05 if drips else 5.0) as ill:
        keyring = keyring_at(ill.port, tmp_path)
        started = time.monotonic()
        with pytest.raises(KmsUnavailable, match="in time"):
            keyring.active_root("records")
        assert time.monotonic() - started < 4.0


def test_an_endless_answer_is_left_too(tmp_path, monkeypatch):
    monkeypatch.setattr(transit, "ANSWER_MAX", 1_000)
    with Ill(http("200 OK", "x" * 100_000)) as ill, pytest.raises(KmsUnavailable):
        keyring_at(ill.port, tmp_path).active_root("records")


# ── what is refused before anybody is asked ──────────────────────────────────────────────────


@pytest.mark.parametrize(
    "uri",
    [
        "vault://host/transit/syncward",
        "vault://host/transit/syncward?token=relative",
        "vault://host/transit?token=/t",
        "vault:///transit/syncward?token=/t",
        "vault://user:pw@host/transit/syncward?token=/t",
        "vault://host/transit/syncward?token=/t&namespace=x",
        "vault://host/transit/syncward?token=/t#x",
        "vault://host/../syncward?token=/t",
        "vault://host/tran%2fsit/syncward?token=/t",
        "vault://host:port/transit/syncward?token=/t",
        "vault://host/transit/sync ward?token=/t",
    ],
)
def test_a_uri_of_another_form_is_refused_with_the_right_form(uri):
    with pytest.raises(KeyringError, match="write vault://host:8200/mount/name") as caught:
        keyrings.load(uri)
    assert "pw@" not in str(caught.value)


def test_without_tls_only_this_host_is_asked(tmp_path):
    token = write_token(tmp_path / "token", "x")
    for host in ("10.0.0.1", "kms.example", "127.0.0.1.example", "localhost.example"):
        with pytest.raises(KeyringError, match="without TLS"):
            keyrings.load(f"vault+http://{host}/transit/syncward?token={token}")
    for host in ("127.0.0.1", "[::1]:8300", "localhost"):
        keyring = keyrings.load(f"vault+http://{host}/transit/syncward?token={token}")
        assert keyring.scheme == "vault"
        keyring.close()


@pytest.mark.parametrize("scheme", ["aws-kms", "gcp-kms", "env", "http", "https", "base64"])
def test_any_other_kind_is_refused_clearly(scheme):
    with pytest.raises(KeyringError, match="no such kind") as caught:
        keyrings.load(f"{scheme}://key-material-{MARK}")
    assert "docs/keys.md" in caught.value.public
    assert MARK not in caught.value.public


def test_a_token_that_others_can_read_or_that_is_none_is_refused(tmp_path):
    path = write_token(tmp_path / "token", "x y")
    uri = f"vault+http://127.0.0.1:1/transit/syncward?token={path}"
    with pytest.raises(KeyringError, match="holds no token"):
        keyrings.load(uri)
    write_token(path, "fine")
    path.chmod(0o644)
    with pytest.raises(KeyringError, match=f"KMS token .*chmod 600 {path}"):
        keyrings.load(uri)
    with pytest.raises(KeyringError, match="no such file"):
        keyrings.load(uri + "x")


def test_the_environment_sends_no_token_through_a_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with Ill(http("200 OK", GOOD_KEY)) as ill:
        keyring_at(ill.port, tmp_path).active_root("records")
        assert ill.asked == 1


def test_tls_is_1_2_at_least_and_checks_names(mounted):
    context = transit._trust(mounted.bao.ca)
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
