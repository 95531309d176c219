"""Secrets come from stdin, a file or a prompt, never from an argument; they leave here sealed."""

import sys
from pathlib import Path
from uuid import UUID

import click
from sqlalchemy import Connection

from cli.context import Cli, interactive
from connectors import registry
from crypto import credentials
from crypto import keyring as keyrings
from crypto.canary import make_canary
from crypto.keyring import Keyring
from schemas.accounts import Account
from schemas.errors import ConfigError
from schemas.redaction import REDACTOR
from schemas.sealed_secret import SealedSecret
from schemas.secret import Secret
from storage import keystore, resources
from storage.keystore import RootOffer


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
    return credentials.seal_with(
        credentials.new_key(keyring, account_id),
        resource_id=resource_id,
        field=field,
        version=version,
        secret=secret,
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
    revives: bool = True,
) -> None:
    """Seal one credential and store it as a version of its field; see resources.store_secret.

    It is bound to where the resource's settings lead now.
    """
    aim = registry.aim_digest(*resources.settings(tx, resource_id))
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
            tx, keys, account, resource_id, sealed, offer=offer(keyring), principal=cli.principal,
            aim=aim, revives=revives,
        )  # fmt: skip
