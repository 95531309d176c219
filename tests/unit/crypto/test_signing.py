"""Signed notes and the key behind them: checked with `cryptography` alone, and every refusal."""

import base64
import copy
import hashlib
import json
import pickle
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from crypto import signing
from crypto.errors import KeyringError
from crypto.signing import PublicKey

TEXT = "syncward/audit/x\n5\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"

#: The example of the signed-note specification (Go's sumdb/note).
EXAMPLE_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
EXAMPLE = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n\n"
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6"
    "KE6RyyBwJnAM=\n"
)


@pytest.fixture
def path(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "keys" / "signer.json"


@pytest.fixture
def signer(path):
    signing.init(path)
    return signing.load(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A signer of its own for tests of many examples."""
    path = tmp_path_factory.mktemp("signer") / "signer.json"
    signing.init(path)
    return signing.load(path)


def test_it_reads_the_note_of_the_specification():
    key = PublicKey.parse(EXAMPLE_KEY)
    assert key.line == EXAMPLE_KEY
    text, signatures = signing.parse_note(EXAMPLE)
    assert signing.note(text, signatures) == EXAMPLE
    assert signing.signed_by(text, signatures, [key]) == [key]


def test_a_note_verifies_without_our_code(signer):
    note = signing.note(TEXT, signer.sign(TEXT))
    body, _, last = note.rpartition("\n\n")
    name, hash_, key = signer.public[0].line.split("+", 2)
    raw_key = base64.b64decode(key)
    assert raw_key[:1] == b"\x01"
    expected = hashlib.sha256(name.encode() + b"\n" + raw_key).digest()[:4]
    assert expected.hex() == hash_
    dash, signed_name, signature = last.removesuffix("\n").split(" ")
    raw = base64.b64decode(signature)
    assert (dash, signed_name, raw[:4]) == ("—", name, expected)
    Ed25519PublicKey.from_public_bytes(raw_key[1:]).verify(raw[4:], f"{body}\n".encode())


@given(st.data())
def test_one_other_byte_in_text_or_signature_is_a_forgery(made, data):
    raw = bytearray(base64.b64decode(made.sign(TEXT).split(" ")[2]))
    place = data.draw(st.integers(4, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    name = made.public[0].name
    forged = f"— {name} {base64.b64encode(raw).decode()}\n"
    with pytest.raises(ValueError, match="is forged"):
        signing.signed_by(TEXT, forged, made.public)
    with pytest.raises(ValueError, match="is forged"):
        signing.signed_by(TEXT + "x", made.sign(TEXT), made.public)


@pytest.mark.parametrize("length", [0, 3, 4, 5, 67, 69, 200])
def test_a_signature_of_another_length_is_unknown_or_forged(signer, length):
    raw = (signer.public[0].hash + bytes(200))[:length]
    line = f"— {signer.public[0].name} {base64.b64encode(raw).decode()}\n"
    if length >= 4:
        with pytest.raises(ValueError, match="forged"):
            signing.signed_by(TEXT, line, signer.public)
    elif length:
        assert signing.signed_by(TEXT, line, signer.public) == []
    else:
        with pytest.raises(ValueError, match="malformed"):
            signing.signed_by(TEXT, line, signer.public)


def test_signatures_of_unknown_keys_are_passed_over(signer, tmp_path):
    signing.init(tmp_path / "other.json")
    other = signing.load(tmp_path / "other.json")
    both = other.sign(TEXT) + signer.sign(TEXT)
    assert signing.signed_by(TEXT, both, signer.public) == [*signer.public]
    assert signing.signed_by(TEXT, both, [*signer.public, *other.public]) == [
        *other.public, *signer.public
    ]  # fmt: skip
    assert signing.signed_by(TEXT, other.sign(TEXT), signer.public) == []


def test_the_name_of_a_key_alone_convinces_nobody(signer, tmp_path):
    signing.init(tmp_path / "other.json")
    other = signing.load(tmp_path / "other.json")
    raw = base64.b64decode(other.sign(TEXT).split(" ")[2])
    ours = signer.public[0]
    stolen = f"— {ours.name} {base64.b64encode(raw).decode()}\n"
    assert signing.signed_by(TEXT, stolen, signer.public) == []
    line = f"— {ours.name} {base64.b64encode(ours.hash + raw[4:]).decode()}\n"
    with pytest.raises(ValueError, match="forged"):
        signing.signed_by(TEXT, line, signer.public)


@pytest.mark.parametrize("line", [
    "", "- name AAAA", "—name AAAA", "— name", "— na me AAAA", "— n+e AAAA", "— name A*AA",
    "— name AAAA ", " — name AAAA", "— name  AAAA",
])  # fmt: skip
def test_malformed_signature_lines_are_refused(line):
    with pytest.raises(ValueError, match="malformed"):
        signing.signed_by(TEXT, f"{line}\n", [])
    with pytest.raises(ValueError, match="not a signed note"):
        signing.parse_note(f"{TEXT}\n{line}\n")


@pytest.mark.parametrize("note", ["", "\n", TEXT, f"{TEXT}\n", f"{TEXT}\n— a AAAA", "\n\n"])
def test_what_is_no_note_is_refused(note):
    with pytest.raises(ValueError, match="not a signed note"):
        signing.parse_note(note)


@pytest.mark.parametrize("line", [
    "", "a", "a+b+c", EXAMPLE_KEY.replace("c74f20a3", "c74f20a4"), EXAMPLE_KEY.replace("+A", "+B"),
    EXAMPLE_KEY[:-4], EXAMPLE_KEY + "AAAA", EXAMPLE_KEY.upper(), "Peter " + EXAMPLE_KEY,
    EXAMPLE_KEY.replace("PeterNeumann", "PaulNeumann"),
])  # fmt: skip
def test_what_is_no_key_line_is_refused(line):
    with pytest.raises(ValueError, match=r"not|padding|base64"):
        PublicKey.parse(line)


@given(st.text(max_size=200))
def test_no_text_makes_the_readers_fail_otherwise(text):
    for read in (PublicKey.parse, signing.parse_note, lambda t: signing.signed_by(TEXT, t, [])):
        try:
            read(text)
        except ValueError:
            continue


# ── the file ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("signer")
def test_only_its_owner_reads_the_key(path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o640)
    with pytest.raises(KeyringError, match="others can read it"):
        signing.load(path)


@pytest.mark.usefixtures("signer")
def test_a_key_is_never_overwritten(path):
    before = path.read_bytes()
    with pytest.raises(KeyringError, match="never overwritten"):
        signing.init(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_rotation_signs_with_both_until_the_old_key_is_retired(path, signer):
    (old,) = signer.public
    new = signing.rotate(path)
    both = signing.load(path)
    assert both.public == (new, old)
    assert signing.signed_by(TEXT, both.sign(TEXT), [old]) == [old]
    assert signing.signed_by(TEXT, both.sign(TEXT), [new, old]) == [new, old]
    with pytest.raises(KeyringError, match="a rotation is not finished"):
        signing.rotate(path)
    assert signing.retire(path) == old
    assert signing.load(path).public == (new,)
    with pytest.raises(KeyringError, match="nothing to retire"):
        signing.retire(path)
    again = signing.rotate(path)
    assert again.name.partition("~")[0] == new.name.partition("~")[0] == old.name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("change", [
    lambda d: d.update(format="other"), lambda d: d.update(keys=[]), lambda d: d.pop("keys"),
    lambda d: d.update(keys=d["keys"] * 3), lambda d: d["keys"][0].pop("private"),
    lambda d: d["keys"][0].update(private="AAAA"), lambda d: d["keys"][0].update(private=5),
    lambda d: d["keys"][0].update(private="*"), lambda d: d["keys"][0].update(name=5),
    lambda d: d["keys"][0].update(name="a b"), lambda d: d["keys"][0].update(state="?"),
    lambda d: d.update(keys={"a": 1}),
], ids=range(12))  # fmt: skip
@pytest.mark.usefixtures("signer")
def test_a_file_that_was_changed_is_refused(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(KeyringError, match="not a signing key's file") as refused:
        signing.load(path)
    _shows_nothing(path, str(refused.value))


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"5"])
@pytest.mark.usefixtures("signer")
def test_a_file_of_something_else_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(KeyringError, match="not a signing key's file"):
        signing.load(path)


def test_a_missing_key_says_how_to_make_one(path):
    with pytest.raises(KeyringError, match="audit key init"):
        signing.load(path)


def test_nothing_shows_the_private_half(path, signer):
    _shows_nothing(path, repr(signer), str(signer), str(vars(signer)))
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            copied(signer)


def _shows_nothing(path, *shown: str) -> None:
    try:
        private = json.loads(path.read_text())["keys"][0]["private"]
        raw = base64.b64decode(private)
    except (LookupError, ValueError, TypeError):
        return
    for text in shown:
        assert str(private) not in text
        assert not raw or raw.hex() not in text


def test_public_keys_are_read_one_a_line(tmp_path, signer):
    file = tmp_path / "public"
    file.write_text(f"# ours\n\n{signer.public[0].line}\n{EXAMPLE_KEY}\n")
    assert signing.read_public(file) == [signer.public[0], PublicKey.parse(EXAMPLE_KEY)]
    for content in ("", "# nothing\n", "rubbish\n"):
        file.write_text(content)
        with pytest.raises(KeyringError, match="audit key show"):
            signing.read_public(file)
    with pytest.raises(KeyringError, match="audit key show"):
        signing.read_public(tmp_path / "missing")
