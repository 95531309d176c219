"""Puts a fake connector where `connector install` would, without a package."""

import shutil
import sys
from datetime import timedelta
from pathlib import Path

from connectors.child_installed import MANIFEST, VENV, Manifest, files_below, hash_of
from schemas.children import ChildPolicy

HERE = Path(__file__).parent
CONNECTORS = {
    "singer": ("tap-fake", "1.0", "fake_tap.py"),
    "airbyte": ("airbyte-source-fake", "1.0", "fake_source.py"),
}


def install(root: Path, kind: str) -> str:
    """Install the fake of a kind below a directory; return what a resource calls it."""
    package, version, script = CONNECTORS[kind]
    directory = root / f"{package}=={version}"
    path = directory / VENV / "bin"
    if not path.exists():
        path.mkdir(parents=True)
        (path / "python").symlink_to(Path(sys.executable).resolve())
        shutil.copy(HERE / script, path / package)
    files = {name: hash_of(entry) for name, entry in files_below(directory / VENV)}
    manifest = Manifest(
        kind=kind,  # type: ignore[arg-type]  # one of the two
        package=package, version=version, executables=(package,), installed_at="now", files=files,
    )  # fmt: skip
    (directory / MANIFEST).write_text(manifest.model_dump_json())
    return f"{package}=={version}"


def policy_of(root: Path, **more: object) -> ChildPolicy:
    """What allows them: as a rule of development."""
    allowed = ChildPolicy(directory=root, unguarded=True, writable_refused=False)
    values = {"silence": timedelta(seconds=20), **more}
    return ChildPolicy(
        **{name: values.get(name, getattr(allowed, name)) for name in ChildPolicy.__slots__}
    )
