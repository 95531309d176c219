"""Unwrapped keys are kept for minutes, for exactly what was asked, and asked for once."""

import pickle
import threading
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from crypto import cache as caches
from crypto.cache import KEYS_MAX, TTL_S, USES_MAX, KeyCache
from crypto.envelope import Context
from crypto.errors import KmsUnavailable, UnsealError
from crypto.kms import file
from crypto.roots import WrapContext, Wrapped
from crypto.seal import new_dek, seal
from schemas.redaction import Holder, Redactor
from storage.keystore import StoredKey
from storage.work import SealedField, SealedResource
from workers.ends import unsealed, warm


class Counting(file.FileKeyring):
    """A real keyring that counts its calls, may wait in them and may be away."""

    def __init__(self, path):
        super().__init__(path)
        self.calls: list[int] = []
        self.away = False
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def unwrap_many(self, items):
        self.calls.append(len(items))
        self.entered.set()
        assert self.go_on.wait(20)
        if self.away:
            raise KmsUnavailable("KMS: away")
        return super().unwrap_many(items)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def keyring(tmp_path):
    return Counting(file.init(tmp_path / "keys")[1])


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def cache(keyring, clock):
    return KeyCache(keyring, clock)


def item(keyring, dek: bytes = b"k" * 32):
    context = WrapContext(uuid4(), "credentials", uuid4())
    return keyring.wrap("credentials", dek, context), context


def test_a_key_is_asked_for_once_until_its_time_is_over(cache, keyring, clock):
    one = item(keyring)
    assert [cache.unwrap_many([one]) for _ in range(3)] == [[b"k" * 32]] * 3
    assert keyring.calls == [1]
    clock.now = TTL_S - 0.1
    cache.unwrap_many([one])
    assert keyring.calls == [1]
    clock.now = TTL_S
    cache.unwrap_many([one])
    assert keyring.calls == [1, 1]
    assert TTL_S == 300


def test_a_key_is_used_a_bounded_number_of_times(cache, keyring, monkeypatch):
    assert USES_MAX == 2**20
    monkeypatch.setattr(caches, "USES_MAX", 5)
    one = item(keyring)
    for _ in range(6):
        cache.unwrap_many([one])
    assert keyring.calls == [1, 1]


def test_a_batch_asks_once_for_what_is_missing_and_keeps_the_order(cache, keyring):
    items = [item(keyring, bytes([n]) * 32) for n in range(1, 6)]
    cache.unwrap_many(items[1:3])
    assert cache.unwrap_many([*items, items[0]]) == [bytes([n]) * 32 for n in (1, 2, 3, 4, 5, 1)]
    assert keyring.calls == [2, 3]


@pytest.mark.parametrize("part", ["account_id", "purpose", "dek_id"])
def test_a_remembered_key_is_not_given_out_for_another_place(cache, keyring, part):
    wrapped, context = item(keyring)
    cache.unwrap_many([(wrapped, context)])
    wrong = replace(context, **{part: "records" if part == "purpose" else uuid4()})
    assert isinstance(cache.unwrap_many([(wrapped, wrong)])[0], UnsealError)


def test_a_remembered_key_is_not_given_out_for_other_wrapped_bytes(cache, keyring):
    wrapped, context = item(keyring)
    cache.unwrap_many([(wrapped, context)])
    other = replace(wrapped, blob=wrapped.blob[:-1] + bytes([wrapped.blob[-1] ^ 1]))
    assert isinstance(cache.unwrap_many([(other, context)])[0], UnsealError)
    elsewhere = Wrapped(UUID(int=1), wrapped.blob)
    assert not isinstance(cache.unwrap_many([(elsewhere, context)])[0], bytes)


def test_errors_are_not_remembered(cache, keyring):
    wrapped, context = item(keyring)
    broken = (replace(wrapped, blob=b"x"), context)
    cache.unwrap_many([broken])
    cache.unwrap_many([broken])
    assert keyring.calls == [1, 1]
    assert len(cache) == 0


def test_an_expired_key_is_never_used_because_the_kms_is_away(cache, keyring, clock):
    one = item(keyring)
    cache.unwrap_many([one])
    keyring.away = True
    assert cache.unwrap_many([one]) == [b"k" * 32]
    clock.now = TTL_S
    with pytest.raises(KmsUnavailable):
        cache.unwrap_many([one])
    keyring.away = False
    assert cache.unwrap_many([one]) == [b"k" * 32]


def test_the_number_of_keys_is_bounded_and_the_oldest_goes_first(cache, keyring, monkeypatch):
    assert KEYS_MAX == 1_000
    monkeypatch.setattr(caches, "KEYS_MAX", 3)
    items = [item(keyring) for _ in range(4)]
    cache.unwrap_many(items[:3])
    cache.unwrap_many(items[:1])  # used again: the second is the oldest now
    cache.unwrap_many(items[3:])
    assert len(cache) == 3
    cache.unwrap_many([items[0], items[2], items[3]])
    assert keyring.calls == [3, 1]
    cache.unwrap_many([items[1]])
    assert keyring.calls == [3, 1, 1]


def ask(cache, items, answers):
    def run():
        try:
            answers.append(cache.unwrap_many(items))
        except KmsUnavailable as error:
            answers.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("away", [False, True])
def test_many_who_want_one_key_make_one_call_and_get_one_answer(cache, keyring, away):
    one, two = item(keyring), item(keyring, b"t" * 32)
    keyring.away = away
    keyring.go_on.clear()
    answers: list[object] = []
    threads = [ask(cache, [one], answers)]
    assert keyring.entered.wait(20)
    threads += [ask(cache, [one], answers) for _ in range(10)]
    threads.append(ask(cache, [two, one], answers))
    while len(keyring.calls) < 2:  # the last one asks for its own key meanwhile
        pass
    keyring.go_on.set()
    for thread in threads:
        thread.join(20)
    assert sorted(keyring.calls) == [1, 1]
    if away:
        assert all(isinstance(answer, KmsUnavailable) for answer in answers)
        assert len(answers) == 12
        keyring.away = False
        assert cache.unwrap_many([one]) == [b"k" * 32]
    else:
        assert answers.count([b"k" * 32]) == 11
        assert answers.count([b"t" * 32, b"k" * 32]) == 1


def test_what_is_flushed_while_it_is_asked_for_is_not_remembered(cache, keyring):
    one = item(keyring)
    keyring.go_on.clear()
    answers: list[object] = []
    thread = ask(cache, [one], answers)
    assert keyring.entered.wait(20)
    cache.flush()
    keyring.go_on.set()
    thread.join(20)
    assert answers == [[b"k" * 32]]
    assert len(cache) == 0


def test_new_roots_flush_the_cache(tmp_path):
    files = file.init(tmp_path / "keys")
    keyring = Counting(files[1])
    cache = KeyCache(keyring)
    one = item(keyring)
    cache.unwrap_many([one])
    assert not cache.reload()
    assert len(cache) == 1
    file.add_root(*files, "credentials")
    assert cache.reload()
    assert len(cache) == 0


def test_a_cache_is_a_keyring_and_shows_nothing(cache, keyring):
    one = item(cache)
    assert cache.active_root("credentials") == one[0].root_id
    assert cache.can_unwrap("credentials")
    assert cache.holds(one[0].root_id)
    assert cache.status() == keyring.status()
    assert isinstance(cache.rewrap_many([one])[0], Wrapped)
    assert len(cache.wrap_many("credentials", [(b"x" * 32, one[1])])) == 1
    cache.unwrap_many([one])
    assert "kkkk" not in repr(cache) + str(vars(cache))
    with pytest.raises(TypeError):
        pickle.dumps(cache)
    cache.close()
    assert len(cache) == 0


def test_both_ends_of_a_run_are_opened_with_one_call(cache, keyring):
    ends = [end_of_a_run(keyring, name) for name in ("shop", "lake")]
    warm(cache, *ends, None)
    holder = Holder(Redactor())
    found = [unsealed(end, cache, holder)["password"] for end in ends]
    assert found == ["of shop", "of lake"]
    assert keyring.calls == [2]


def end_of_a_run(keyring, name: str) -> SealedResource:
    dek_id, dek = new_dek()
    account_id, resource_id = uuid4(), uuid4()
    wrapped = keyring.wrap("credentials", dek, WrapContext(account_id, "credentials", dek_id))
    context = Context(account_id, "resource", resource_id, "password", 1)
    field = SealedField(
        "password", 1, seal(dek, dek_id, f"of {name}".encode(), context),
        StoredKey(dek_id, account_id, wrapped.root_id, wrapped.blob),
    )  # fmt: skip
    return SealedResource(resource_id, account_id, name, "postgres", {}, (field,))
