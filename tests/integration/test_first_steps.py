"""What a newcomer types in the first hour: wrong names, parts of ids, narrow terminals."""

import json

import pytest

from schemas.runs import RunKind

pytestmark = pytest.mark.integration

STREAMS = {"public.t": "{mode: merge, key: [id], cursor: xmin}"}


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        "INSERT INTO t SELECT g, 'v' FROM generate_series(1, 25) g",
    )
    return world


def test_wrong_names_are_answered_with_the_near_ones(shop, shell):
    shop.apply(STREAMS)
    for words, said in (
        (("account", "show", "acm"), "did you mean acme?"),
        (("account", "show", "other"), "make it with: syncward account create other"),
        (("resource", "show", "shpo"), "did you mean shop?"),
        (("run", "show", "shop-to-lak"), "did you mean shop-to-lake?"),
        (("conection", "list"), "Did you mean one of: 'connection', 'connector'?"),
        (("run", "lst"), "Did you mean 'list'?"),
        (("up", "--detach"), "--detach goes with --dev"),
    ):
        code, _, err = shell(*words)
        assert code != 0
        assert said in err, words


def test_a_run_is_found_by_the_beginning_of_its_id_and_a_look_at_schemas_hides_none(shop, shell):
    shop.apply(STREAMS)
    with shop.working():
        _, out, _ = shell("run", "enqueue", "shop-to-lake", "--wait", "--json")
        run_id = json.loads(out)["run_id"]
        assert shell("connection", "schema", "show", "shop-to-lake")[0] == 0
    _, out, _ = shell("run", "list", "--json")
    assert json.loads(out)[0]["kind"] == RunKind.SCHEMA
    for name in (run_id, run_id[:18], run_id[:30], "shop-to-lake"):
        _, out, _ = shell("run", "show", name, "--json")
        assert json.loads(out)["run_id"] == run_id
    assert shell("run", "show", "00000000-0000")[0] == 1


def test_diff_says_what_a_setting_was_and_a_limit_of_runs_is_changed(shop, shell):
    shop.apply(STREAMS)
    path = shop.document(STREAMS)
    text = path.read_text().replace("{kind: postgres", "{runs_max: 2, kind: postgres", 1)
    path.write_text(text)
    code, out, _ = shell("diff", "-f", str(path))
    assert code == 0
    assert "runs_max: 4 becomes 2" in out
    assert shell("apply", "-f", str(path))[0] == 0
    assert "nothing to change" in shell("diff", "-f", str(path))[1]
    assert shop.control.one("SELECT min(runs_max) FROM resource_queues") == 2
    path.write_text(text.replace('"database": "', '"database": "other_', 1))
    _, out, _ = shell("diff", "-f", str(path))
    assert " becomes other_" in out


def test_an_error_says_the_whole_command_and_explain_repeats_it(shop, shell, tmp_path):
    shop.apply({"public.t": "{mode: merge, key: [id], cursor: xmin, drift: freeze}"})
    with shop.working():
        assert shell("run", "enqueue", "shop-to-lake", "--wait")[0] == 0
        shop.pair.source("ALTER TABLE t ADD extra int")
        code, out, _ = shell("run", "enqueue", "shop-to-lake", "--wait")
    assert code == 1
    assert "syncward connection schema accept shop-to-lake; " in out
    (tmp_path / "wrong.pw").write_text("wrong-password-1\n")
    words = ("resource", "rotate", "shop", "--secret-file", f"password={tmp_path / 'wrong.pw'}")
    assert shell(*words)[0] == 0
    with shop.working():
        code, out, _ = shell("run", "enqueue", "shop-to-lake", "--wait")
    assert code == 1
    assert "syncward resource rotate shop" in out
    _, out, _ = shell("run", "explain", "shop-to-lake")
    assert "error       " in out
    assert "syncward resource rotate shop" in out
    _, out, _ = shell("connection", "show", "shop-to-lake")
    assert "then: syncward connection resume shop-to-lake" in out
    assert "2 failures in a row" in out


def test_what_is_piped_is_not_cut_and_a_narrow_terminal_keeps_ids_whole(shop, shell, monkeypatch):
    shop.apply(STREAMS)
    asked = shop.enqueue()
    monkeypatch.delenv("COLUMNS", raising=False)
    _, out, _ = shell("run", "list")
    assert out.splitlines()[0].split()[-3:] == ["KIND", "ERROR", "TRY"]
    monkeypatch.setenv("COLUMNS", "80")
    head, line = shell("run", "list")[1].splitlines()
    assert str(asked.run_id) in line
    assert "shop-to-lake" in line
    assert "…" not in head + line
    assert head.split()[:4] == ["RUN", "SUBJECT", "STATE", "ASKED"]
