"""Whether keys are what they should be, as `syncward doctor crypto` sees it from this host."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cli.checks.base import Area, Check, across, said
from cli.context import Cli
from cli.credentials import open_keyring
from crypto.roots import RootStatus
from crypto.selftest import selftest
from schemas.errors import SyncwardError
from schemas.health import SecretsHealth
from storage import health

_ROOT_OLD_DAYS = 365
#: Names of resources that a finding shows.
_SHOWN = 5
_UNKNOWN = "not looked at: the control database cannot be asked (syncward doctor db)"


@dataclass(frozen=True, slots=True)
class Keys:
    """The keyring of this host and what the databases know; `stored` None: they were not asked."""

    production: bool
    roots: tuple[RootStatus, ...]
    broken: str | None = None  # what the self-test says
    opens_credentials: bool = False
    beside: str | None = None  # a worker's keyring in the same directory
    apart: bool = True  # the keystore has a database of its own
    stored: SecretsHealth | None = None


def _keys(cli: Cli) -> Keys:
    keyring = open_keyring(cli)
    try:
        selftest(keyring)
        broken = None
    except SyncwardError as error:
        broken = error.public
    file = _file(cli.settings.keyring or "")
    worker_file = file.parent / "worker.json" if file else None
    return Keys(
        production=cli.settings.profile == "production",
        roots=tuple(keyring.status()),
        broken=broken,
        opens_credentials=keyring.can_unwrap("credentials"),
        beside=str(worker_file) if worker_file and worker_file.exists() else None,
        apart=_apart(cli),
        stored=_stored(cli),
    )


def _file(uri: str) -> Path | None:
    scheme, separator, rest = uri.partition("://")
    if separator and scheme != "file":
        return None
    return Path(rest if separator else uri).absolute()


def _apart(cli: Cli) -> bool:
    own, control = cli.settings.keystore_url, cli.settings.database_url
    return own is not None and (
        control is None
        or own.get_secret_value().split("?")[0] != control.get_secret_value().split("?")[0]
    )


def _stored(cli: Cli) -> SecretsHealth | None:
    try:
        with across(cli, "crypto") as tx, cli.keystore.beside(tx) as keys:
            return health.secrets(tx, keys)
    except SyncwardError:
        return None


def _split(keys: Keys) -> str | None:
    if not keys.production:
        return None
    if keys.opens_credentials:
        return "the keyring of this host opens stored credentials"
    return f"{keys.beside} opens stored credentials, and lies here" if keys.beside else None


def _age(keys: Keys) -> str | None:
    now = datetime.now(UTC)
    ages = {r.purpose: (now - r.created_at).days for r in keys.roots if r.state == "active"}
    return said([f"{p}: {d} days" for p, d in sorted(ages.items()) if d > _ROOT_OLD_DAYS])


def _in_use(keys: Keys) -> str | None:
    if keys.stored is None:
        return _UNKNOWN
    here = {root.purpose: root.root_id for root in keys.roots if root.state == "active"}
    there = keys.stored.active_roots
    return said(
        [
            f"{purpose}: root {here.get(purpose, 'none')} here, {root_id} in use"
            for purpose, root_id in sorted(there.items())
            if here.get(purpose) != root_id
        ]
    )


def _rotation(keys: Keys) -> str | None:
    if keys.stored is None:
        return _UNKNOWN
    waiting = {"to wrap again": keys.stored.rewrap, "to replace": keys.stored.replace}
    return said([f"{count} data keys are still {what}" for what, count in waiting.items() if count])


def _keystore(keys: Keys) -> str | None:
    if keys.apart or not keys.production:
        return None
    return "wrapped keys lie in the control database, and in every backup of it"


def _short(keys: Keys) -> str | None:
    if keys.stored is None:
        return _UNKNOWN
    short = keys.stored.short
    more = f" and {len(short) - _SHOWN} more" if len(short) > _SHOWN else ""
    return f"{len(short)} resources: {', '.join(short[:_SHOWN])}{more}" if short else None


def _unlike(keys: Keys) -> str | None:
    if keys.stored is None:
        return _UNKNOWN
    unlike = keys.stored.unlike
    more = f" and {len(unlike) - _SHOWN} more" if len(unlike) > _SHOWN else ""
    return f"{', '.join(unlike[:_SHOWN])}{more}" if unlike else None


CRYPTO = Area(
    "crypto",
    _keys,
    Check(
        "keyring",
        "without it no secret can be stored from here, and no sealed log read",
        "give this host its operator.json (mode 0600, its user's), and SYNCWARD_KEYRING its path",
        lambda _: None,
    ),
    (
        Check(
            "self_test",
            "what does not hold here does not hold for stored secrets either",
            "reinstall Syncward with make setup; if it stays, replace the machine",
            lambda keys: keys.broken,
        ),
        Check(
            "split",
            "whoever takes over this host then reads every stored credential",
            "move worker.json to the workers' hosts, delete it here, use operator.json",
            _split,
        ),
        Check(
            "root_age",
            "the longer a root is in use, the more there is to lose with it",
            "syncward keys rotate",
            _age,
        ),
        Check(
            "root_in_use",
            "what is sealed here could not be stored, or not be opened by the workers",
            "give this host the keyring that the workers' belongs to: syncward keys status",
            _in_use,
        ),
        Check(
            "rotation",
            "a root or data key that was replaced still opens something",
            "workers do it by themselves: start some; syncward keys status shows how far they are",
            _rotation,
        ),
        Check(
            "keystore",
            "a deleted account can be opened until the last backup of the control database is gone",
            "set SYNCWARD_KEYSTORE_URL to a database with short-lived backups of its own",
            _keystore,
        ),
        Check(
            "stored_secrets",
            "somebody put an older or another row in place of the one that was stored last",
            "find out who may write to the control database; syncward resource rotate NAME",
            _unlike,
        ),
        Check(
            "short_secrets",
            "secrets of less than 8 characters are not looked for in logs, errors and outputs",
            "choose longer ones there, then: syncward resource rotate NAME",
            _short,
        ),
    ),
)
