"""Data keys are unwrapped where they are meant to be: import contracts see modules, not methods."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

#: Who may call what besides crypto/ itself. A rewrap hands out no data key, only a wrapped one.
CALLERS = {
    "unwrap_many": ("workers/",),
    "rewrap_many": ("workers/", "cli/key_rotation.py"),
    "open_envelope": (),
    "open_body": (),
    "open_chunk": (),
}


def names_used(path: Path) -> set[str]:
    """Return every name and attribute of a module, called or only passed on, and its strings."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)  # getattr(keyring, "unwrap_many")
    return found


def strangers(root: Path) -> list[str]:
    return sorted(
        f"{path.relative_to(root).as_posix()}: {name}"
        for folder in FOLDERS
        if folder != "crypto"
        for path in (root / folder).rglob("*.py")
        for name in names_used(path) & set(CALLERS)
        if not path.relative_to(root).as_posix().startswith(CALLERS[name] or ("\0",))
    )


def test_data_keys_are_unwrapped_by_workers_and_inside_crypto_only():
    assert strangers(ROOT) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("cli/runs.py", "x = keyring.unwrap_many(items)"),
        ("storage/logs.py", "f = keyring.rewrap_many"),
        ("scheduler/due.py", "x = getattr(keyring, 'unwrap_many')(items)"),
        ("cli/key_rotation.py", "keyring.unwrap_many(items)"),
        ("workers/ends.py", "from crypto.opening import open_envelope"),
    ],
)
def test_a_call_elsewhere_would_be_found(tmp_path, place, line):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / place).write_text(line + "\n")
    assert [found.split(":")[0] for found in strangers(tmp_path)] == [place]


def test_the_contracts_that_say_who_opens_are_there():
    contracts = {
        module: set(contract["allowed_importers"])
        for contract in PROJECT["tool"]["importlinter"]["contracts"]
        if contract["type"] == "protected"
        for module in contract["protected_modules"]
    }
    assert contracts["crypto.unseal"] == {"workers"}
    assert contracts["crypto.records"] == {"cli"}
    assert contracts["crypto.streams"] == {"workers", "crypto.records"}
    assert contracts["crypto.opening"] == {
        f"crypto.{name}" for name in ("unseal", "records", "streams", "selftest", "canary")
    }


def test_the_command_line_loads_no_http_for_a_keyring_file(tmp_path):
    code = (
        "import sys; from pathlib import Path; from crypto import keyring\n"
        "keyring.load(str(keyring.init(Path(sys.argv[1]))[0])); print('httpx' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "keys")], capture_output=True, text=True,
        check=True, cwd=ROOT,
    )  # fmt: skip
    assert answer.stdout == "False\n"
