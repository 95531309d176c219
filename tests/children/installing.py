"""Puts a fake connector where `connector install` would, without a package."""

import shutil
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from connectors.child.installed import MANIFEST, VENV, Kind, Manifest, files_below, hash_of, place
from schemas.children import ChildPolicy

HERE = Path(__file__).parent
CONNECTORS: dict[Kind, tuple[str, str, str]] = {
    "singer": ("tap-fake", "1.0", "fake_tap.py"),
    "airbyte": ("airbyte-source-fake", "1.0", "fake_source.py"),
}


def install(root: Path, kind: Kind, interpreter: str = sys.executable) -> str:
    """Install the fake of a kind below a directory; return what a resource calls it."""
    package, version, script = CONNECTORS[kind]
    directory = place(root, f"{package}=={version}")
    path = directory / VENV / "bin"
    if not path.exists():
        path.mkdir(parents=True)
        (path / "python").symlink_to(Path(interpreter).resolve())
        shutil.copy(HERE / script, path / package)
    files = {name: hash_of(entry) for name, entry in files_below(directory / VENV)}
    manifest = Manifest(
        kind=kind,
        package=package, version=version, executables=(package,), installed_at="now", files=files,
    )  # fmt: skip
    (directory / MANIFEST).write_text(manifest.model_dump_json())
    return f"{package}=={version}"


def policy_of(root: Path, **more: Any) -> ChildPolicy:
    """What allows them, as a rule of development; with little patience."""
    usual = ChildPolicy(
        directory=root, unguarded=True, unguarded_there=True, writable_refused=False,
        silence=timedelta(seconds=20),
    )  # fmt: skip
    return replace(usual, **more)
