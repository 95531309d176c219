"""The file of a certificate authority that a resource names: looked at before it is opened.

Whoever may write a resource chooses this path, and libpq opens what it names without a limit of
time: a pipe would hold a worker's slot for good, and errors would tell what files a worker has. So
every path that is not a readable file with a certificate gets one and the same answer.
"""

import binascii
import os
import re
import ssl
import stat
from base64 import b64decode
from typing import Annotated

from pydantic import AfterValidator

from schemas.errors import ConfigError

#: Not a file: the authorities that the system trusts.
SYSTEM = "system"
#: Bytes of the largest file; the bundle of a system has a quarter of it.
LARGEST = 1 << 20

#: There is no authority here, and opening a file may already do something.
_NOT_FILES = ("/proc", "/dev", "/sys")
_CERTIFICATE = re.compile(
    rb"-----BEGIN (?P<kind>(?:TRUSTED |X509 )?CERTIFICATE)-----(?P<body>[^-]+)"
    rb"-----END (?P=kind)-----"
)


class NoAuthority(ValueError):  # noqa: N818 - says what it is
    """The path leads to no file of an authority; why is nobody's business."""


def written_well(path: str) -> bool:
    """Say whether a path could be an authority's file, without looking at any."""
    return path == SYSTEM or (
        path.startswith("/") and "\x00" not in path and not _special(os.path.normpath(path))
    )


def named_well(path: str) -> str:
    """Return what names an authority, as it was written; ValueError says how to write it."""
    if not written_well(path):
        raise ValueError(
            "write the absolute path of the authority's file on the workers, or system"
        )
    return path


#: A setting of resources that pydantic checks.
AuthorityFile = Annotated[str, AfterValidator(named_well)]


def context(named: str, where: str) -> ssl.SSLContext:
    """Return TLS that proves who answers, by this authority; ConfigError if there is none here."""
    try:
        file = checked(named)
        made = ssl.create_default_context(cafile=None if file == SYSTEM else file)
    except (NoAuthority, OSError):
        raise refused(where) from None
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    return made


def refused(where: str) -> ConfigError:
    """Say the same for every file that is not to be opened."""
    return ConfigError(
        f"{where}: sslrootcert is no file with a certificate that this worker can use; put the "
        "authority's file (PEM, at most 1 MiB) on every worker and name its absolute path, or "
        "system",
        code="tls_refused",
    )


def checked(path: str) -> str:
    """Return the path for libpq, without symbolic links; NoAuthority if it is not to open it."""
    if path == SYSTEM:
        return path
    real, found = _found(path)
    if not _has_certificate(found):
        raise NoAuthority
    return real


def content(path: str) -> bytes:
    """Return what a regular file of at most 1 MiB holds, which a resource names; NoAuthority."""
    return _found(path)[1]


def _found(path: str) -> tuple[str, bytes]:
    """Return the path without symbolic links, and what the file holds."""
    if path == SYSTEM or not written_well(path):
        raise NoAuthority
    try:
        real = os.path.realpath(path, strict=True)
        if _special(real):
            raise NoAuthority
        return real, _read(real)
    except (OSError, ValueError):
        raise NoAuthority from None


def _special(path: str) -> bool:
    one = "/" + path.lstrip("/")  # two slashes at the beginning are kept by normpath
    return any(one == place or one.startswith(f"{place}/") for place in _NOT_FILES)


def _read(path: str) -> bytes:
    """Read a regular file; a pipe is opened without waiting for its other end, and not read."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
            raise NoAuthority
        return file.read(LARGEST) or b""


def _has_certificate(content: bytes) -> bool:
    found = _CERTIFICATE.search(content)
    if found is None:
        return False
    try:
        return bool(b64decode(b"".join(found["body"].split()), validate=True))
    except binascii.Error:
        return False
