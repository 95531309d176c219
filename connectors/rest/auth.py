"""How a call says who it is. Start at `login_of`.

A login is asked for its headers before each call, and whether it can do better after a 401. One
that lives on a refresh token is in oauth.py.
"""

import re
from collections.abc import Mapping
from time import monotonic
from typing import Protocol

from connectors.http_link import Link
from connectors.rest import text as rest_text
from connectors.rest.manifest import Manifest
from connectors.rest.oauth import Refreshed
from connectors.rest.parts import ApiKey, Basic, Bearer, OAuth
from connectors.rest.tokens import TokenEndpoint, basic
from schemas.aid import Aid
from schemas.errors import ConfigError, CredentialsError
from schemas.redaction import REDACTOR

_VISIBLE = re.compile(r"[\x20-\x7e]{1,16384}")


class Login(Protocol):
    """What a call carries."""

    def headers(self) -> Mapping[str, str]: ...
    def renew(self) -> bool:
        """Make new headers after a refusal; False if they would be the same."""
        ...

    @property
    def problem(self) -> str | None:
        """What a person should know, though the login works."""
        ...

    def cut(self) -> None:
        """End a call of its own, if one is under way; for another thread."""
        ...

    def close(self) -> None: ...


def login_of(
    manifest: Manifest, secrets: Mapping[str, str], names: rest_text.Names, link: Link, aid: Aid
) -> Login:
    """Return the login that a manifest names; ConfigError if a secret is missing or no secret."""
    if isinstance(manifest.authenticator, OAuth) and manifest.authenticator.renews:
        return Refreshed(manifest.authenticator, secrets, names, link, aid=aid)
    given = {field: _secret(manifest, secrets, field, aid) for field in manifest.secrets}
    match manifest.authenticator:
        case Bearer() as one:
            return _Fixed({"Authorization": f"{one.scheme} {given['token']}"})
        case Basic() as one:
            user = rest_text.filled(one.username, names)
            return _Fixed({"Authorization": basic(user, given["password"])})
        case ApiKey() as one:
            return _Fixed({one.header: given["api_key"]})
        case OAuth() as one:
            return _ClientCredentials(one, given["client_secret"], names, link, aid.resource)
        case _:
            return _Fixed({})


def _secret(manifest: Manifest, secrets: Mapping[str, str], field: str, aid: Aid) -> str:
    value = secrets.get(field)
    if value is None:
        raise ConfigError(
            f"{manifest.name}: its {field} was never stored; give it to syncward resource rotate "
            f"{aid.resource}, by --secret-file or --secret-stdin",
            code="no_credentials",
        )
    if not _VISIBLE.fullmatch(value):
        raise CredentialsError(
            f"{manifest.name}: its {field} holds what no header may; store it again with: "
            f"syncward resource rotate {aid.resource}"
        )
    return value


class _Fixed:
    """Headers that never change."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers

    def headers(self) -> Mapping[str, str]:
        return self._headers

    def renew(self) -> bool:
        return False

    @property
    def problem(self) -> str | None:
        return None

    def cut(self) -> None: ...

    def close(self) -> None: ...


class _ClientCredentials:
    """A token from a token endpoint, asked for again before it ends or when it is refused."""

    def __init__(
        self, config: OAuth, secret: str, names: rest_text.Names, link: Link, resource: str
    ) -> None:
        self._form: dict[str, str] = {"grant_type": config.grant_type}
        if config.scopes:
            self._form["scope"] = " ".join(config.scopes)
        self._secret = secret
        self._token = ""
        self._until = 0.0
        self._held = REDACTOR.holder()
        self._endpoint = TokenEndpoint(config, names, link, know=self._held.know, resource=resource)

    def headers(self) -> Mapping[str, str]:
        if not self._token or monotonic() >= self._until:
            self._ask()
        return {"Authorization": f"Bearer {self._token}"}

    def renew(self) -> bool:
        """Ask for another token; the same one again is no better."""
        before = self._token
        self._ask()
        return self._token != before

    def _ask(self) -> None:
        found = self._endpoint.ask(self._form, self._secret)
        self._token, self._until = found.access, monotonic() + found.life

    @property
    def problem(self) -> str | None:
        return None

    def cut(self) -> None: ...

    def close(self) -> None:
        """Forget the token."""
        self._held.__exit__(None, None, None)
