"""Secrets come from stdin, a file or a prompt, never from an argument; they leave here sealed."""

import sys
from pathlib import Path
from uuid import UUID

import click
from sqlalchemy import Connection

from cli.context import Cli, interactive
from crypto import keyring as keyrings
from crypto.canary import make_canary
from crypto.envelope import Context
from crypto.fingerprint import fingerprint
from crypto.keyring import Keyring, WrapContext
from crypto.seal import new_dek, seal
from schemas.accounts import Account
from schemas.errors import ConfigError
from schemas.redaction import REDACTOR
from schemas.secret import SHORTEST_KNOWN, Secret
from storage import keystore, resources
from storage.keystore import RootOffer
from storage.resources import SealedSecret


def open_keyring(cli: Cli) -> Keyring:
    """Open the operator's keyring: it can seal credentials and cannot open one."""
    if cli.settings.keyring is None:
        raise ConfigError(
            "SYNCWARD_KEYRING is not set; make one with: syncward keys init DIRECTORY"
        )
    return keyrings.load(cli.settings.keyring)


def read(field: str, source: str, *, base: Path) -> Secret:
    """Read a secret from `stdin`, `prompt` or a file path relative to `base`."""
    if source == "stdin":
        value = sys.stdin.readline()
    elif source == "prompt":
        if not interactive():
            raise ConfigError(
                f"{field}: no terminal to ask at; give a file or pipe it with stdin instead"
            )
        value = click.prompt(field, hide_input=True, err=True)
    else:
        value = _read_file(field, base / source)
    value = value.removesuffix("\n").removesuffix("\r")
    if not value:
        raise ConfigError(f"{field}: the secret from {source} is empty")
    return Secret(REDACTOR.know(value))  # for as long as this command lives


def _read_file(field: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{field}: no secret file at {path}; create it with mode 0600") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{field}: secret file {path} cannot be read as text") from None


def seal_credential(
    keyring: Keyring,
    *,
    account_id: UUID,
    resource_id: UUID,
    field: str,
    version: int,
    secret: Secret,
) -> SealedSecret:
    """Seal one credential under a data key of its own, wrapped for workers only."""
    dek_id, dek = new_dek()
    context = Context(
        account_id=account_id,
        kind="resource",
        resource_id=resource_id,
        field=field,
        version=version,
    )
    plaintext = secret.reveal().encode()
    wrapped = keyring.wrap(
        "credentials", dek, WrapContext(account_id=account_id, purpose="credentials", dek_id=dek_id)
    )
    return SealedSecret(
        field=field,
        version=version,
        envelope=seal(dek, dek_id, plaintext, context),
        fingerprint=fingerprint(plaintext),
        dek_id=dek_id,
        root_id=wrapped.root_id,
        wrapped=wrapped.blob,
        short=len(secret.reveal()) < SHORTEST_KNOWN,
    )


def offer(keyring: Keyring) -> RootOffer:
    """Describe the root that seals credentials here, for a keystore that knows none yet."""
    return RootOffer(
        keyring.active_root("credentials"),
        "credentials",
        keyring.scheme,
        lambda: make_canary(keyring, "credentials"),
    )


def store(
    cli: Cli,
    tx: Connection,
    account: Account,
    keyring: Keyring,
    *,
    resource_id: UUID,
    field: str,
    version: int,
    secret: Secret,
) -> None:
    """Seal one credential and store it as a version of its field."""
    with cli.keystore.beside(tx) as keys:
        keystore.follow(keys, keyring.prefer)
        sealed = seal_credential(
            keyring,
            account_id=account.account_id,
            resource_id=resource_id,
            field=field,
            version=version,
            secret=secret,
        )
        resources.store_secret(
            tx, keys, account, resource_id, sealed, offer=offer(keyring), principal=cli.principal
        )
