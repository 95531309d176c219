"""`audit verify`, `export` and `prove` as an operator and an auditor type them."""

import json
from pathlib import Path

import pytest

from cli import main as program
from crypto import signing
from schemas.audit import AuditAction

pytestmark = pytest.mark.integration


@pytest.fixture
def log(grown_log):
    return grown_log(10, 10)


@pytest.fixture
def typed(log, monkeypatch, capsys):
    """Type a command with the settings of the log; get (exit code, stdout, stderr)."""

    def run(*words: object, settings: bool = True, **more: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.chdir(log.directory)
            if settings:
                patch.setenv("SYNCWARD_PROFILE", "development")
                patch.setenv("SYNCWARD_DATABASE_URL", log.control.url)
                patch.setenv("SYNCWARD_AUDIT_PUBLIC_KEY", str(log.pubkey))
                patch.setenv(
                    "SYNCWARD_AUDIT_ANCHORS", f"file://{log.directory}/a.anchor file:///none"
                )
                for name, value in more.items():
                    patch.setenv(name, value)
            patch.setattr("sys.argv", ["syncward", "audit", *map(str, words)])
            code = 0
            try:
                program.main()
            except SystemExit as end:
                code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def newest(log):
    action, body = log.control.all(
        "SELECT action, body FROM audit.event ORDER BY seq DESC LIMIT 1"
    )[0]
    return action, json.loads(body)["detail"]


def test_verify_says_intact_and_leaves_an_event(log, typed):
    code, out, err = typed("verify")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("intact: 21 events, 21 recomputed; 2 checkpoints")
    assert newest(log) == (
        "audit.verified", {"size": 21, "result": "intact", "first_bad": None}
    )  # fmt: skip


def test_verify_names_the_first_bad_event(log, typed):
    log.tamper("UPDATE audit.event SET body = replace(body, 'success', 'refused') "
               "WHERE seq IN (:a, :b)", a=log.seq(7), b=log.seq(17))  # fmt: skip
    code, out, _ = typed("verify")
    assert (code, out.splitlines()[0][:21]) == (10, "TAMPERED at index 7: ")
    assert newest(log)[1] == {"size": 21, "result": "tampered", "first_bad": 7}
    said = json.loads(typed("verify", "--json")[1])
    assert (said["result"], said["first_bad"], said["counts"]["tampered"]) == ("tampered", 7, 4)


def test_verify_takes_the_anchors_of_the_settings(log, typed):
    log.anchor()
    assert json.loads(typed("verify", "--json")[1])["anchored"] == 2


def test_anchors_of_the_settings_that_are_not_compared_are_named_with_the_next_step(log, typed):
    log.anchor()
    _, out, _ = typed("verify")
    assert "note: anchor 2 (file:///none) was not compared: no file that can be read" in out
    assert "anchor 1" not in out
    urls = "s3://b/p?endpoint=https://e&region=r&retain_days=9 syslog+tls://host:6514?ca=/x"
    _, out, _ = typed("verify", SYNCWARD_AUDIT_ANCHORS=urls)
    assert "note: anchor 1 (s3://b/p) was not compared: copy what it holds to a file" in out
    assert "note: anchor 2 (syslog+tls://host:6514) was not compared" in out
    assert (
        "anchor 1" not in typed("verify", "--anchor", log.anchor(), SYNCWARD_AUDIT_ANCHORS=urls)[1]
    )


def test_the_verdict_is_kept_where_it_cannot_be_recorded(log, typed):
    """A log that takes no events is verified as well as any, printed and in the exit code."""
    log.control.act("ALTER TABLE audit.event ADD CONSTRAINT closed CHECK (action <> "
                    "'audit.verified') NOT VALID")  # fmt: skip
    code, out, err = typed("verify")
    assert (code, err) == (0, "")
    assert "note: this verification could not be recorded" in out
    log.tamper("UPDATE audit.event SET body = replace(body, 'success', 'refused') WHERE seq = :s",
               s=log.seq(7))  # fmt: skip
    code, out, _ = typed("verify")
    assert (code, out.splitlines()[0][:21]) == (10, "TAMPERED at index 7: ")
    assert out.splitlines()[-1].startswith("tampered: 21 events")


def test_verify_without_a_key_says_where_it_comes_from(typed, tmp_path):
    code, out, _ = typed("verify", "--pubkey", tmp_path / "gone")
    assert code == 12
    assert "syncward audit key show" in out


def test_an_export_verifies_without_settings_or_a_database(log, typed, tmp_path):
    code, out, _ = typed("export", tmp_path / "ex", "--json")
    said = json.loads(out)
    assert (code, said["first"], said["size"]) == (0, 0, 21)
    assert newest(log) == ("audit.exported", {
        "first": 0, "size": 21, "format": "jsonl", "sha256": said["sha256"]})  # fmt: skip
    words = ("verify", "--export", tmp_path / "ex", "--pubkey", log.pubkey)
    assert typed(*words, settings=False)[0] == 0
    assert typed(*words[:3], settings=False)[0] == 2  # a key must come another way
    events = tmp_path / "ex" / "events" / "000000000000.jsonl"
    events.write_text(events.read_text().replace("success", "refused", 1))
    code, out, _ = typed(*words, settings=False)
    assert (code, out.startswith("TAMPERED at index")) == (10, True)


def test_an_export_never_overwrites_and_leaves_nothing_half(log, typed, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert typed("export", tmp_path / "full")[0] == 1
    before = sorted(p.name for p in tmp_path.iterdir())
    log.control.act("ALTER TABLE audit.event ADD CONSTRAINT closed CHECK (action <> "
                    "'audit.exported') NOT VALID")  # fmt: skip
    assert typed("export", tmp_path / "new")[0] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert typed("export", tmp_path / "new", "--first", "99")[0] == 1


def test_a_proof_verifies_with_the_key_alone(log, typed, tmp_path):
    file = tmp_path / "p.json"
    assert typed("prove", 5, "-o", file)[0] == 0
    assert newest(log)[0] == AuditAction.AUDIT_READ
    code, out, _ = typed("verify", "--proof", file, "--pubkey", log.pubkey, settings=False)
    assert (code, out.startswith("intact")) == (0, True)
    said = json.loads(file.read_text())
    assert json.loads(typed("prove", 5)[1])["event"] == said["event"]
    script = Path(program.__file__).parent.parent / "audit" / "standalone" / "verify.py"
    assert log.standalone(tmp_path, script=script, proof=file)[0] == 0
    signing.init(tmp_path / "other" / "key.json")
    other = tmp_path / "other.pub"
    other.write_text(signing.load(tmp_path / "other" / "key.json").public[0].line)
    for name, change, expected in (
        ("login", {"event": {**said["event"], "login": "otto"}}, 10),
        ("index", {"index": 6}, 10),
        ("path", {"path": said["path"][:-1]}, 10),
        ("path+", {"path": [*said["path"], "00" * 32]}, 10),
        ("size", {"size": 20}, 10),
        ("note", {"note": said["note"].replace("epoch 1", "epoch 2")}, 10),
        ("format", {"format": "x"}, 12),
        ("nothing", {"event": None}, 10),
    ):
        bad = tmp_path / f"{name}.json"
        bad.write_text(json.dumps({**said, **change}) + "\n")
        code, out, _ = typed("verify", "--proof", bad, "--pubkey", log.pubkey)
        assert (code, log.standalone(tmp_path, script=script, proof=bad)[0]) == (
            expected, expected), (name, out)  # fmt: skip
    assert typed("verify", "--proof", file, "--pubkey", other)[0] == 12
    assert log.standalone(tmp_path, script=script, proof=file, pubkey=other)[0] == 12


def test_what_is_not_sealed_has_no_proof(typed):
    for word in (
        99,
        10**17,
        10**30,
        "ab" * 32,
        "nonsense",
        "\uff11\uff12",
        "\u0663",
        "1_0",
        "+1",
        "",
    ):
        code, _, err = typed("prove", word)
        assert code == 1, word
        assert "is sealed" in err or "no such event" in err
