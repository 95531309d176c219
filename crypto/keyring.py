"""The keyring of a host: `load(uri)` opens it, whatever kind it is. docs/keys.md is the manual.

What a keyring does stands in crypto/roots.py, how each kind does it in crypto/kms/.
"""

from crypto.errors import KeyringError
from crypto.kms import file
from crypto.kms.file import init
from crypto.roots import PURPOSES, Keyring, Purpose, RootStatus, WrapContext, Wrapped

__all__ = [
    "PURPOSES", "Keyring", "Purpose", "RootStatus", "WrapContext", "Wrapped", "init", "load",
]  # fmt: skip


def load(uri: str) -> Keyring:
    """Open a keyring by `file:///path`, path or `vault://…`; KeyringError says what is wrong."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return file.load(uri)
    if scheme == "file":
        return file.load(rest)
    if scheme in {"vault", "vault+http"}:
        from crypto.kms import vault  # noqa: PLC0415 - HTTP is loaded only where it is used

        return vault.load(uri)
    raise KeyringError(
        f"keyring {scheme}://…: there is no such kind; use file:///path/to/worker.json or "
        "vault://host:8200/mount/name?token=FILE (docs/keys.md; it says what another KMS needs)"
    )
