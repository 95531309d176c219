"""Whether processes start at all: T9 (keyrings) and T27 (the production profile), on real ones.

A process that refuses ends with 78, lists everything that is wrong with it, and has by then bound
no port, connected to nothing, written no file and no row.
"""

import http.client
import json
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import pytest
from psycopg import sql

from cli.supervisor import child_environment
from crypto import keyring as keyrings
from embedded.daemons import free_port
from schemas.jobs import Job
from storage import migrate
from tests.protected import PASSWORD, protect
from tests.spare import ours
from workers.enqueue import JobQueue, open_client

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

EX_CONFIG = 78
_STARTED: set[str] = set()


def refuse(module: str, directory: Path, *words: str, **settings: object) -> list[str]:
    """Start a process that must refuse; return its reasons.

    The first of a module is a process of its own, the others are forks of one that has imported.
    """
    named = {f"SYNCWARD_{name.upper()}": str(value) for name, value in settings.items()}
    environment = child_environment(directory, **named)
    if module in _STARTED:
        ended = ours().run(module, *words, environment=environment)
    else:
        _STARTED.add(module)
        ended = subprocess.run(
            [sys.executable, "-m", module, *words], env=environment, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
    assert ended.returncode == EX_CONFIG, ended.stderr
    assert PASSWORD not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert "refuses to start:" in ended.stderr
    return re.findall(r"^  - (.*)$", ended.stderr, re.MULTILINE)


def about(reasons: list[str]) -> list[str]:
    return sorted({re.split(r"[ :]", reason)[0] for reason in reasons})


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    found = ((p, p.lstat()) for p in directory.rglob("*"))
    return {str(p): (about.st_size, about.st_mtime_ns) for p, about in found}


@contextmanager
def untouched():
    """Listen, and find out whether anybody ever came."""
    came = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def wait() -> None:
            with suppress(OSError):
                while True:
                    came.append(listener.accept()[1])

        threading.Thread(target=wait, daemon=True).start()
        yield listener.getsockname()[1]
        time.sleep(0.1)
    assert came == []


# ── T27 ─────────────────────────────────────────────────────────────────────────────────────────

LINKS = {"SYNCWARD_DATABASE_URL", "SYNCWARD_REDIS_URL"}
KEYS = {"SYNCWARD_KEYRING"}
METRICS = {"SYNCWARD_METRICS_HOST"}


@pytest.mark.parametrize(
    ("module", "words", "named"),
    [
        ("workers.process", (), LINKS | KEYS | METRICS),
        ("scheduler.process", (), LINKS | KEYS | METRICS),
        ("cli.main", ("up",), LINKS | KEYS | METRICS),
        ("cli.main", ("metrics", "--serve"), {"SYNCWARD_DATABASE_URL"} | KEYS | METRICS),
        ("cli.main", ("account", "list"), {"SYNCWARD_DATABASE_URL"} | KEYS),
        ("cli.main", ("db", "upgrade"), {"SYNCWARD_DATABASE_URL"} | KEYS),
    ],
)
def test_production_refuses_plaintext_and_lists_all_reasons_at_once(tmp_path, module, words, named):
    """sslmode=require, redis://, vault+http://, the login postgres, metrics for everybody."""
    with untouched() as port:
        reasons = refuse(
            module, tmp_path, *words,
            database_url=f"postgresql://postgres:{PASSWORD}@127.0.0.1:{port}/x?sslmode=require",
            redis_url=f"redis://default:{PASSWORD}@127.0.0.1:{port}/0",
            keyring=f"vault+http://127.0.0.1:{port}/transit",
            metrics_host="0.0.0.0", metrics_port=free_port(None),  # noqa: S104 - it must refuse
        )  # fmt: skip
    assert set(about(reasons)) - {"keyring"} == named  # a worker also says that it is unusable
    assert len([r for r in reasons if r.startswith("SYNCWARD_DATABASE_URL")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_and_what_is_wrong_are_told_together(tmp_path):
    reasons = refuse(
        "workers.process", tmp_path, redis_url=f"redis://:{PASSWORD}@127.0.0.1/0",
        keyring=tmp_path / "none.json", worker_threads="many", metrics_token_file=tmp_path / "none",
    )  # fmt: skip
    assert about(reasons) == [
        "SYNCWARD_DATABASE_URL",
        "SYNCWARD_REDIS_URL",
        "SYNCWARD_WORKER_THREADS",
    ]
    reasons = refuse(
        "workers.process", tmp_path, redis_url=f"redis://:{PASSWORD}@127.0.0.1/0",
        keyring=tmp_path / "none.json", metrics_token_file=tmp_path / "none",
    )  # fmt: skip
    assert about(reasons) == ["SYNCWARD_DATABASE_URL", "SYNCWARD_REDIS_URL", "keyring", "metrics"]


# ── T9 ──────────────────────────────────────────────────────────────────────────────────────────


def spoilt(keys: Path, how: str) -> Path:
    """A keyring that a worker must not use."""
    file = keys / "worker.json"
    document = json.loads(file.read_text())
    match how:
        case "missing":
            file.unlink()
        case "readable":
            file.chmod(0o644)
        case "a link":
            file.rename(keys / "real.json")
            file.symlink_to(keys / "real.json")
        case "a directory":
            file.unlink()
            file.mkdir()
        case "cut off":
            file.write_text(file.read_text()[:100])
        case "foreign":
            file.write_text(json.dumps({"keys": [{"k": PASSWORD}]}))
        case "sample":
            document["roots"][0]["private"] = "A" * 43 + "="  # 32 zero bytes
            file.write_text(json.dumps(document))
        case _:
            return keys / "operator.json"
    return file


@pytest.mark.parametrize(
    "how",
    [
        *("missing", "readable", "sample", "the operator's"),
        *(pytest.param(how, marks=pytest.mark.full)  # in every run: tests/unit/crypto
          for how in ("a link", "a directory", "cut off", "foreign")),
    ],
)  # fmt: skip
def test_a_keyring_that_must_not_be_used_is_refused_before_anything_is_bound(tmp_path, how):
    keyrings.init(tmp_path / "keys")
    keyring = spoilt(tmp_path / "keys", how)
    before = contents(tmp_path)
    with untouched() as port, socket.create_server(("127.0.0.1", 0)) as taken:
        reasons = refuse(
            "workers.process", tmp_path, profile="development", keyring=keyring,
            database_url=f"postgresql://w:{PASSWORD}@127.0.0.1:{port}/x",
            redis_url=f"redis://:{PASSWORD}@127.0.0.1:{port}/0",
            metrics_port=taken.getsockname()[1],  # to bind it would be a second reason
        )  # fmt: skip
    (reason,) = reasons
    assert "keyring" in reason.lower()
    assert contents(tmp_path) == before


def rows(world) -> list[object]:
    tables = ("workers", "audit.event", "active_runs", "leases", "run_logs", "keystore.dek")
    return [world.control.one(f"SELECT count(*) FROM {name}") for name in tables]


def test_a_keyring_of_another_installation_is_refused_before_anything_is_written(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": "{mode: replace}"})  # stores credentials, so that a root is in use
    world.close()
    _, foreign = keyrings.init(world.directory / "other")
    url = world.cli.settings.database_url.get_secret_value()
    before, written = contents(world.directory), rows(world)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = {
            "profile": "development", "database_url": url,
            "redis_url": world.cli.settings.redis_url.get_secret_value(),
            "metrics_port": taken.getsockname()[1],
        }  # fmt: skip
        (reason,) = refuse("workers.process", world.directory, **settings, keyring=foreign)
        assert "root" in reason
        assert (contents(world.directory), rows(world)) == (before, written)
        right = world.directory / "keys" / "worker.json"
        (reason,) = refuse("workers.process", world.directory, **settings, keyring=right)
        assert "Address already in use" in reason  # with the right one it gets as far as that


# ── production, protected: it starts ────────────────────────────────────────────────────────────


@pytest.fixture
def protected(world, tmp_path, admin):
    with protect(world, tmp_path, admin) as made:
        yield made


def ask(port: int, method: str = "GET", **headers: str) -> tuple[int, str]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    link.request(method, "/metrics", headers=headers)
    answer = link.getresponse()
    found = answer.status, answer.read().decode()
    link.close()
    return found


@contextmanager
def started(directory: Path, settings: dict[str, object], *words: str):
    named = {f"SYNCWARD_{name.upper()}": str(value) for name, value in settings.items()}
    with (directory / "out.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], env=child_environment(directory, **named),
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError):
                ask(int(str(settings["metrics_port"])))
                break
            assert process.poll() is None, (directory / "out.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        assert process.wait(timeout=40) in {0, -15}


def shown(port: int, token: str, sample: str) -> None:
    deadline = time.monotonic() + 30
    while sample not in ask(port, Authorization=f"Bearer {token}")[1]:
        assert time.monotonic() < deadline, ask(port, Authorization=f"Bearer {token}")[1]
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("words", "login", "sample"),
    [
        (("workers.process",), "w", "syncward_claims_total"),
        (("scheduler.process",), "s", "syncward_scheduler_items_total"),
        (("cli.main", "metrics", "--serve"), "o", "syncward_queue_depth"),
    ],
)
def test_production_starts_over_tls_with_a_login_of_its_own_and_shows_metrics_to_the_token_only(
    protected, tmp_path, words, login, sample
):
    settings = protected.of(login)
    token = Path(str(settings["metrics_token_file"])).read_text().strip()
    port = int(str(settings["metrics_port"]))
    with started(tmp_path, settings, *words) as process:
        status, text = ask(port, Authorization=f"Bearer {token}")
        assert (status, sample in text) == (200, True)
        for headers in ({}, {"Authorization": f"Bearer {token[:-1]}x"}, {"Authorization": "Bearer"},
                        {"Authorization": token}, {"Authorization": f"Basic {token}"}):  # fmt: skip
            status, text = ask(port, **headers)
            assert (status, "syncward_" in text) == (401, False)
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            assert ask(port, method, Authorization=f"Bearer {token}")[0] == 405
        if words[0] == "workers.process":  # with no more of Redis than docs/network.md gives it
            url = str(settings["redis_url"])
            queue = JobQueue(open_client(url))
            assert queue.send(Job(run_id=uuid4(), dispatch=1))
            queue.close()
            shown(port, token, 'syncward_claims_total{result="unknown"} 1.0')
        if words[0] != "cli.main":
            limits = Path(f"/proc/{process.pid}/limits").read_text()
            assert re.search(r"Max core file size +0 +0 ", limits)
    assert token not in (tmp_path / "out.log").read_text()


@pytest.mark.parametrize(
    ("words", "login", "why"),
    [
        (("workers.process",), "su", "is a superuser"),
        (("workers.process",), "both", "is shared: it is also a member of syncward_operator"),
        (("workers.process",), "owns", "a member of syncward_migrator, syncward_owner"),
        (("scheduler.process",), "su", "is a superuser"),
        (("cli.main", "account", "list"), "both", "it is also a member of syncward_worker"),
        (("cli.main", "metrics", "--serve"), "both", "it is also a member of syncward_worker"),
    ],
)
def test_a_login_that_may_do_more_than_its_process_is_refused(
    protected, tmp_path, words, login, why
):
    settings, before = protected.of(login), rows(protected.world)
    with socket.create_server(("127.0.0.1", 0)) as taken:  # to bind it would be another reason
        settings["metrics_port"] = taken.getsockname()[1]
        (reason,) = refuse(words[0], tmp_path, *words[1:], **settings)
    assert why in reason
    assert rows(protected.world) == before


@pytest.fixture
def keystore_url(protected, admin):
    """A keystore apart: {login} is to be filled in."""
    cluster, name = protected.world.control.cluster, f"keystore_{secrets.token_hex(4)}"
    admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    migrate.upgrade_keystore(
        f"postgresql://{cluster.superuser}:{cluster.password}@{cluster.host}:{cluster.port}/{name}"
    )
    yield protected.database.replace(f"/{protected.world.control.database}?", f"/{name}?")
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.mark.parametrize(
    ("words", "right", "login", "why"),
    [
        (("workers.process",), "w", "su", "is a superuser of the keystore"),
        pytest.param(("workers.process",), "w", "owns", "of syncward_migrator, syncward_owner",
                     marks=pytest.mark.full),
        pytest.param(("cli.main", "keys", "status"), "o", "su", "is a superuser of the keystore",
                     marks=pytest.mark.full),
        (("cli.main", "keys", "status"), "o", "both", "it is also a member of syncward_worker"),
    ],
)  # fmt: skip
def test_the_login_of_a_keystore_apart_may_not_do_more_either(
    protected, keystore_url, tmp_path, *, words, right, login, why
):
    settings = protected.of(right, keystore_url=keystore_url.format(login=login))
    with socket.create_server(("127.0.0.1", 0)) as taken:  # to bind it would be another reason
        settings["metrics_port"] = taken.getsockname()[1]
        (reason,) = refuse(words[0], tmp_path, *words[1:], **settings)
        assert reason.startswith("SYNCWARD_KEYSTORE_URL: login ")
        assert why in reason
        if words[0] == "workers.process":  # with the right one it gets as far as that
            settings["keystore_url"] = keystore_url.format(login=right)
            (reason,) = refuse(words[0], tmp_path, *words[1:], **settings)
            assert "Address already in use" in reason


def test_a_token_that_others_can_read_or_guess_is_refused(protected, tmp_path):
    settings = protected.of("s")
    token = Path(str(settings["metrics_token_file"]))
    token.chmod(0o640)
    (reason,) = refuse("scheduler.process", tmp_path, **settings)
    assert "others can read it" in reason
    token.chmod(0o600)
    token.write_text("short")
    (reason,) = refuse("scheduler.process", tmp_path, **settings)
    assert "at least 16 characters" in reason
    assert "short" not in reason


def test_memory_is_kept_private_in_production_and_readable_in_development():
    code = (
        "import ctypes, resource; from schemas.settings import Settings; "
        "from schemas.start import keep_memory_private; "
        "keep_memory_private(Settings(profile={!r})); "
        "print(ctypes.CDLL(None).prctl(3), *resource.getrlimit(resource.RLIMIT_CORE))"
    )
    found = {
        profile: subprocess.run(
            [sys.executable, "-c", code.format(profile)], capture_output=True, text=True,
            check=True, cwd=Path(__file__).parent.parent.parent,
        ).stdout.split()
        for profile in ("production", "development")
    }  # fmt: skip
    assert found == {"production": ["0", "0", "0"], "development": ["1", "0", "0"]}
