"""The tree keeps its own rules: names, sizes, docstrings, and contracts that cover everything."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = sorted(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
LINES_MAX = 70


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_folders_wheel_contracts_and_coverage_name_the_same_packages():
    folders = {p.parent.name for p in ROOT.glob("*/*.py")} - {"tests", "benchmarks"}
    tool = PROJECT["tool"]
    assert sorted(folders) == PACKAGES
    assert sorted(tool["importlinter"]["root_packages"]) == PACKAGES
    assert sorted(tool["coverage"]["run"]["source"]) == PACKAGES


def test_every_package_stands_in_a_layer():
    layers = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    named = {name.strip() for layer in layers["layers"] for name in layer.split("|")}
    assert sorted(named) == PACKAGES


def test_all_of_workers_but_the_door_is_protected():
    contract = next(
        c for c in PROJECT["tool"]["importlinter"]["contracts"] if "only door" in c["name"]
    )
    modules = {f"workers.{p.stem}" for p in (ROOT / "workers").glob("*.py")}
    assert set(contract["protected_modules"]) == modules - {"workers.enqueue", "workers.__init__"}


def test_no_dependency_owns_one_of_our_names():
    owners = metadata.packages_distributions()  # does not list us: installed by a .pth file
    assert "click" in owners
    assert {name: owners[name] for name in PACKAGES if name in owners} == {}


def test_our_modules_come_from_this_repository():
    code = (
        "import importlib, json, sys; "
        "print(json.dumps([importlib.import_module(n).__path__[0] for n in sys.argv[1:]]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, *PACKAGES], capture_output=True, text=True, check=True, cwd="/"
    )
    assert json.loads(answer.stdout) == [str(ROOT / name) for name in PACKAGES]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is_for(path):
    text = path.read_text(encoding="utf-8")
    if path.name == "__init__.py" and not text:
        return
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_on_a_screen(path):
    long = {
        f.name: f.end_lineno - f.lineno + 1
        for f in functions(path)
        if f.end_lineno is not None and f.end_lineno - f.lineno + 1 > LINES_MAX
    }
    assert long == {}


def test_public_functions_that_other_folders_call_have_docstrings():
    missing = []
    called = {"storage", "crypto", "connectors", "embedded"}
    for path in sources():
        folders = set(path.relative_to(ROOT).parts)
        if not folders & called or "migrations" in folders:
            continue
        missing += [
            f"{path.relative_to(ROOT)}:{node.name}"
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ]
    assert missing == []


#: The folder, if one is named, and the file; a pattern or an argument is none.
FILE_NAMED = re.compile(r"(?<![\w/.{}*-])((?:[a-z_0-9]+/)*)([a-z_0-9]+\.py)\b(?!\()")


def test_files_that_comments_and_pages_name_are_there():
    known = {path.name for path in sources()}
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    named = [
        (path, folder, name)
        for path in (*sources(), *pages)
        for folder, name in FILE_NAMED.findall(path.read_text(encoding="utf-8"))
    ]
    assert len(named) > 100
    gone = [
        (str(path.relative_to(ROOT)), folder + name)
        for path, folder, name in named
        if (folder or name not in known)
        and not any((at / folder / name).exists() for at in (ROOT, path.parent))
    ]
    assert gone == []


def test_nothing_reads_outside_the_repository():
    for path in sources():
        assert "../shared" not in path.read_text(encoding="utf-8")


def test_the_lock_names_hashes_and_no_addresses():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    pinned = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert all("==" in line for line in pinned)
    assert text.count("--hash=sha256:") >= len(pinned)
