"""Whether links are protected, as `syncward doctor tls` sees it: every one of ours is tried."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime

from cli.checks.base import Area, Check, across, said
from cli.context import Cli
from crypto.kms import transit
from schemas.errors import ConfigError, SyncwardError
from schemas.health import LinkHealth
from schemas.profiles import leads_out, link_faults
from storage import health
from storage.handshake import try_link, try_server
from workers.enqueue import JobQueue, open_client

_EXPIRES_SOON_DAYS = 30
#: Names of resources that a finding shows; the count says how many there are.
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Links:
    """Every link that the settings name, and the resources whose links are weak."""

    tried: tuple[LinkHealth, ...]
    faults: tuple[str, ...]
    weak: tuple[str, ...]
    weak_allowed: bool = False  # development: resources on this host may do without


def _links(cli: Cli) -> Links:
    urls = {
        name: secret.get_secret_value()
        for name in ("database_url", "keystore_url", "redis_url")
        if (secret := getattr(cli.settings, name, None)) is not None
    }
    if "database_url" not in urls:
        raise ConfigError("SYNCWARD_DATABASE_URL is not set, so no link can be tried")
    development = cli.settings.profile == "development"
    strict = {n: url for n, url in urls.items() if not development or leads_out(url)}
    tried = (*(_try(cli, name, url) for name, url in strict.items()), *_kms(cli))
    faults = (
        f"SYNCWARD_{name.upper()}: {why}"
        for name, url in strict.items()
        for why in link_faults(name, url)
    )
    return Links(tried, tuple(faults), _weak(cli), development)


def _try(cli: Cli, name: str, url: str) -> LinkHealth:
    if name == "redis_url":
        return _redis(url)
    found = try_link("control database" if name == "database_url" else "keystore", url)
    if found.version is None or name != "database_url":
        return found
    try:
        with cli.transaction() as tx:
            return replace(found, seen_plain=health.session_is_plain(tx))
    except SyncwardError:  # `db.reachable` says it
        return found


def _redis(url: str) -> LinkHealth:
    if not url.lower().startswith("rediss"):
        return LinkHealth("Redis")  # as it says; to try it would show the login
    try:
        queue = JobQueue(open_client(url))
    except ConfigError as error:
        return LinkHealth("Redis", error.public)
    try:
        return queue.link()
    finally:
        queue.close()


def _kms(cli: Cli) -> list[LinkHealth]:
    """Try the KMS, if the keyring is in one; without TLS it may only be on this host."""
    if not (cli.settings.keyring or "").startswith("vault"):
        return []
    try:
        address = transit.parse(cli.settings.keyring or "")
    except ConfigError as error:
        return [LinkHealth("KMS", error.public)]
    if address.plain:
        return [] if cli.settings.profile == "development" else [LinkHealth("KMS")]
    host, _, port = address.host.rpartition(":")
    return [try_server("KMS", host.strip("[]"), int(port), address.ca_file)]


def _weak(cli: Cli) -> tuple[str, ...]:
    try:
        with across(cli, "tls") as tx:
            return health.weak_resources(tx)
    except SyncwardError:  # as above
        return ()


def _tried(links: Links) -> str | None:
    return said([f"{link.name}: {link.problem}" for link in links.tried if link.problem])


def _encrypted(links: Links) -> str | None:
    good = [link for link in links.tried if link.problem is None]
    plain = [f"{link.name}: in the clear" for link in good if link.version is None]
    ended = [f"{link.name}: something between ends TLS" for link in good if link.seen_plain]
    return said([*plain, *ended])


def _versions(links: Links) -> str | None:
    return said([f"{link.name} {link.version}" for link in links.tried if link.version])


def _verified(links: Links) -> str | None:
    return said(list(links.faults))


def _expiry(links: Links) -> str | None:
    now = datetime.now(UTC)
    days = {link.name: (link.expires_at - now).days for link in links.tried if link.expires_at}
    return said([f"{name}: in {n} days" for name, n in days.items() if n < _EXPIRES_SOON_DAYS])


def _resources(links: Links) -> str | None:
    if not links.weak or links.weak_allowed:
        return None
    names = ", ".join(links.weak[:_SHOWN])
    more = f" and {len(links.weak) - _SHOWN} more" if len(links.weak) > _SHOWN else ""
    return f"{len(links.weak)} resources have an sslmode below verify-full: {names}{more}"


TLS = Area(
    "tls",
    _links,
    Check(
        "configured",
        "what is not named cannot be tried",
        "set SYNCWARD_DATABASE_URL; see docs/settings.md",
        lambda _: None,
    ),
    (
        Check(
            "links",
            "a link that cannot be tried may be anything",
            "mend the server or its certificate: openssl s_client -starttls postgres shows it, too",
            _tried,
        ),
        Check(
            "encrypted",
            "whoever listens between reads jobs, metadata and sealed data, and may change them",
            "turn TLS on at the server; let nothing between end it (docs/profiles.md)",
            _encrypted,
            note=_versions,
        ),
        Check(
            "settings",
            "without the check of certificate and name anybody may answer in the server's place",
            "write the URLs as docs/profiles.md says",
            _verified,
        ),
        Check(
            "certificates",
            "when one expires nothing starts and nothing ends any more",
            "renew it at the server; docs/profiles.md shows how with an authority of your own",
            _expiry,
        ),
        Check(
            "resources",
            "their servers may be anybody, and would be given the credentials",
            "set sslmode: verify-full in the resource's config and apply it",
            _resources,
        ),
    ),
)
