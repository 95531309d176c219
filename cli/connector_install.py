"""`syncward connector install`, `list` and `remove`: connectors of others, on this host."""

import fcntl
import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import click

from cli.context import Cli
from cli.show import plain, table
from connectors.child import installed as child_installed
from connectors.child.installed import MANIFEST, VENV, Kind, Manifest
from schemas.errors import ConfigError, Conflict, NotFound
from schemas.settings import Settings

_SAID_MAX = 600
_INSTALL_S = 1_800
KINDS: tuple[Kind, ...] = get_args(Kind)


@click.argument("connector", metavar="PACKAGE==VERSION")
@click.option("--kind", type=click.Choice(KINDS), help="By the package's name if left out.")
@click.option("--executable", help="The command to start, if its package brings several.")
@click.option("--from-source", is_flag=True, help="Let packages run code of their own to be built.")
@click.option("--again", is_flag=True, help="In the place of what is installed.")
def install(
    cli: Cli, connector: str, kind: Kind | None, executable: str | None, *, from_source: bool,
    again: bool,
) -> None:  # fmt: skip
    """Bring a Singer tap or an Airbyte source to this host, with the hash of each of its files."""
    from storage import installed as events  # noqa: PLC0415 - `--help` must not wait for it

    package, version = _requirement(connector)
    kind = kind or _kind_of(package)
    with _locked(cli) as root:
        directory = child_installed.place(root, connector)
        if child_installed.read_manifest(directory) is not None and not again:
            raise Conflict(f"{connector} is installed; to install it once more: --again")
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o755)
        try:
            cli.note(f"{connector}: is installed into an environment of its own")
            _bring(directory, connector, from_source=from_source)
            manifest = _made(directory, kind, package, version, executable)
            with cli.transaction() as tx:
                events.note_installed(
                    tx, package, version, kind=kind, sha256=manifest.digest, principal=cli.principal
                )
            _write(directory, manifest)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    cli.answer(
        {"installed": connector, "kind": kind, "sha256": manifest.digest,
         "executables": list(manifest.executables), "files": len(manifest.files)},
        lambda: f"{connector} ({kind}) is installed, {len(manifest.files):,} files; next: the "
        f"same on every other worker's host; then a resource of kind {kind}",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """One connector of this host."""

    connector: str
    kind: str
    executables: Sequence[str]
    installed_at: str
    changed: str | None  # the first file that is not as it was installed


def list_(cli: Cli) -> None:
    """List the connectors of others on this host; each file is compared with its hash."""
    lines = []
    for path in sorted(_root(cli).glob(f"*@*/{MANIFEST}")):
        found = child_installed.read_manifest(path.parent)
        if found is None:
            continue
        try:
            changed, _ = child_installed.compared(path.parent, found, {})
        except OSError:
            changed = f"{VENV} cannot be read"
        name = f"{found.package}=={found.version}"
        lines.append(Line(name, found.kind, found.executables, found.installed_at, changed))
    rows = [
        (one.connector, one.kind, ", ".join(one.executables), one.installed_at[:10],
         "as installed" if one.changed is None else f"changed: {plain(one.changed)}")
        for one in lines
    ]  # fmt: skip
    heads = ("CONNECTOR", "KIND", "COMMANDS", "SINCE", "FILES")
    cli.answer(lines, lambda: table(heads, rows))


@click.argument("connector", metavar="PACKAGE==VERSION")
def remove(cli: Cli, connector: str) -> None:
    """Remove a connector of others from this host; runs that want it fail from then on."""
    from storage import installed as events  # noqa: PLC0415 - as above

    package, version = _requirement(connector)
    with _locked(cli) as root:
        directory = child_installed.place(root, connector)
        if not directory.is_dir():
            raise NotFound(f"{connector} is not installed; syncward connector list shows what is")
        with cli.transaction() as tx:
            events.note_removed(tx, package, version, principal=cli.principal)
        (directory / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(directory)
    cli.answer({"removed": connector}, lambda: f"{connector} is removed from this host")


def _requirement(text: str) -> tuple[str, str]:
    try:
        return child_installed.requirement(text)
    except ValueError:
        raise ConfigError(
            f"{plain(text)}: write a package and its exact version, e.g. tap-github==1.2.3"
        ) from None


def _kind_of(package: str) -> Kind:
    parts = package.split("-")
    if "tap" in parts:
        return "singer"
    if "source" in parts:
        return "airbyte"
    raise ConfigError(f"{package}: its name does not say what it speaks; add --kind")


def _root(cli: Cli) -> Path:
    root = cli.settings.connectors_dir
    if root is None:
        raise ConfigError(
            "SYNCWARD_CONNECTORS_DIR is not set; name a directory that workers may read and not "
            "write (docs/child-connectors.md)"
        )
    if not root.is_dir():
        raise ConfigError(f"SYNCWARD_CONNECTORS_DIR: {root} is no directory; make it")
    return root.absolute()


@contextmanager
def _locked(cli: Cli) -> Iterator[Path]:
    """Be the only one who changes the directory."""
    root = _root(cli)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root


def _bring(directory: Path, connector: str, *, from_source: bool) -> None:
    """Make the environment; the index and its login are those of the operator's own pip."""
    venv = directory / VENV
    _run(connector, [sys.executable, "-I", "-m", "venv", str(venv)])
    wheels = [] if from_source else ["--only-binary", ":all:"]
    python = str(venv / "bin" / "python")
    pip = [python, "-I", "-m", "pip", "--no-input", "--disable-pip-version-check", "-q"]
    _run(connector, [*pip, "install", "--compile", *wheels, connector])


def _run(connector: str, command: Sequence[str]) -> None:
    """Run a step of an installation, which sees none of our settings."""
    ours = [part for name in Settings.model_fields for part in ("-u", f"SYNCWARD_{name.upper()}")]
    try:
        done = subprocess.run(  # noqa: S603 - the operator asked for it
            ["/usr/bin/env", *ours, *command], capture_output=True, text=True, check=False,
            timeout=_INSTALL_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        raise ConfigError(
            f"{connector}: could not be installed in {_INSTALL_S // 60} min"
        ) from None
    if done.returncode != 0:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).split())[-_SAID_MAX:]
        raise ConfigError(
            f"{connector}: could not be installed (packages that have to be built need "
            f"--from-source); it was said: {plain(said)}"
        )


def _made(
    directory: Path, kind: Kind, package: str, version: str, executable: str | None
) -> Manifest:
    names = _executables(directory, package)
    if executable is not None:
        if executable not in names:
            raise ConfigError(
                f"{package}: brings no command {plain(executable)}; it has "
                f"{', '.join(names) or 'none'}"
            )
        names = [executable, *(name for name in names if name != executable)]
    if not names:
        raise ConfigError(f"{package}: brings no command, so it is no connector")
    root = directory / VENV
    files = {
        name: child_installed.hash_of(path) for name, path in child_installed.files_below(root)
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Manifest(
        kind=kind, package=package, version=version, executables=tuple(names), installed_at=now,
        files=files,
    )  # fmt: skip


def _executables(directory: Path, package: str) -> list[str]:
    """Return the commands of a package, read from its files: nothing of it is run."""
    paths = [str(path) for path in (directory / VENV).glob("lib/python*/site-packages")]
    found = [
        entry.name
        for one in importlib.metadata.distributions(name=package, path=paths)
        for entry in one.entry_points
        if entry.group == "console_scripts" and (directory / VENV / "bin" / entry.name).is_file()
    ]
    own = {package, package.removeprefix("airbyte-")}
    return sorted(set(found), key=lambda name: (name not in own, name))


def _write(directory: Path, manifest: Manifest) -> None:
    new = directory / f"{MANIFEST}.new"
    new.write_text(manifest.model_dump_json())
    new.chmod(0o644)
    new.replace(directory / MANIFEST)
