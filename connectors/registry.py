"""Connectors by name: a file in sources/ or destinations/ is a connector of that name."""

import importlib
import json
import pkgutil
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from typing import Any

from pydantic import ValidationError

from connectors import destinations as destination_files
from connectors import sources as source_files
from schemas.aid import UNAIDED, Aid
from schemas.consent import Consent
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError
from schemas.mistakes import first_causes, in_words, keys_beside, meant
from schemas.records import Destination, Source
from schemas.secret import looks_secret


def sources() -> frozenset[str]:
    """Return the names of all connectors that can be read from, without importing them."""
    return _files(tuple(source_files.__path__))


def destinations() -> frozenset[str]:
    """Return the names of all connectors that can be written to."""
    return _files(tuple(destination_files.__path__))


@cache
def _files(folders: tuple[str, ...]) -> frozenset[str]:
    """List the modules of folders, once in a process: each run asks several times."""
    return frozenset(m.name for m in pkgutil.iter_modules(folders))


def open_source(
    kind: str,
    config: Mapping[str, Any],
    secrets: Mapping[str, str],
    policy: LinkPolicy,
    aid: Aid = UNAIDED,
) -> Source:
    """Connect to a resource as a source, where the policy allows; the caller closes it.

    A module that says `AIDED` gets what it may ask the process for that runs it.
    """
    module = _module("sources", kind, sources())
    aided = (aid,) if getattr(module, "AIDED", False) else ()
    opened: Source = module.open_source(config, secrets, policy, *aided)
    return opened


def open_destination(
    kind: str, config: Mapping[str, Any], secrets: Mapping[str, str], policy: LinkPolicy
) -> Destination:
    """Connect to a resource as a destination, where the policy allows; the caller closes it."""
    module = _module("destinations", kind, destinations())
    opened: Destination = module.open_destination(config, secrets, policy)
    return opened


def validate_config(kind: str, config: Mapping[str, Any], policy: LinkPolicy) -> dict[str, Any]:
    """Return the clear settings with defaults filled in; ConfigError names each wrong field.

    A link that is too weak for the policy is refused, too. Where it leads is for workers to look
    at, who go there.
    """
    module = _any(kind)
    for name in config:
        if name in module.SECRET_FIELDS or looks_secret(name):
            raise ConfigError(
                f"{kind} config: {name} is a secret; put it into the resource's `secret` field"
            )
    try:
        checked = module.CONFIG.model_validate(dict(config))
    except ValidationError as error:
        wrong = first_causes(error.errors(include_input=False, include_url=False))
        reasons = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {in_words(e, keys_beside(module.CONFIG, e['loc']))}"
            for e in wrong
        )
        raise ConfigError(f"{kind} config: {reasons}; see docs/connectors.md") from None
    module.check_link(checked, policy)
    clear: dict[str, Any] = checked.model_dump(mode="json")
    return clear


def secret_fields(kind: str) -> tuple[str, ...]:
    """Return the names of the secrets that a connector may want."""
    fields: tuple[str, ...] = _any(kind).SECRET_FIELDS
    return fields


def wanted_secrets(kind: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the secrets that a resource with these settings wants; all, if that is not known."""
    module = _any(kind)
    wanted = getattr(module, "wanted_secrets", None)
    return secret_fields(kind) if wanted is None else tuple(wanted(config))


def aim(kind: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return where a resource's secrets are sent: whoever changes that must know the secrets."""
    module = _any(kind)
    own = getattr(module, "aim", None)
    if own is not None:
        return tuple(own(config))
    names = getattr(module, "AIMED_BY", sorted(config) if module.SECRET_FIELDS else ())
    return tuple(json.dumps([name, config.get(name)], sort_keys=True) for name in names)


def aim_digest(kind: str, config: Mapping[str, Any]) -> bytes:
    """Return what is stored beside a secret, and must be the same when a worker sends it."""
    return sha256(json.dumps([kind, *aim(kind, config)]).encode()).digest()


def renewed_fields(kind: str) -> frozenset[str]:
    """Return the secrets that workers store anew: nobody could give them again."""
    return frozenset(getattr(_any(kind), "RENEWED_FIELDS", ()))


def consent(kind: str, config: Mapping[str, Any], policy: LinkPolicy) -> Consent:
    """Return what a person is asked before a resource's login works; ConfigError if nothing is."""
    asks = getattr(_any(kind), "consent", None)
    found: Consent | None = None if asks is None else asks(config, policy)
    if found is None:
        raise ConfigError(
            f"a resource of kind {kind} with these settings has nothing to authorise; store its "
            "secrets with: syncward resource rotate NAME"
        )
    return found


def without_secrets() -> frozenset[str]:
    """Return the connectors that may do without a secret: then nothing is unsealed for them."""
    return frozenset(
        kind
        for kind in sources() | destinations()
        if not secret_fields(kind) or getattr(_any(kind), "SECRETS_OPTIONAL", False)
    )


def _any(kind: str) -> Any:  # noqa: ANN401 - modules have no better type
    if kind in sources():
        return _module("sources", kind, sources())
    if kind in destinations():
        return _module("destinations", kind, destinations())
    everything = sorted(sources() | destinations())
    there = f"there are {', '.join(everything)}"
    near = meant(kind, everything, else_="")
    raise ConfigError(f"kind {kind}: no such connector; {f'{near} ' if near else ''}{there}")


def _module(role: str, kind: str, known: frozenset[str]) -> Any:  # noqa: ANN401 - as above
    if kind not in known:
        raise ConfigError(f"kind {kind}: no such connector; there are {', '.join(sorted(known))}")
    return importlib.import_module(f"connectors.{role}.{kind}")
