"""Children that misbehave: each way ends in its own error, leaves nothing, and tells nothing."""

import itertools
import json
import os
import pwd
import re
import shutil
import signal
import tempfile
import threading
import time
import traceback
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from connectors import registry
from connectors.child.installed import Kind, installed, place
from connectors.child.launcher import landlock
from connectors.child.reading import BATCH_ROWS
from connectors.child.voice import LINES_MAX
from schemas.aid import Aid
from schemas.egress import LinkPolicy
from schemas.errors import (
    ConfigError,
    CredentialsError,
    Deferral,
    ReadAgain,
    SyncwardError,
    TransientError,
)
from schemas.records import WireFormat
from schemas.redaction import REDACTOR
from schemas.streams import StreamSpec
from tests.children.installing import install, policy_of

LOGIN = "hunter2-canary-login"
TABLE = {
    "properties": {"id": {"type": "integer"}, "note": {"type": ["null", "string"]}},
    "key": ["id"], "cursors": ["id"],
}  # fmt: skip


class Fake:
    """One fake connector with one table, `t`, and what it said."""

    def __init__(self, root: Path, kind: Kind) -> None:
        self.kind = kind
        self.data = root / "data"
        self.data.mkdir()
        self.root = root / "connectors"
        self.connector = install(self.root, kind)
        self.package = self.connector.partition("==")[0]
        self.said: list[str] = []
        self.kept: list[dict[str, str]] = []
        self.policy = policy_of(self.root, confined=False)  # most of them write down what they did
        self.settings: dict[str, object] = {"directory": str(self.data)}
        (self.data / "t.json").write_text(json.dumps(TABLE))
        (self.data / "t.rows").write_text("".join(f'{n}\t\t{{"id":{n}}}\n' for n in range(1, 4)))

    def open(self, misbehave: str = "", **settings: object):
        config = {
            "connector": self.connector,
            "settings": {**self.settings, "misbehave": misbehave, **settings},
        }
        checked = registry.validate_config(self.kind, config, LinkPolicy())
        secrets = {"config": json.dumps({"login": LOGIN})}
        policy = LinkPolicy(children=self.policy)
        aid = Aid(secrets=self, say=self.said.append)
        return registry.open_source(self.kind, checked, secrets, policy, aid)

    def spec(self, mode: str = "merge", **more: object) -> StreamSpec:
        extra: dict[str, object] = {} if mode == "replace" else {"key": ("id",), "cursor": "state"}
        return StreamSpec(name=f"{self.package}.t", mode=mode, **{**extra, **more})

    def read(self, misbehave: str = "", *, mode="merge", cursor=None, settings=(), **more):
        """The rows of each batch and the cursor behind it, as a destination would take them."""
        with (
            closing(self.open(misbehave, **dict(settings))) as source,
            source.extract(self.spec(mode, **more), cursor, WireFormat.ROWS) as batches,
        ):
            return [([r for g in batch.groups for r in g.rows], batch) for batch in batches]

    def renewed(self, seen, exchange):
        """What a worker's store does."""
        self.kept.append(dict(exchange(seen)))
        return {**seen, **self.kept[-1]}


@contextmanager
def fake(root: Path, kind: Kind, monkeypatch):
    """A fake of a kind, of which nothing is left at the end."""
    (root / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(root / "scratch"))
    yield Fake(root, kind)
    assert left_behind(root) == []


@pytest.fixture
def tap(tmp_path, monkeypatch):
    with fake(tmp_path, "singer", monkeypatch) as found:
        yield found


@pytest.fixture
def airbyte(tmp_path, monkeypatch):
    with fake(tmp_path, "airbyte", monkeypatch) as found:
        yield found


def left_behind(root: Path) -> list[str]:
    """Processes and directories of children that are still there."""
    found = [str(path) for path in (root / "scratch").iterdir()]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(root).encode() in (line := path.read_bytes()):
                found.append(str(line))
    return found


def everything(error: SyncwardError) -> str:
    found = traceback.TracebackException.from_exception(error)
    return "\n".join([str(error), repr(error), *found.format()])


ENDINGS: dict[str, tuple[type[SyncwardError], str]] = {
    "garbage": (ConfigError, "connector_answer"),
    "no_object": (ConfigError, "connector_answer"),
    "giant_line": (ConfigError, "connector_limit"),
    "partial_last_line": (TransientError, "connector_incomplete"),
    "nothing": (TransientError, "connector_incomplete"),
    "exit_1_after_all_rows": (TransientError, "connector_failed"),
    "killed": (TransientError, "connector_failed"),
    "state_before_rows": (TransientError, "connector_incomplete"),
    "rows_after_state": (TransientError, "connector_incomplete"),
    "still_syncing": (TransientError, "connector_incomplete"),
    "type_changes": (TransientError, "connector_incomplete"),
    "without_key": (ConfigError, "data_refused"),
    "before_schema": (ConfigError, "connector_answer"),
    "wrong_type": (ConfigError, "data_refused"),
    "batch_files": (ConfigError, "connector_answer"),
    "secret_in_state": (ConfigError, "connector_answer"),
    "show_config": (ConfigError, "connector_answer"),
}


@pytest.mark.parametrize("misbehave", ENDINGS)
def test_each_misbehaviour_ends_in_its_own_error_and_tells_nothing(tap, misbehave):
    kind, code = ENDINGS[misbehave]
    with REDACTOR.holder() as secrets:
        secrets.know(json.dumps({"login": LOGIN}))
        with pytest.raises(kind) as caught:
            tap.read(misbehave)
    assert caught.value.code == code
    told = everything(caught.value) + "\n".join(tap.said)
    assert LOGIN not in told
    assert "canary" not in everything(caught.value)


@pytest.mark.parametrize("misbehave", ["repeated_state", "noise", "clock_skew", "column_comes"])
def test_what_does_no_harm_is_borne(tap, misbehave):
    found = tap.read(misbehave)
    assert [row[0] for rows, _ in found for row in rows] == {
        "clock_skew": [1], "column_comes": [1, 2, 3, 4]
    }.get(misbehave, [1, 2, 3])  # fmt: skip
    last = found[-1][1]
    assert (last.more, last.upper["kind"]) == (False, "child")
    assert json.loads(last.upper["state"])["bookmarks"]["t"]["at"] > 0


def test_a_state_that_stands_still_need_not_be_repeated(tap):
    same = {"kind": "child", "state": '{"bookmarks": {"t": {"at": 3}}}'}
    (rows, batch), *_ = tap.read("rows_after_state", cursor=same)
    assert ([row[0] for row in rows], batch.upper) == ([1, 2, 3, 4], {**same, **batch.upper})
    with pytest.raises(TransientError, match="1 records after its last state"):
        tap.read("rows_after_state", cursor={**same, "state": '{"bookmarks": {"t": {"at": 2}}}'})


def test_rows_are_typed_and_the_whole_record_is_beside_them(tap):
    (rows, batch), *_ = tap.read("column_comes")
    assert [(c.name, c.type) for c in batch.shape.columns] == [
        ("id", "bigint"), ("note", "text"), ("raw", "jsonb")
    ]  # fmt: skip
    assert rows[3] == (4, "n", '{"id":4,"note":"n","more":5}')
    assert any("other fields" in line for line in tap.said)


def test_freeze_takes_no_new_field(tap):
    with pytest.raises(ConfigError, match="sends fields that the schema does not have: more") as c:
        tap.read("column_comes", drift="freeze")
    assert c.value.code == "schema_drift"


# ── processes ────────────────────────────────────────────────────────────────────────────────


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_is_left_behind_by_a_child_ends_with_it(tap):
    assert len(tap.read("grandchildren")[0][0]) == 3
    pids = [int(pid) for pid in (tap.data / "pids").read_text().split()]
    assert len(pids) == 2
    assert not any(map(alive, pids))


@pytest.mark.parametrize("misbehave", ["hang", "ignore_sigterm", "grandchildren_and_hang"])
def test_cancel_ends_a_child_with_all_its_processes_within_two_seconds(tap, misbehave):
    with closing(tap.open(misbehave)) as source:
        began = []

        def end():
            began.append(time.monotonic())
            source.cancel()

        with source.extract(tap.spec(), None, WireFormat.ROWS) as batches:
            groups = next(batches).groups  # it has sent rows and says nothing more
            threading.Timer(0.1, end).start()
            with pytest.raises(TransientError) as caught:
                list(groups)
        assert time.monotonic() - began[0] < 2
    assert caught.value.code == "cancelled_there"
    assert time.monotonic() - began[0] < 4
    pids = tap.data / "pids"
    assert not any(alive(int(p)) for p in (pids.read_text().split() if pids.exists() else ()))


@pytest.mark.parametrize(
    ("misbehave", "limits", "kind", "code"),
    [
        ("hang", {"silence": timedelta(seconds=1)}, TransientError, "connector_failed"),
        ("close_stdout", {"silence": timedelta(seconds=1)}, TransientError, "connector_failed"),
        ("eat_memory", {"memory": 64 * 2**20}, ConfigError, "connector_limit"),
        ("spin", {"cpu": timedelta(seconds=1)}, ConfigError, "connector_limit"),
        ("many_processes", {}, ConfigError, "connector_limit"),
    ],
)
def test_a_child_beyond_a_limit_is_ended(tap, misbehave, limits, kind, code):
    tap.policy = policy_of(tap.root, confined=False, **limits)
    with pytest.raises(kind) as caught:
        tap.read(misbehave)
    assert caught.value.code == code


def test_a_kill_9_of_the_worker_ends_the_child_and_what_it_started(tap):
    process = os.fork()
    if process == 0:
        with suppress(BaseException):
            tap.read("grandchildren_and_hang")
        os._exit(0)
    pids = tap.data / "pids"
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    until(lambda: not any(alive(int(p)) for p in pids.read_text().split()))
    until(lambda: not left_behind(tap.root.parent))


def until(holds):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_flood_on_standard_error_is_bounded_and_counted(tap):
    assert len(tap.read("flood_stderr")[0][0]) == 3
    assert len(tap.said) == LINES_MAX + 1
    assert tap.said[-1].endswith("198,000 more lines were not kept")


def test_a_child_sees_its_config_and_nothing_else(tap):
    tap.read("look_around")
    seen = json.loads((tap.data / "seen").read_text())
    assert LOGIN not in json.dumps(seen)
    assert set(seen["environment"]) <= {
        "PATH", "HOME", "TMPDIR", "XDG_CACHE_HOME", "LANG", "TZ", "PYTHONDONTWRITEBYTECODE",
        "PYTHONNOUSERSITE", "PYTHONUTF8", "MALLOC_ARENA_MAX", "DO_NOT_TRACK", "LC_CTYPE",
    }  # fmt: skip
    assert seen["directory"] == seen["environment"]["HOME"]
    assert not Path(seen["directory"]).exists()
    assert re.fullmatch(r"/dev/fd/\d+", seen["arguments"][seen["arguments"].index("--config") + 1])
    assert (
        len(seen["descriptors"]) <= 3 + 2 + 1
    )  # standard ones, config, catalog, the listing itself


@pytest.mark.skipif(landlock() == 0, reason="this kernel has no Landlock")
def test_a_confined_child_reads_and_writes_nothing_of_the_workers(tap, tmp_path):
    tap.policy = policy_of(tap.root, readable=(tap.data,))
    (tmp_path / "keys").mkdir()
    forbidden = tmp_path / "keys" / "worker.json"
    forbidden.write_text("canary")
    settings = {"forbidden": str(forbidden), "worker": os.getpid()}
    assert len(tap.read("reach_out", settings=settings)[0][0]) == 3
    (tried,) = [line for line in tap.said if "tried" in line]
    found = json.loads(tried.partition("tried ")[2])
    signals = "refused" if landlock() >= 6 else "done"
    assert found == dict.fromkeys(("read", "write", "spy"), "refused") | {"signal": signals}
    tap.policy = replace(tap.policy, confined=False)
    tap.said.clear()
    tap.read("reach_out", settings=settings)
    assert [line for line in tap.said if '"read": "done"' in line]


_PYTHON = Path("/usr/bin/python3")  # one that every login may start


@pytest.mark.skipif(os.geteuid() != 0 or not _PYTHON.exists(), reason="needs root to switch")
def test_a_child_runs_as_another_login_where_that_is_set(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        root = Path(made)
        root.chmod(0o755)
        with fake(root, "singer", monkeypatch) as tap:
            (root / "scratch").chmod(0o755)
            shutil.rmtree(place(tap.root, tap.connector))
            install(tap.root, "singer", str(_PYTHON))
            tap.policy = replace(tap.policy, user="nobody")
            assert len(tap.read("who_am_i")[0][0]) == 3
            assert f"tap-fake: uid {pwd.getpwnam('nobody').pw_uid}, groups []" in tap.said
            tap.policy = replace(tap.policy, user="no-such-login")
            with pytest.raises(ConfigError, match="SYNCWARD_CONNECTORS_USER"):
                tap.read("who_am_i")


def test_a_slow_reader_slows_the_child_down(tap):
    (tap.data / "t.json").write_text(json.dumps({**TABLE, "endless": True}))
    with (
        closing(tap.open()) as source,
        source.extract(tap.spec("replace"), None, WireFormat.ROWS) as batches,
    ):
        groups = next(batches).groups
        next(groups)
        (child,) = source._children
        before = child.received
        until(lambda: blocked(tap))
        assert child.received == before
        next(groups)
        assert child.received > before
        source.cancel()
        with pytest.raises(TransientError):
            list(groups)


def blocked(tap) -> bool:
    """Whether the child sleeps in a write to its pipe."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(tap.root).encode() in path.read_bytes():
                return path.with_name("wchan").read_text() in {"pipe_write", "anon_pipe_write"}
    return False


# ── states, versions and secrets ─────────────────────────────────────────────────────────────


def test_each_state_may_end_a_batch_and_no_state_comes_before_its_rows(tap):
    count = 3 * BATCH_ROWS + 10
    (tap.data / "t.rows").write_text("".join(f'{n}\t\t{{"id":{n}}}\n' for n in range(1, count + 1)))
    found = tap.read(settings={"state_every": 1_000})
    assert [len(rows) for rows, _ in found] == [5_000, 5_000, 5_000, 10]
    assert [batch.more for _, batch in found] == [True, True, True, False]
    for rows, batch in found:
        at = json.loads(batch.upper["state"])["bookmarks"]["t"]["at"]
        assert at == rows[-1][0]
    for (_, before), (_, after) in itertools.pairwise(found):
        assert after.lower == before.upper
    again = tap.read(cursor=found[1][1].upper)
    assert again[0][0][0][0] == 10_001
    assert (again[0][1].full, found[0][1].full, found[1][1].full) == (False, True, False)


def test_a_new_version_of_a_stream_is_read_from_the_beginning(tap):
    (_, batch), *_ = tap.read("new_version")
    assert batch.upper["version"] == "7"
    tap.read("new_version", cursor=batch.upper)
    with pytest.raises(ReadAgain):
        tap.read("new_version", cursor={**batch.upper, "version": "6"})


def test_a_config_that_a_tap_writes_anew_is_kept_as_a_credential(tap):
    with closing(tap.open("rotate")) as source:
        with source.extract(tap.spec(), None, WireFormat.ROWS) as batches:
            list(next(batches).groups)
        with source.extract(tap.spec(), None, WireFormat.ROWS) as batches:
            list(next(batches).groups)
    kept = [json.loads(one["config"]) for one in tap.kept]
    assert kept == [{"login": f"{LOGIN}-next"}, {"login": f"{LOGIN}-next-next"}]


def test_a_secret_that_is_no_object_is_refused_without_a_word_of_it(tap):
    with pytest.raises(CredentialsError) as caught:
        registry.open_source(
            "singer", {"connector": tap.connector}, {"config": "hunter2-canary"},
            LinkPolicy(children=tap.policy),
        )  # fmt: skip
    assert "canary" not in everything(caught.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"connector": "tap-x"}, "exact version"),
        ({"connector": "../tap-x==1.0"}, "exact version"),
        ({"connector": "tap-x==1.0/../../y"}, "exact version"),
        ({"connector": "tap-x==1.0", "executable": "/bin/sh"}, "without a path"),
        ({"connector": "tap-x==1.0", "settings": {"a": [{"api_key": "x"}]}}, "api_key is a secret"),
        ({"connector": "tap-x==1.0", "arguments": ["--x"]}, "arguments: unknown key"),
    ],
)
def test_a_resource_names_no_path_no_argument_and_no_secret(config, says):
    with pytest.raises(ConfigError, match=says):
        registry.validate_config("singer", config, LinkPolicy())


# ── what is installed ────────────────────────────────────────────────────────────────────────


def test_a_changed_file_is_not_started(tap):
    tap.read()
    script = place(tap.root, tap.connector) / "venv" / "bin" / tap.package
    before = script.read_text()
    for change in (
        lambda: script.write_text(before + "\n"),
        lambda: (script.write_text(before), script.with_name("more.pth").write_text("import os")),
        lambda: (script.with_name("more.pth").unlink(), script.with_name("python").unlink()),
    ):
        change()
        with pytest.raises(ConfigError, match="not as it was installed") as caught:
            tap.read()
        assert caught.value.code == "connector_changed"


def test_production_starts_nothing_unless_told_to(tap):
    strict = replace(tap.policy, unguarded=False, unguarded_there=False)
    for policy, says in (
        (replace(tap.policy, directory=None), "SYNCWARD_CONNECTORS_DIR"),
        (strict, "SYNCWARD_CONNECTORS_UNGUARDED"),
    ):
        tap.policy = policy
        with pytest.raises(ConfigError, match=says) as caught:
            tap.read()
        assert caught.value.code == "connector_off"
    tap.policy = replace(strict, unguarded_there=True, writable_refused=True)
    with pytest.raises(ConfigError, match="could change itself"):
        tap.read()


def test_what_is_not_installed_or_of_another_kind_says_so(tap):
    cases: list[tuple[Kind, str, str]] = [
        ("singer", "tap-other==1.0", "syncward connector install tap-other==1.0"),
        ("airbyte", tap.connector, "is a connector of kind singer"),
    ]
    for kind, connector, says in cases:
        with pytest.raises(ConfigError, match=says) as caught:
            installed(tap.policy, kind, connector, "")
        assert caught.value.code == "connector_missing"


# ── what is peculiar to Airbyte ──────────────────────────────────────────────────────────────

OF_AIRBYTE: dict[str, tuple[type[SyncwardError], str]] = {
    "garbage": (ConfigError, "connector_answer"),
    "giant_line": (ConfigError, "connector_limit"),
    "partial_last_line": (TransientError, "connector_incomplete"),
    "nothing": (TransientError, "connector_incomplete"),
    "exit_0_after_an_error": (TransientError, "connector_failed"),
    "config_is_wrong": (ConfigError, "connector_refused"),
    "transient": (TransientError, "connector_failed"),
    "exit_1_after_all_rows": (TransientError, "connector_failed"),
    "incomplete": (TransientError, "connector_incomplete"),
    "never_complete": (TransientError, "connector_incomplete"),
    "told_to_wait": (Deferral, "deferred"),
    "state_before_rows": (TransientError, "connector_incomplete"),
    "fewer_than_counted": (TransientError, "connector_incomplete"),
    "without_key": (ConfigError, "data_refused"),
    "wrong_type": (ConfigError, "data_refused"),
    "no_object": (ConfigError, "connector_answer"),
    "secret_in_state": (ConfigError, "connector_answer"),
}


@pytest.mark.parametrize("misbehave", OF_AIRBYTE)
def test_each_misbehaviour_of_a_source_ends_in_its_own_error(airbyte, misbehave):
    kind, code = OF_AIRBYTE[misbehave]
    with REDACTOR.holder() as secrets:
        secrets.know(json.dumps({"login": LOGIN}))
        with pytest.raises(kind) as caught:
            airbyte.read(misbehave)
    assert caught.value.code == code
    assert LOGIN not in everything(caught.value) + "\n".join(airbyte.said)
    assert "canary" not in everything(caught.value)


@pytest.mark.parametrize("misbehave", ["noise", "clock_skew"])
def test_what_of_a_source_does_no_harm_is_borne(airbyte, misbehave):
    found = airbyte.read(misbehave)
    ids = [row[0] for rows, _ in found for row in rows]
    assert ids == ([1] if misbehave == "clock_skew" else [1, 2, 3])
    (state,) = json.loads(found[-1][1].upper["state"])
    assert state["stream"]["stream_descriptor"] == {"name": "t"}


@pytest.mark.parametrize(
    ("misbehave", "kept"),
    [
        ("legacy_state", {"t": {"at": 3}}),
        ("global_state", [{"type": "GLOBAL", "global": {
            "shared_state": {"lsn": 7},
            "stream_states": [{"stream_descriptor": {"name": "t"}, "stream_state": {"at": 3}}],
        }}]),
    ],
)  # fmt: skip
def test_older_and_global_states_are_kept_as_the_source_takes_them(airbyte, misbehave, kept):
    assert json.loads(airbyte.read(misbehave)[-1][1].upper["state"]) == kept


def test_a_new_login_is_stored_at_once(airbyte):
    with (
        closing(airbyte.open("rotate")) as source,
        source.extract(airbyte.spec(), None, WireFormat.ROWS) as batches,
    ):
        batch = next(batches)
        assert [json.loads(one["config"]) for one in airbyte.kept] == [{"login": f"{LOGIN}-next"}]
        list(batch.groups)
    assert len(airbyte.kept) == 1


def test_what_a_source_says_is_masked(airbyte):
    with REDACTOR.holder() as secrets:
        secrets.know(json.dumps({"login": LOGIN}))
        airbyte.read("show_config")
    said = "\n".join(airbyte.said)
    assert "my config is" in said
    assert "my login is ***" in said
    assert LOGIN not in said


def test_check_says_what_is_refused_and_which_settings_are_secrets(airbyte):
    with closing(airbyte.open(pin="1234")) as source:
        said, unconfined, unguarded = source.test().missing
        assert said.startswith("settings.pin is a secret, by the connector's own words")
        assert "not confined" in unconfined
        assert "no egress guard" in unguarded
        (found,) = source.discover()
    assert (found.name, found.key, found.cursors) == ("airbyte-source-fake.t", ("id",), ("id",))
    with closing(airbyte.open(login="right")) as source:
        source._settings._secret = {"login": "wrong"}
        with pytest.raises(ConfigError, match="refuses its config") as caught:
            source.test()
    assert caught.value.code == "connector_refused"


def test_processes_that_a_source_leaves_behind_end_with_it(airbyte):
    airbyte.read("grandchildren")
    assert not alive(int((airbyte.data / "pids").read_text()))
