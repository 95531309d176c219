#!/usr/bin/env python3
"""Make .venv and install the locked dependencies. Standard library only; `make setup` runs it.

Needs python3 >= 3.11 with venv (Debian and Ubuntu: python3-venv, installed here when run as root),
or uv on PATH. Uses uv inside the environment where it can be had, pip otherwise.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements.lock"
OLDEST = (3, 11)


def main() -> None:
    """Do what is missing; a second call with nothing changed is quick."""
    if sys.version_info < OLDEST:
        fail("needs python3 >= 3.11; try: make PYTHON=/path/to/python3.12 …")
    os.chdir(ROOT)
    if not usable(PYTHON):
        make_environment()
    packages = sum(1 for line in LOCK.read_text().splitlines() if "==" in line)
    print(f"setup: installing {packages} packages (hash-checked)", flush=True)
    if not (install_with_uv() or install_with_pip()):
        fail("the packages could not be installed; see the lines above")
    print("setup: done", flush=True)


def usable(python: Path) -> bool:
    """Say whether an environment is there and whole: an interrupted one is made again."""
    return python.exists() and quiet([python, "-c", "import encodings, venv"])


def make_environment() -> None:
    """Create .venv, installing Debian's venv package where root may and it is missing."""
    print("setup: creating .venv", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    if importlib.util.find_spec("ensurepip") is None:
        add_venv_package()
    importlib.invalidate_caches()
    if importlib.util.find_spec("ensurepip") and loud([sys.executable, "-m", "venv", VENV]):
        return
    uv = shutil.which("uv")
    if uv and loud([uv, "venv", "--quiet", "--python", sys.executable, VENV], uv_environment()):
        return
    package = f"python3.{sys.version_info.minor}-venv"
    fail(f"this python3 cannot make environments; run: sudo apt-get install {package}")


def add_venv_package() -> None:
    """Install python3.X-venv if this is Debian and we are root; else leave it to the caller."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    package = f"python3.{sys.version_info.minor}-venv"
    print(f"setup: installing {package}", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt: list[str | Path] = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
    quiet([*apt, "update"], environment)
    loud([*apt, "install", "-y", "--no-install-recommends", package], environment)


def install_with_uv() -> bool:
    """Install with uv, found or put into the environment; False if that does not work."""
    uv = shutil.which("uv") or str(VENV / "bin" / "uv")
    if not Path(uv).exists() and not quiet([*pip(), "uv"]):
        return False
    install: list[str | Path] = [uv, "pip", "install", "--quiet", "--python", PYTHON]
    return loud([*install, "--require-hashes", "-r", LOCK], uv_environment()) and loud(
        [*install, "--no-deps", "--no-build-isolation", "-e", ROOT], uv_environment()
    )


def install_with_pip() -> bool:
    """Install with pip, slower and everywhere."""
    print("setup: uv is not to be had here; using pip, which takes a minute or two", flush=True)
    return loud([*pip(), "--require-hashes", "-r", LOCK]) and loud(
        [*pip(), "--no-deps", "--no-build-isolation", "-e", ROOT]
    )


def pip() -> list[str | Path]:
    """Return the command of the environment's own pip."""
    return [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def uv_environment() -> dict[str, str]:
    """Return uv's environment: this interpreter, this machine's certificates."""
    return {**os.environ, "UV_PYTHON_DOWNLOADS": "never", "UV_SYSTEM_CERTS": "1"}


def quiet(command: list[str | Path], environment: dict[str, str] | None = None) -> bool:
    """Run a command whose failure is an answer."""
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    return done.returncode == 0


def loud(command: list[str | Path], environment: dict[str, str] | None = None) -> bool:
    """Run a command; when it fails, show the end of what it said."""
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        print("\n".join((done.stdout + done.stderr).splitlines()[-15:]), file=sys.stderr)
    return done.returncode == 0


def fail(reason: str) -> NoReturn:
    """Stop with one line that says what to type."""
    sys.exit(f"setup: {reason}")


if __name__ == "__main__":
    main()
