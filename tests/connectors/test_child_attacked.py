"""Children that attack the worker, and installations that let them: what holds them."""

import json
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from cli import connector_install
from connectors import registry
from connectors.child import installed as child_installed
from connectors.child import launcher as child_launcher
from connectors.child.installed import VENV, installed, place
from connectors.child.voice import Voice
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError
from schemas.redaction import REDACTOR
from tests.children.installing import install, policy_of
from tests.connectors.test_child import fake, left_behind

_PYTHON = Path("/usr/bin/python3")
_NOBODY = 65534
_AS_ROOT = pytest.mark.skipif(
    os.geteuid() != 0 or not _PYTHON.exists() or shutil.which("setpriv") is None,
    reason="needs root to become another",
)


def test_processes_that_fork_and_end_all_the_time_end_with_the_child(tmp_path, monkeypatch):
    with fake(tmp_path, "singer", monkeypatch) as tap:
        with suppress(ConfigError):  # there may be more than are allowed, before it ends
            tap.read("runs_away")
        assert [left_behind(tmp_path) for _ in range(20)] == [[]] * 20


@pytest.mark.skipif(os.uname().machine not in child_launcher._CALLS, reason="no filter for it")
def test_no_process_of_a_child_leaves_its_group_so_one_signal_ends_them_all(tmp_path, monkeypatch):
    with fake(tmp_path, "singer", monkeypatch) as tap:
        assert len(tap.read("leaves")[0][0]) == 3
        assert [line for line in tap.said if "apart" in line] == ["tap-fake: apart: []"]


def test_helpers_that_have_ended_count_no_more(tmp_path, monkeypatch):
    """More than are allowed at a time, left behind and ended: nobody else takes leave of them."""
    with fake(tmp_path, "singer", monkeypatch) as tap:
        assert len(tap.read("many_helpers")) > 0
        assert left_behind(tmp_path) == []


@_AS_ROOT
def test_what_lets_a_worker_switch_logins_is_not_the_childs():
    """A worker that is not root has it as ambient capabilities, which a program would inherit."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        root = Path(made)
        root.chmod(0o755)
        launcher = shutil.copy(child_launcher.__file__, root)
        scratch = root / "scratch"
        scratch.mkdir()
        os.chown(scratch, _NOBODY, _NOBODY)
        read, write = os.pipe()
        order = {
            "command": ["/bin/cat", "/proc/self/status"], "environment": {},
            "directory": str(scratch), "keep": [], "status": write, "memory": 2**30, "cpu": 60,
            "user": "", "confined": False, "readable": [], "guard": None,
        }  # fmt: skip
        caps = "+setuid,+setgid"
        with subprocess.Popen(
            ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups",
             f"--inh-caps={caps}", f"--ambient-caps={caps}", str(_PYTHON), "-I", "-S", launcher],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(write,), bufsize=0,
        ) as process:  # fmt: skip
            os.close(write)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(order).encode() + b"\n")
            lines = process.stdout.read().decode().splitlines()
            told = json.loads(os.read(read, 4_096))  # the launcher ends once its input does
        os.close(read)
    assert told["code"] == 0
    status = dict(line.split(":\t", 1) for line in lines)
    assert status["Uid"].split() == [str(_NOBODY)] * 4
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapAmb")} == {0}


def _answer(root: Path, connector: str) -> str:
    policy = policy_of(root, writable_refused=True, user="nobody")
    try:
        installed(policy, "singer", connector, "")
    except ConfigError as error:
        return error.code
    return "started"


@pytest.mark.skipif(os.geteuid() == _NOBODY, reason="would be the login that may")
@pytest.mark.parametrize("which", ["file", "directory", "manifest", "above"])
def test_production_refuses_whatever_the_childs_login_may_write_to(which):
    above = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        above.chmod(0o755)
        root = above / "connectors"
        connector = install(root, "singer")
        directory = place(root, connector)
        assert _answer(root, connector) == "started"
        path = {
            "file": directory / VENV / "bin" / "tap-fake", "directory": directory / VENV / "bin",
            "manifest": directory / child_installed.MANIFEST, "above": above,
        }[which]  # fmt: skip
        before = path.stat().st_mode
        path.chmod(0o777)
        assert _answer(root, connector) == "connector_changed"
        path.chmod(before)
        assert _answer(root, connector) == "started"
    finally:
        shutil.rmtree(above)


def test_a_secret_is_masked_wherever_a_piece_of_text_ends():
    known = "schlüssel-für-überall-ä-canary"
    said: list[str] = []
    with REDACTOR.holder() as secrets:
        secrets.know(known)
        for place_ in range(len(known.encode())):
            voice = Voice(said.append)
            text = f"login {known} is wrong".encode()
            voice.feed(text[: 6 + place_])
            voice.feed(text[6 + place_ :])
            voice.close()
    assert len(said) == len(known.encode())
    assert len(set(said)) == 1
    assert "canary" not in said[0]
    assert said[0].endswith("is wrong")


def test_a_list_of_secrets_is_not_stored_in_clear():
    config = {"connector": "tap-x==1.0", "settings": {"api_key": ["", "hunter2-canary"]}}
    with pytest.raises(ConfigError, match="api_key is a secret") as caught:
        registry.validate_config("singer", config, LinkPolicy())
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "-r==1.0",
        "--index-url==1.0",
        "tap-x[extra]==1.0",
        "tap-x==1.0 --pre",
        "tap-x==1.0;x",
        "tap-x==1.*",
        "tap-x==1.0\n",
        "tap-x @ https://example.org/x.whl",
        "tap-x>=1.0",
        "../x==1",
        "git+https://example.org/x==1.0",
        "tap-x==-1",
        "tap-x==1.0 --hash=sha256:00",
        "/x==1.0",
    ],
)
def test_nothing_but_a_package_and_its_version_is_installed(text):
    with pytest.raises(ConfigError, match="exact version"):
        connector_install._requirement(text)
