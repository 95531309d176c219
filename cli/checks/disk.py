"""What this host would give away or run out of, as `syncward doctor disk` sees it.

Encryption is read from the kernel: a device-mapper device says of itself that it is a crypt one.
"""

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from cli.checks.base import Area, Check, said
from cli.context import Cli
from schemas.errors import ConfigError, SyncwardError
from schemas.profiles import leads_out
from storage import health

_FREE_MIN = 1 << 30  # bytes
_GIB = 1 << 30
_SYS = Path("/sys/dev/block")


@dataclass(frozen=True, slots=True)
class Disks:
    """Paths of ours on this host, and how they are kept."""

    production: bool
    free: dict[str, int]  # path -> bytes
    plain: tuple[str, ...]  # paths on a device that is not encrypted
    unknown: tuple[str, ...]  # paths whose device cannot be told
    database_here: bool  # its data directory is among the paths
    attested: str | None
    swaps: tuple[str, ...]  # swap that is not encrypted
    cores: str | None


def _disks(cli: Cli) -> Disks:
    places = [cli.settings.data_dir, *_keyring(cli.settings.keyring)]
    database = _database(cli)
    paths = sorted({_existing(p) for p in (*places, *database)})
    try:
        free = {str(path): shutil.disk_usage(path).free for path in paths}
        kept = {path: encrypted(path.stat().st_dev) for path in paths}
        swaps = _swaps(Path("/proc/swaps").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"this host's disks cannot be asked: {error.strerror}") from None
    return Disks(
        production=cli.settings.profile == "production",
        free=free,
        plain=tuple(str(path) for path, sealed in kept.items() if sealed is False),
        unknown=tuple(str(path) for path, sealed in kept.items() if sealed is None),
        database_here=bool(database),
        attested=cli.settings.disk_encryption_attested,
        swaps=swaps,
        cores=_cores(),
    )


def _keyring(uri: str | None) -> list[Path]:
    scheme, separator, rest = (uri or "").partition("://")
    if not uri or (separator and scheme != "file"):
        return []
    return [Path(rest if separator else uri).parent]


def _database(cli: Cli) -> list[Path]:
    """Return the control database's directory if it is on this host and may be known."""
    url = cli.settings.database_url
    if url is None or leads_out(url.get_secret_value()):
        return []
    try:
        with cli.transaction() as tx:
            found = health.data_directory(tx)
    except SyncwardError:  # `db.reachable` says it
        return []
    return [Path(found)] if found and Path(found).exists() else []


def _existing(path: Path) -> Path:
    """Return the path or what is above it: a directory that is not made yet lies there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def encrypted(device: int, sys: Path = _SYS) -> bool | None:
    """Say whether a block device lies on an encrypted one; None if the kernel names no device."""
    here = sys / f"{os.major(device)}:{os.minor(device)}"
    return _crypt(here) if here.exists() else None


def _crypt(device: Path) -> bool:
    """Say whether a device is a crypt one, or all that it is made of are."""
    uuid = device / "dm" / "uuid"
    if uuid.exists() and uuid.read_text(encoding="utf-8").startswith("CRYPT-"):
        return True
    parts = list((device / "slaves").iterdir()) if (device / "slaves").exists() else []
    return bool(parts) and all(_crypt(part) for part in parts)


def _swaps(table: str) -> tuple[str, ...]:
    """Name swap that survives a power cut in the clear: not zram, not on a crypt device."""
    names = [line.split()[0] for line in table.splitlines()[1:]]
    return tuple(name for name in names if not _swap_sealed(Path(name)))


def _swap_sealed(path: Path) -> bool:
    if path.name.startswith("zram"):
        return True
    try:
        about = path.stat()
    except OSError:
        return False
    return encrypted(about.st_rdev or about.st_dev) is True


def _cores() -> str | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    pattern = Path("/proc/sys/kernel/core_pattern")
    piped = pattern.exists() and pattern.read_text(encoding="utf-8").startswith("|")
    if soft == 0 and not piped:
        return None
    if piped:
        return "the kernel pipes core files to a program, whatever the limit says"
    return "the limit of core files is not 0"


def _space(disks: Disks) -> str | None:
    low = {path: free for path, free in disks.free.items() if free < _FREE_MIN}
    return said([f"{path}: {free / _GIB:.2f} GiB free" for path, free in low.items()])


def _encryption(disks: Disks) -> str | None:
    if not disks.production or disks.attested:
        return None
    plain = [f"{path} is not on an encrypted device" for path in disks.plain]
    unknown = [f"the device of {path} cannot be told" for path in disks.unknown]
    elsewhere = (
        [] if disks.database_here else ["the control database's disks cannot be seen from here"]
    )
    found = said([*plain, *unknown, *elsewhere])
    return f"{found}; nobody attests it either" if found else None


def _proof(disks: Disks) -> str | None:
    """Say which of the two it is: seen by us, or said by somebody."""
    if disks.attested:
        return f"attested, not seen by doctor: {disks.attested}"
    if disks.plain or disks.unknown or not disks.database_here:
        return None
    return "seen: every path is on an encrypted device"


def _swap(disks: Disks) -> str | None:
    if not disks.production or not disks.swaps:
        return None
    return f"swap is not encrypted: {', '.join(disks.swaps)}"


DISK = Area(
    "disk",
    _disks,
    Check(
        "readable",
        "what cannot be asked cannot be relied on",
        "run doctor as the user of the CLI, on its host",
        lambda _: None,
    ),
    (
        Check(
            "space",
            "a full disk stops logs and, where the database is, everything",
            "free space, or move the directory",
            _space,
        ),
        Check(
            "encryption",
            "counts, names, times and sealed data are read from a stolen disk",
            "use LUKS or encrypted volumes; where doctor cannot see them: "
            "SYNCWARD_DISK_ENCRYPTION_ATTESTED='who, date'",
            _encryption,
            note=_proof,
        ),
        Check(
            "swap",
            "plaintext of a running process may be written there and stay",
            "swapoff -a, or put swap on a crypt device",
            _swap,
        ),
        Check(
            "core_files",
            "a core file holds what the process held, keys and plaintext",
            "ulimit -c 0, and sysctl kernel.core_pattern=core",
            lambda disks: disks.cores if disks.production else None,
        ),
    ),
)
