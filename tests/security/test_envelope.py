"""What attackers may do to envelopes and keys opens nothing (T1, T3, T4, T11, T12)."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB

from crypto import keyring as keyrings
from crypto.envelope import CHUNK, Context, header
from crypto.errors import CryptoError, UnknownRoot, UnsealError
from crypto.opening import open_envelope
from crypto.records import open_record_stream, open_records
from crypto.roots import Keyring, Sealed, WrapContext
from crypto.seal import new_dek, seal
from crypto.selftest import selftest
from crypto.streams import open_stream, seal_stream
from crypto.unseal import unseal_credential, unseal_credentials

ROOT = Path(__file__).parents[2]
SEALED_CHUNK = CHUNK + 16


@pytest.fixture
def keys(tmp_path) -> tuple[Keyring, Keyring]:
    operator, worker = (keyrings.load(str(path)) for path in keyrings.init(tmp_path / "keys"))
    return operator, worker


def sealed_by(keyring: Keyring, purpose: keyrings.Purpose, text: bytes, context: Context) -> Sealed:
    dek_id, dek = new_dek()
    wrap = WrapContext(context.account_id, purpose, dek_id)
    wrapped = keyring.wrap(purpose, dek, wrap)
    return Sealed(wrapped, wrap, seal(dek, dek_id, text, context), context)


def credential(keyring: Keyring, text: bytes = b"hunter2-hunter2") -> Sealed:
    return sealed_by(
        keyring, "credentials", text, Context(uuid4(), "resource", uuid4(), "password", 1)
    )


# ── T1: every change of what is stored ───────────────────────────────────────────────────────


def test_every_flipped_bit_of_an_envelope_and_of_its_wrapped_key_is_refused(keys):
    operator, worker = keys
    good = credential(operator)
    assert unseal_credentials(worker, [good]) == [b"hunter2-hunter2"]
    broken = [
        replace(good, envelope=flipped(good.envelope, n, bit))
        for n, bit in product(range(len(good.envelope)), range(8))
    ] + [
        replace(good, wrapped=replace(good.wrapped, blob=flipped(good.wrapped.blob, n, bit)))
        for n, bit in product(range(len(good.wrapped.blob)), range(8))
    ]
    found = unseal_credentials(worker, broken)
    assert len(found) > 1_000
    assert all(isinstance(one, UnsealError) for one in found)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def test_envelopes_swapped_between_rows_accounts_fields_and_versions_are_refused(keys):
    operator, worker = keys
    one, two = credential(operator, b"first secret"), credential(operator, b"second secret")
    swaps = [
        replace(one, envelope=two.envelope),
        replace(one, wrapped=two.wrapped),
        replace(one, wrapped=two.wrapped, wrap=two.wrap, envelope=two.envelope),
        replace(one, context=two.context, wrap=replace(one.wrap, account_id=two.wrap.account_id)),
        replace(one, wrap=replace(one.wrap, dek_id=two.wrap.dek_id)),
        replace(one, wrap=replace(one.wrap, account_id=two.wrap.account_id)),
        *(
            replace(one, context=replace(one.context, **change))
            for change in (
                {"resource_id": two.context.resource_id}, {"field": "sslkey"}, {"version": 2},
                {"kind": "log"}, {"account_id": uuid4()},
            )
        ),
    ]  # fmt: skip
    assert all(isinstance(found, UnsealError) for found in unseal_credentials(worker, swaps))
    whole = replace(two)
    assert unseal_credentials(worker, [one, whole]) == [b"first secret", b"second secret"]


def test_one_that_does_not_open_does_not_keep_others_from_it(keys):
    operator, worker = keys
    items = [credential(operator, b"secret %d" % n) for n in range(3)]
    items[1] = replace(items[1], envelope=b"hunter2")
    found = unseal_credentials(worker, items)
    assert (found[0], found[2]) == (b"secret 0", b"secret 2")
    assert isinstance(found[1], UnsealError)


def test_a_root_that_is_not_here_is_named_and_not_a_broken_secret(keys, tmp_path):
    operator, _ = keys
    good = credential(operator)
    other = keyrings.load(str(keyrings.init(tmp_path / "other")[1]))
    with pytest.raises(UnknownRoot) as caught:
        unseal_credential(other, good.wrapped, good.wrap, good.envelope, good.context)
    assert str(good.wrapped.root_id) in caught.value.public


# ── each function opens its own purpose ──────────────────────────────────────────────────────


class Everything:
    """A host that holds both private halves: the code, not the keys, must tell them apart."""

    def __init__(self, *keyrings_: Keyring) -> None:
        self._keyrings = keyrings_

    def unwrap_many(self, items):
        found: list[bytes | CryptoError] = []
        for item in items:
            answers = [keyring.unwrap_many([item])[0] for keyring in self._keyrings]
            found.append(next((a for a in answers if isinstance(a, bytes)), answers[0]))
        return found


def test_records_do_not_open_credentials_and_credentials_do_not_open_records(keys):
    operator, worker = keys
    both = Everything(operator, worker)
    secret = credential(operator)
    record = sealed_by(worker, "records", b"a line", Context(uuid4(), "log", uuid4(), "body", 1))
    assert open_records(both, [record, secret])[0] == b"a line"
    assert isinstance(open_records(both, [record, secret])[1], UnsealError)
    assert unseal_credentials(both, [secret]) == [b"hunter2-hunter2"]
    assert isinstance(unseal_credentials(both, [record])[0], UnsealError)
    with pytest.raises(UnsealError):
        open_record_stream(both, secret.wrapped, secret.wrap, [secret.envelope], secret.context)
    pieces = open_record_stream(
        both, record.wrapped, record.wrap, [record.envelope], record.context
    )
    assert b"".join(pieces) == b"a line"
    with pytest.raises(CryptoError):
        open_record_stream(worker, record.wrapped, record.wrap, [record.envelope], record.context)


# ── T3: one ciphertext, two keys ─────────────────────────────────────────────────────────────


def gf_multiply(x: int, y: int) -> int:
    """Multiply in GCM's field, bits reflected as in NIST SP 800-38D."""
    product_ = 0
    for bit in range(127, -1, -1):
        if y >> bit & 1:
            product_ ^= x
        x = (x >> 1) ^ (0xE1 << 120 if x & 1 else 0)
    return product_


def gf_inverse(x: int) -> int:
    result, power = 1 << 127, x
    for _ in range(127):  # x ** (2**128 - 2)
        power = gf_multiply(power, power)
        result = gf_multiply(result, power)
    return result


def block_of(key: bytes, block: bytes) -> bytes:
    encryptor = Cipher(AES(key), ECB()).encryptor()  # noqa: S305 - GCM's own building block
    return encryptor.update(block) + encryptor.finalize()


def ciphertext_of_two_keys(one: bytes, two: bytes, nonce: bytes) -> bytes:
    """Return ciphertext and tag that AES-GCM accepts under both keys.

    With C of two blocks the tag is C0*H^3 + C1*H^2 + L*H + E(J0): for a fixed C0 both tags are
    equal for one C1, which is a linear equation.
    """
    h = [int.from_bytes(block_of(key, bytes(16)), "big") for key in (one, two)]
    masks = [int.from_bytes(block_of(key, nonce + b"\0\0\0\1"), "big") for key in (one, two)]
    length, first = 256, int.from_bytes(os.urandom(16), "big")

    def rest(n: int) -> int:
        square = gf_multiply(h[n], h[n])
        return gf_multiply(first, gf_multiply(square, h[n])) ^ gf_multiply(length, h[n]) ^ masks[n]

    squares = gf_multiply(h[0], h[0]) ^ gf_multiply(h[1], h[1])
    second = gf_multiply(rest(0) ^ rest(1), gf_inverse(squares))
    tag = rest(0) ^ gf_multiply(second, gf_multiply(h[0], h[0]))
    return b"".join(part.to_bytes(16, "big") for part in (first, second, tag))


def test_a_ciphertext_of_two_keys_exists_for_bare_gcm_and_not_for_envelopes():
    one, two, nonce = os.urandom(32), os.urandom(32), os.urandom(12)
    forged = ciphertext_of_two_keys(one, two, nonce)
    readings = [AESGCM(key).decrypt(nonce, forged, None) for key in (one, two)]
    assert readings[0] != readings[1], "bare AES-GCM takes one ciphertext for two messages"
    # Below an envelope's front the attacker may put the same trick: it does not get that far.
    context, dek_id = Context(uuid4(), "resource", uuid4(), "password", 1), uuid4()
    good = seal(one, dek_id, b"x" * 32, context)
    for envelope in (good[:77] + forged, header(dek_id) + os.urandom(56) + forged, good):
        opened = []
        for dek in (one, two):
            try:
                opened.append(open_envelope(dek, dek_id, envelope, context))
            except UnsealError:
                continue
        assert len(opened) == (1 if envelope == good else 0)


def test_the_commitment_is_looked_at_before_the_cipher(monkeypatch):
    """Whoever guesses keys learns nothing of a tag: the wrong key never reaches the cipher."""
    from crypto import opening

    context, dek_id = Context(uuid4(), "resource", uuid4(), "password", 1), uuid4()
    envelope = seal(os.urandom(32), dek_id, b"secret", context)

    def reached(*_):
        raise AssertionError

    monkeypatch.setattr(opening, "open_chunk", reached)
    with pytest.raises(UnsealError):
        open_envelope(os.urandom(32), dek_id, envelope, context)


# ── T4: foreign and older formats ────────────────────────────────────────────────────────────


def foreign() -> Iterator[bytes]:
    key, nonce = os.urandom(32), os.urandom(12)
    good = seal(key, UUID(int=5), b"secret", Context(uuid4(), "resource", uuid4(), "password", 1))
    stream = Cipher(AES(key), CTR(bytes(16))).encryptor().update(b"plain words, long enough" * 5)
    yield from (b"", b"hunter2", b"S", b"SY", b"SY\x01\x01", bytes(200), stream)
    yield nonce + AESGCM(key).encrypt(nonce, b"x" * 100, None)
    yield b"gAAAAABm" + b"A" * 120
    yield b"vault:v1:" + b"A" * 120
    yield b'{"ciphertext": "' + b"A" * 120 + b'"}'
    for place, values in (
        (0, b"s\x00"),
        (1, b"y"),
        (2, b"\x00\x02"),
        (3, b"\x00\x02"),
        (20, b"\x02"),
    ):
        for value in values:
            yield good[:place] + bytes((value,)) + good[place + 1 :]
    yield from (good + b"\0", good[:-1], good[1:], good * 2, good[:77], good[:92])


@pytest.mark.parametrize("envelope", list(foreign()), ids=range(len(list(foreign()))))
def test_what_is_not_exactly_our_format_is_refused_never_passed_on(keys, envelope):
    operator, worker = keys
    found = unseal_credentials(worker, [replace(credential(operator), envelope=envelope)])
    assert [str(one) for one in found] == ["cannot be opened"]
    dek_id, dek = new_dek()
    with pytest.raises(UnsealError):
        list(open_stream(dek, dek_id, [envelope], Context(uuid4(), "log", uuid4(), "body", 1)))


# ── T11: streams that are cut, doubled or shuffled ───────────────────────────────────────────

PLACE = Context(UUID(int=1), "output", UUID(int=2), "document", 1)


def streamed() -> tuple[UUID, bytes, bytes, list[bytes]]:
    dek_id, dek = new_dek()
    envelope = b"".join(seal_stream(dek, dek_id, [os.urandom(3 * CHUNK + 100)], PLACE))
    front, body = envelope[:77], envelope[77:]
    return (
        dek_id,
        dek,
        front,
        [body[start : start + SEALED_CHUNK] for start in range(0, len(body), SEALED_CHUNK)],
    )


def changes(chunks: list[bytes]) -> Iterator[list[bytes]]:
    a, b, c, last = chunks
    yield from ([a, b, c], [a, b], [a], [])  # cut at a border
    yield [a, b, c, last[:-1]]
    yield [a, b, c, last[:16]]
    yield [a, b, c[:-1]]
    yield [b, a, c, last]
    yield [a, a, b, c, last]
    yield [a, c, last]
    yield [a, b, last]
    yield [last]
    yield [a, b, c, last, last]
    yield [a, b, c, c, last]
    yield [a, b, c, last + b"\0"]
    yield [a, b, c, last, a]


def test_a_stream_that_was_changed_always_ends_in_an_error():
    dek_id, dek, front, chunks = streamed()
    whole = b"".join(open_stream(dek, dek_id, [front, *chunks], PLACE))
    assert len(whole) == 3 * CHUNK + 100
    broken = list(changes(chunks))
    assert len(broken) >= 16
    for one in broken:
        for pieces in ([front, *one], [front + b"".join(one)], [bytes([b]) for b in front] + one):
            read: list[bytes] = []
            with pytest.raises(UnsealError):
                read.extend(open_stream(dek, dek_id, pieces, PLACE))
            assert whole.startswith(b"".join(read)), "what came out before is genuine"


def test_a_stream_of_another_run_field_or_key_yields_nothing():
    dek_id, dek, front, chunks = streamed()
    for key, key_id, place in (
        (dek, dek_id, replace(PLACE, resource_id=uuid4())),
        (dek, dek_id, replace(PLACE, field="log")),
        (dek, uuid4(), PLACE),
        (os.urandom(32), dek_id, PLACE),
        (dek[:16], dek_id, PLACE),
    ):
        pieces = open_stream(key, key_id, [front, *chunks], place)
        with pytest.raises(UnsealError):
            next(pieces)


# ── T12: a library that is broken ────────────────────────────────────────────────────────────

BREAKAGES = {
    "encrypts to itself": """
        class AESGCM:
            def __init__(self, key): pass
            def encrypt(self, nonce, data, further): return data + bytes(16)
            def decrypt(self, nonce, data, further): return data[:-16]
        aead.AESGCM = AESGCM
        """,
    "tags are not checked": """
        real = aead.AESGCM
        class AESGCM:
            def __init__(self, key): self.real, self.key = real(key), key
            def encrypt(self, *a): return self.real.encrypt(*a)
            def decrypt(self, nonce, data, further):
                from cryptography.hazmat.primitives.ciphers import Cipher
                from cryptography.hazmat.primitives.ciphers.algorithms import AES
                from cryptography.hazmat.primitives.ciphers.modes import CTR
                cipher = Cipher(AES(self.key), CTR(nonce + bytes([0, 0, 0, 2])))
                return cipher.decryptor().update(data[:-16])
        aead.AESGCM = AESGCM
        """,
    "raises what nobody expects": """
        class AESGCM:
            def __init__(self, key): raise SystemError("s3cr3t")
        aead.AESGCM = AESGCM
        """,
    "derives the same key always": """
        from cryptography.hazmat.primitives.kdf import hkdf
        class HKDFExpand:
            def __init__(self, algorithm, length, info): self.length = length
            def derive(self, key): return bytes(self.length)
        hkdf.HKDFExpand = HKDFExpand
        """,
    "signs and accepts anything": """
        from cryptography.hazmat.primitives.asymmetric import ed25519
        class Key:
            def sign(self, message): return bytes(64)
        class Ed25519PrivateKey:
            @staticmethod
            def from_private_bytes(raw): return Key()
        ed25519.Ed25519PrivateKey = Ed25519PrivateKey
        """,
}
CHECK = """
    from crypto import keyring as keyrings
    from crypto.selftest import selftest
    from crypto.errors import SelfTestError
    try:
        selftest(keyrings.load(sys.argv[1]))
    except SelfTestError as error:
        print("stopped:", error.public)
    else:
        print("passed")
"""


def self_test_with(breakage: str, keyring: Path) -> str:
    code = "\n".join(
        textwrap.dedent(part)
        for part in (
            "import sys\nfrom cryptography.hazmat.primitives.ciphers import aead\n", breakage, CHECK
        )
    )  # fmt: skip
    answer = subprocess.run(
        [sys.executable, "-c", code, str(keyring)], capture_output=True, text=True, check=True,
        cwd=ROOT, timeout=60,
    )  # fmt: skip
    return answer.stdout


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_library_stops_the_start(tmp_path, breakage):
    _, worker = keyrings.init(tmp_path / "keys")
    said = self_test_with(BREAKAGES[breakage], worker)
    assert said.startswith("stopped: self-test:"), said
    assert "reinstall Syncward" in said
    assert "s3cr3t" not in said


def test_the_same_program_passes_with_the_real_library(tmp_path):
    _, worker = keyrings.init(tmp_path / "keys")
    assert self_test_with("", worker) == "passed\n"


def test_the_self_test_takes_less_than_a_second(keys):
    times = []
    for _ in range(3):
        started = time.perf_counter()
        for keyring in keys:
            selftest(keyring)
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0
