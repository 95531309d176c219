"""The command line as an operator meets it: answers, exit codes, errors in one line."""

import json

import pytest

from schemas.runs import RunState

pytestmark = pytest.mark.integration

STREAMS = {"public.t": "{mode: merge, key: [id], cursor: xmin}"}


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        "INSERT INTO t SELECT g, 'v' FROM generate_series(1, 25) g",
    )
    return world


@pytest.fixture
def working(shop):
    with shop.working():
        yield shop


def test_apply_is_idempotent_and_diff_changes_nothing(shop, shell):
    shop.account()
    path = str(shop.document(STREAMS))
    code, out, _ = shell("diff", "-f", path)
    assert code == 0
    assert "+ connection shop-to-lake: create" in out
    assert shop.control.one("SELECT count(*) FROM resources") == 0
    assert shell("apply", "-f", path)[0] == 0
    events = shop.control.one("SELECT count(*) FROM audit.event")
    code, out, _ = shell("apply", "-f", path)
    assert code == 0
    assert "nothing changed" in out
    assert shop.control.one("SELECT count(*) FROM audit.event") == events


def test_diff_says_what_a_change_means_for_the_data(shop, shell):
    shop.apply({**STREAMS, "public.gone": "{mode: replace}"})
    changed = {"public.t": "{mode: merge, key: [id], cursor: id}", "public.new": "{mode: replace}"}
    _, out, _ = shell("diff", "-f", str(shop.document(changed, schedule="{every: 5m}")))
    assert "schedule: manual becomes every 5m" in out
    assert "public.t: cursor changes; it is read from the beginning" in out
    assert "public.new: new, read from the beginning" in out
    assert "public.gone: no longer read; its table stays" in out


def test_enqueue_wait_prints_the_documented_json(working, shell):
    working.apply(STREAMS)
    code, out, _ = shell("run", "enqueue", "shop-to-lake", "--wait", "--json")
    document = json.loads(out)
    assert code == 0
    assert list(document) == ["run_id", "connection", "state", "attempt", "streams", "error"]
    assert list(document["streams"][0]) == [
        *("stream", "state", "mode", "rows_extracted", "rows_loaded", "rows_inserted"),
        *("rows_updated", "rows_unchanged", "rows_deleted", "rows_rejected", "bytes"),
        *("cursor_from", "cursor_to"),
        "seconds",
    ]
    assert document["streams"][0]["rows_inserted"] == 25


def test_enqueue_wait_exits_1_for_a_failed_run(working, shell):
    working.apply({"public.missing": "{mode: replace}"})
    code, out, _ = shell("run", "enqueue", "acme/shop-to-lake", "--wait", "--json")
    assert code == 1
    document = json.loads(out)
    assert document["state"] == "failed"
    assert "public.missing" in document["error"]


def test_resource_test_and_discover_answer_from_a_worker(working, shell):
    working.apply(STREAMS)
    code, out, _ = shell("resource", "test", "shop")
    assert code == 0
    assert "as source: ready" in out
    lines = out.splitlines()
    assert lines[1] == "  as source: ready"
    assert lines[2].startswith("  as destination:")
    code, out, _ = shell("resource", "discover", "shop", "--json")
    assert [s["name"] for s in json.loads(out)["streams"]] == ["public.t"]


def test_logs_output_and_lists_show_a_run(working, shell):
    working.apply(STREAMS)
    shell("run", "enqueue", "shop-to-lake", "--wait")
    assert "25 rows extracted" in shell("run", "logs", "shop-to-lake", "--grep", "extracted")[1]
    assert "public.t" in shell("run", "output", "shop-to-lake")[1]
    assert "succeeded" in shell("run", "list")[1]
    assert "shop-to-lake" in shell("connection", "list")[1]
    assert "READ UP TO" in shell("connection", "show", "shop-to-lake")[1]
    _, out, _ = shell("audit", "tail", "--json", "--limit", "100")
    actions = [e["action"] for e in json.loads(out)]
    assert {"logs.read", "output.read", "run.succeeded"} <= set(actions)


def test_every_listing_fits_80_columns(working, shell, monkeypatch):
    working.apply(STREAMS)
    shell("run", "enqueue", "shop-to-lake", "--wait")
    monkeypatch.setenv("COLUMNS", "80")
    for words in (
        ("account", "list"), ("resource", "list"), ("connection", "list"), ("run", "list"),
        ("run", "show", "shop-to-lake"), ("connection", "show", "shop-to-lake"),
    ):  # fmt: skip
        code, out, _ = shell(*words)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80, words


def test_follow_prints_json_lines_until_the_run_has_ended(working, shell):
    working.apply(STREAMS)
    _, out, _ = shell("run", "enqueue", "shop-to-lake", "--json")
    run_id = json.loads(out)["run_id"]
    _, out, _ = shell("run", "logs", run_id, "-f", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert "attempt 1 begins" in lines[0]["message"]
    assert "succeeded" in lines[-1]["message"]


def test_cancel_of_a_waiting_run(shop, shell):
    shop.apply(STREAMS)
    asked = shop.enqueue()
    code, out, _ = shell("run", "cancel", "shop-to-lake")
    assert code == 0
    assert "cancelled" in out
    assert shop.run(asked.run_id).state is RunState.CANCELLED


def test_metrics_are_valid_exposition_text(shop, shell):
    from prometheus_client.parser import text_string_to_metric_families

    shop.apply(STREAMS)
    code, out, err = shell("metrics")
    assert (code, err) == (0, "")
    families = {f.name: f for f in text_string_to_metric_families(out + "\n")}
    states = {s.labels["state"]: s.value for s in families["syncward_connections"].samples}
    assert states == {"active": 1, "paused": 0}
    assert "syncward_queue_oldest_seconds" in families


def test_the_whole_life_of_small_things(shop, shell):
    secret = shop.directory / "reader.pw"
    secret.write_text(shop.pair.logins["reader"])
    config = shop.pair.config("source")
    settings = [word for k, v in config.items() for word in ("--set", f"{k}={v}")]
    for words in (
        ("account", "create", "acme", "--plan", "unlimited"),
        ("resource", "create", "shop", "--kind", "postgres", *settings,
         "--secret-file", f"password={secret}"),
        ("resource", "show", "shop"),
        ("resource", "rotate", "shop", "--secret-file", f"password={secret}"),
        ("keys", "status"),
        ("db", "check"),
        ("resource", "delete", "shop"),
        ("account", "delete", "acme"),
    ):  # fmt: skip
        code, out, err = shell(*words)
        assert code == 0, (words, out, err)
        assert shop.pair.logins["reader"] not in out + err


def test_pause_and_resume(shop, shell):
    shop.apply(STREAMS, schedule="{every: 5m}")
    assert "paused" in shell("connection", "pause", "shop-to-lake")[1]
    code, _, err = shell("run", "enqueue", "shop-to-lake")
    assert code == 1
    assert "syncward connection resume shop-to-lake" in err
    assert "resumed" in shell("connection", "resume", "shop-to-lake")[1]
    assert shop.control.one("SELECT next_due_at > now() FROM schedules") is True


# ── bad input: one line, an exit code, and the state as it was ───────────────────────────────


def refused(shell, match: str, *words: str, code: int = 1) -> None:
    got, _, err = shell(*words)
    assert got == code, err
    assert match in err
    assert "Traceback" not in err


def test_unknown_names_are_named(shop, shell):
    shop.apply(STREAMS)
    refused(shell, "account nope: no such account", "account", "show", "nope")
    refused(shell, "resource nope: no such resource", "resource", "show", "nope")
    refused(shell, "connection nope: no such connection", "run", "enqueue", "nope")
    refused(
        shell, "no stream public.nope", "run", "enqueue", "shop-to-lake", "--stream", "public.nope"
    )
    refused(shell, "no run yet", "run", "show", "shop-to-lake")
    missing = "00000000-0000-7000-8000-000000000000"
    refused(shell, "no such run", "run", "show", missing)


def test_duplicates_are_refused(shop, shell):
    shop.apply(STREAMS)
    refused(shell, "account acme: exists already", "account", "create", "acme")
    document = str(shop.document(STREAMS))
    refused(shell, "exists already", "connection", "create", "shop-to-lake", "-f", document)


def test_a_secret_on_the_command_line_is_refused_without_repeating_it(shop, shell):
    shop.account()
    words = ("resource", "create", "r", "--kind", "postgres", "--set", "password=hunter2-word")
    code, out, err = shell(*words)
    assert code == 2
    assert "never goes on the command line" in err
    assert "hunter2-word" not in out + err
    assert shop.control.one("SELECT count(*) FROM resources") == 0


@pytest.mark.parametrize(
    ("change", "line", "match"),
    [
        (("mode: merge", "mode: smash"), 12, "public.t.mode: must be 'replace'"),
        (("    schedule: manual", "    scedule: manual"), 9, "unknown key"),
        (("schedule: manual", "schedule: {every: often}"), 9, "is not a duration; write 10s"),
        (("schedule: manual", "schedule: {cron: '* * *'}"), None, "write five fields"),
        (("schedule: manual", "schedule: {every: 5m, zone: Mars/X}"), 9, "not an IANA time zone"),
        (("key: [id], ", ""), 12, "merge needs a key"),
        (("source: shop", "source: shoop"), None, "there is no resource shoop"),
        (("kind: postgres", "kind: oracle"), None, "kind oracle: no such connector; there are"),
        (("file: source.pw", "file: gone.pw"), None, "no secret file at"),
        (("secret: {password: {file: source.pw}}", "secret: {password: hunter2}"), None,
         "must not stand in the document"),
        (('"user"', '"usr"'), None, "usr: unknown key; did you mean user?"),
        (("    target", "    source: shop\n    target"), 10, "source stands here twice"),
        (("account: acme", "account: [acme"), None, "not YAML"),
    ],
)  # fmt: skip
def test_mistakes_in_a_document_are_named_with_their_line(shop, shell, change, line, match):
    shop.account()
    path = shop.document(STREAMS)
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    code, out, err = shell("apply", "-f", str(path))
    assert code == 1
    assert match in err
    assert "hunter2" not in out + err
    if line is not None:
        assert f"doc.yaml:{line}: " in err
    assert shop.control.one("SELECT count(*) FROM connections") == 0
    assert shop.control.one("SELECT count(*) FROM resources") == 0


def test_a_schedule_below_the_plan_is_refused(shop, shell):
    shop.account(plan="standard")
    path = str(shop.document(STREAMS, schedule="{every: 10s}"))
    refused(shell, "plan standard allows 1m at the shortest", "apply", "-f", path)


def test_a_control_database_that_is_down_is_named(shell, monkeypatch):
    monkeypatch.setenv("SYNCWARD_DATABASE_URL", "postgresql://a:b@127.0.0.1:1/x")
    refused(shell, "127.0.0.1:1/x: not reachable", "run", "list")
    monkeypatch.setenv("SYNCWARD_DATABASE_URL", "nonsense")
    refused(shell, "SYNCWARD_DATABASE_URL: not a URL", "run", "list")


def test_a_keyring_that_is_missing_or_readable_is_refused(shop, shell, monkeypatch):
    shop.account()
    path = str(shop.document(STREAMS))
    keyring = shop.directory / "keys" / "operator.json"
    keyring.chmod(0o644)
    refused(shell, f"chmod 600 {keyring}", "apply", "-f", path)
    monkeypatch.setenv("SYNCWARD_KEYRING", str(shop.directory / "none.json"))
    refused(shell, "syncward keys init", "apply", "-f", path)
    refused(shell, "exists already", "keys", "init", str(shop.directory / "keys"))


def test_a_setting_that_is_no_good_refuses_the_start_with_all_reasons(shell, monkeypatch):
    monkeypatch.setenv("SYNCWARD_LEASE", "soon")
    monkeypatch.setenv("SYNCWARD_WORKER_THREADS", "0")
    code, _, err = shell("run", "list")
    assert code == 78
    assert "SYNCWARD_LEASE" in err
    assert "SYNCWARD_WORKER_THREADS" in err


def test_usage_errors_exit_2(shell):
    assert shell("run", "enqueue")[0] == 2
    assert shell("no-such-command")[0] == 2


def test_an_error_with_json_is_one_json_document(shop, shell):
    shop.account()
    code, out, _ = shell("resource", "show", "nope", "--json")
    assert code == 1
    assert json.loads(out)["error"]["code"] == "not_found"
