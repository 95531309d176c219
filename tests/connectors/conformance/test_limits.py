"""Every pair under pressure: kill -9, little memory, cancelling, and errors that tell nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from connectors import registry
from schemas.errors import (
    ConfigError,
    CredentialsError,
    RunCancelled,
    SyncwardError,
    TransientError,
)
from schemas.records import WireFormat
from tests.connectors.conformance.conftest import Engine, load
from tests.connectors.conformance.ends import DESTINATIONS, SOURCES, policy
from tests.spare import ours

pytestmark = pytest.mark.integration

ORDERS = (("id", "bigint"), ("changed", "timestamp with time zone"), ("note", "text"))
#: How much a sync may take, whatever the size of its table (DESIGN: 40 MB), and what a process
#: with other pages than the last one's adds to that.
GROWTH_MAX = 64 * 2**20


def child(engine, *specs, wire=None, kill_at="", kill_after=-1):
    """One sync of the last stream in a process of its own; None if it was killed."""
    engine.fence += len(specs)
    order = {
        **{
            role: {name: getattr(end, name) for name in names if hasattr(end, name)}
            for role, end in (("source", engine.source), ("destination", engine.destination))
            for names in [("kind", "config", "secrets", "schema")]
        },
        "root": str(engine.root), "connection": str(engine.connection_id),
        "fence": engine.fence - len(specs), "wire": wire, "kill_at": kill_at,
        "kill_after": kill_after, "specs": [spec.model_dump(mode="json") for spec in specs],
    }  # fmt: skip
    module = "tests.connectors.conformance.child"
    if kill_at:
        done = ours().run(module, given=json.dumps(order))
    else:  # of its memory nothing may be another's
        done = subprocess.run(
            [sys.executable, "-m", module], input=json.dumps(order),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("step", ["taken", "all parts", "loaded"])
def test_kill_9_repeats_nothing_and_skips_nothing(engine, step):
    engine.source.create("orders", ORDERS)
    engine.source.insert("orders", [(i, datetime.now(UTC), "x") for i in range(1, 10)])
    spec = engine.spec("orders", "append")
    engine.sync(spec)
    engine.source.insert("orders", [(i, datetime.now(UTC), "y") for i in range(10, 20)])
    assert child(engine, spec, kill_at=step, kill_after=1) is None
    assert len(engine.destination.rows("orders")) in ({19} if step == "loaded" else {9})
    engine.sync(spec)
    assert engine.same("orders")
    assert engine.destination.left_over() == []


@pytest.mark.parametrize(
    "mode",
    ["replace", *(pytest.param(m, marks=pytest.mark.full) for m in ("append", "merge"))],
)
def test_memory_does_not_depend_on_the_table(engine, mode):
    engine.source.wide("tiny", 10, 4_096)
    engine.source.wide("large", 20_000, 4_096)  # ten times what a group of rows may have
    more = {"cursor": None} if mode == "merge" else {}
    found = child(engine, *(engine.spec(table, mode, **more) for table in ("tiny", "large")))
    assert found["rows"] == 20_000
    assert found["grown"] < GROWTH_MAX


def test_memory_of_rows_between_two_postgres_does_not_depend_on_the_table(pair, root):
    engine = Engine(SOURCES["postgres"](pair, root), DESTINATIONS["postgres"](pair, root), root)
    engine.source.wide("tiny", 10, 4_096)
    engine.source.wide("large", 20_000, 4_096)
    specs = [engine.spec(table, "replace") for table in ("tiny", "large")]
    assert child(engine, *specs, wire=WireFormat.ROWS)["grown"] < GROWTH_MAX


# ── cancelling ───────────────────────────────────────────────────────────────────────────────


def cancelled_after(engine, view, *, who):
    """Seconds from the request to the end. `source`: only that end is told, nobody looks.

    `run`: what a run does, which tells both ends and looks at each part.
    """
    spec = engine.spec(view, "replace")
    asked, done = threading.Event(), threading.Event()
    began = []

    def look(_step):
        if who == "run" and asked.is_set():
            raise RunCancelled("as asked")

    with closing(engine.open_source()) as source, closing(engine.open_destination()) as destination:

        def ask():
            time.sleep(0.5)
            began.append(time.monotonic())
            asked.set()
            while not done.wait(0.3):
                for end in (source, destination) if who == "run" else (source,):
                    with suppress(Exception):  # it is gone already
                        end.cancel()

        request = engine.request(spec)
        destination.claim_stream(request)
        thread = threading.Thread(target=ask)
        thread.start()
        wire = next(w for w in source.wires if w in destination.wires)
        try:
            with pytest.raises(SyncwardError):
                load(source, destination, request, None, wire, look)
        finally:
            ended = time.monotonic()
            done.set()
            thread.join()
    return ended - began[0]


@pytest.mark.parametrize(
    ("view", "who"), [("silent", "source"), ("silent", "run"), ("endless", "run")]
)
def test_cancel_ends_a_load_within_two_seconds(engine, view, who):
    engine.source.view(view, getattr(engine.source, view))
    assert cancelled_after(engine, view, who=who) < 2
    assert engine.destination.rows(view) is None
    assert engine.destination.left_over() == []


def test_a_merge_of_files_is_cancelled_while_it_sorts_and_writes(pair, root):
    engine = Engine(SOURCES["sqlite"](pair, root), DESTINATIONS["files-jsonl"](pair, root), root)
    engine.source.wide("large", 60_000, 64)
    spec = engine.spec("large", "merge", cursor=None)
    with closing(engine.open_source()) as source, closing(engine.open_destination()) as destination:
        request = engine.request(spec)
        destination.claim_stream(request)

        def last(step):
            if step == "all parts":
                destination.cancel()

        with pytest.raises(TransientError, match="cancelled"):
            load(source, destination, request, None, WireFormat.ROWS, last)
    assert engine.destination.rows("large") is None
    assert engine.destination.left_over() == []


# ── a step of the operating system that fails, or is the last ────────────────────────────────


class Crash(Exception):  # noqa: N818 - an event
    """The worker died here."""


class Steps:
    """Counts what the interpreter asks of the file system below a directory, and ends at one."""

    def __init__(self) -> None:
        self.end: Any = None
        self.reached = False
        self.below = ""
        self.left = 0
        sys.addaudithook(self._hook)  # stays for good, so it is made once

    def _hook(self, event, arguments):
        if self.end is None or event not in {"open", "os.rename", "os.remove", "fcntl.flock"}:
            return
        if event != "fcntl.flock" and not str(arguments[0]).startswith(self.below):
            return
        self.left -= 1
        if self.left < 0:
            end, self.end, self.reached = self.end, None, True
            end()

    def arm(self, below, number, end):
        self.below, self.left, self.end, self.reached = str(below), number, end, False

    def disarm(self):
        self.end = None


@pytest.fixture(scope="session")
def steps():
    return Steps()


def _raise():
    raise Crash


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def crashes(engine, spec, steps, number):
    steps.arm(engine.destination.root, number, _raise)
    try:
        engine.sync(spec)
    except Crash:
        pass
    finally:
        steps.disarm()
    return steps.reached


def dies(engine, spec, steps, number):
    """The same in a child that is gone at once: nothing is cleaned up."""
    engine.fence += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks; the child only writes files
        process = os.fork()
    if process == 0:
        engine.fence -= 1
        steps.arm(engine.destination.root, number, _kill)
        with suppress(BaseException):
            engine.sync(spec)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("mode", ["append", "merge", "replace"])
@pytest.mark.parametrize(
    ("format_", "end"),
    [("files-jsonl", crashes), ("files-parquet", crashes), ("files-jsonl", dies)],
)
def test_files_are_as_before_or_after_whichever_step_is_the_last(  # noqa: PLR0917 - fixtures
    pair, root, steps, format_, mode, end
):
    engine = Engine(SOURCES["sqlite"](pair, root), DESTINATIONS[format_](pair, root), root)
    engine.source.create("orders", ORDERS)
    engine.source.insert("orders", [(i, datetime.now(UTC), "x") for i in range(1, 10)])
    spec = engine.spec("orders", mode)
    engine.sync(spec)
    number, reached = -1, True
    while reached:
        number += 1
        engine.source.insert("orders", [(100 + number, datetime.now(UTC), "y")])
        before = engine.destination.rows("orders")
        reached = end(engine, spec, steps, number)
        after = engine.destination.rows("orders")
        assert after == before or engine.same("orders")
        engine.sync(spec)
        assert engine.same("orders")
        assert engine.destination.left_over() == []
    assert number > 10


# ── errors tell nothing ──────────────────────────────────────────────────────────────────────


def everything(error):
    """All that a log could hold of an error."""
    found = traceback.TracebackException.from_exception(error)
    return "\n".join([str(error), repr(error), *found.format()])


def open_and_test(open_end):
    """Some refuse a login when they are opened, an API when it is asked."""
    with closing(open_end()) as end:
        end.test()


def test_no_error_tells_a_secret(source_kind, destination_kind, pair, root):
    source = SOURCES[source_kind](pair, root)
    source.create("orders", ORDERS)
    ends: list[tuple[Any, Callable[..., Any]]] = [
        (source, registry.open_source),
        (DESTINATIONS[destination_kind](pair, root), registry.open_destination),
    ]
    for end, open_ in ends:
        assert end.secrets or not registry.wanted_secrets(end.kind, end.config)
        for field in end.secrets:
            secrets = {**end.secrets, field: "hunter2-canary"}
            with pytest.raises(CredentialsError) as caught:
                open_and_test(lambda: open_(end.kind, end.config, secrets, policy(root)))  # noqa: B023
            assert "hunter2-canary" not in everything(caught.value)


@pytest.mark.parametrize("kind", ["sqlite", "files"])
@pytest.mark.parametrize(
    "path",
    [
        "../up",
        "/etc/passwd",
        "a/../../b",
        "",
        ".hidden",
        "a//b",
        "a/.b",
        "a\x00b",
        "a\\b",
        "x?mode=rwc",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused_where_it_is_written(kind, path, root):
    more = {"format": "jsonl"} if kind == "files" else {}
    with pytest.raises(ConfigError, match="write a path below"):
        registry.validate_config(kind, {"path": path, **more}, policy(root))


def open_files(kind, path, root):
    if kind == "sqlite":
        return registry.open_source(kind, {"path": path}, {}, policy(root))
    return registry.open_destination(kind, {"path": path, "format": "jsonl"}, {}, policy(root))


@pytest.mark.parametrize("kind", ["sqlite", "files"])
def test_files_are_off_unless_the_operator_opened_a_directory(kind):
    with pytest.raises(ConfigError, match="SYNCWARD_FILES_ROOT") as caught:
        open_files(kind, "a.db", None)
    assert caught.value.code == "files_refused"


@pytest.mark.parametrize("kind", ["sqlite", "files"])
def test_a_symbolic_link_does_not_lead_out(kind, root, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.db").write_bytes(b"")
    (root / "link").symlink_to(tmp_path / "secret")
    for path in ("link/x.db", "link"):
        with pytest.raises(ConfigError, match="symbolic link") as caught:
            open_files(kind, path, root)
        assert str(tmp_path) not in str(caught.value)


def test_a_pipe_does_not_hold_a_worker(root):
    os.mkfifo(root / "pipe")
    with pytest.raises(ConfigError, match="no regular file"):
        open_files("sqlite", "pipe", root)


def test_accounts_do_not_share_files(root):
    one, two = (policy(root).for_account(uuid4()).files_root for _ in "ab")
    assert one is not None
    assert two is not None
    assert one != two
    assert {one.parent, two.parent} == {root}
