"""How a call says who it is. Start at `login_of`.

A login is asked for its headers before each call, and whether it can do better after a 401. An
authorization code with refresh will be one more class with its own storage behind `renew`.
"""

import re
from base64 import b64encode
from collections.abc import Mapping
from time import monotonic
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from connectors import rest_json, rest_text
from connectors.http_link import Answer, Link, origin_of
from connectors.rest_manifest import Manifest
from connectors.rest_parts import ApiKey, Basic, Bearer, OAuth
from schemas.errors import ConfigError, CredentialsError, SyncwardError, TransientError
from schemas.redaction import REDACTOR

#: What a header may hold of a token.
_TOKEN = re.compile(r"[\x21-\x7e]{1,16384}")
_VISIBLE = re.compile(r"[\x20-\x7e]{1,16384}")
#: Seconds before its end at which a token is not used any more; of one that does not say, its life.
_MARGIN_S, _UNSAID_S = 30, 300
_LONGEST_S = 24 * 3_600
_OK, _UNAVAILABLE = 200, 500
_TOO_MANY = 429
#: What OAuth 2 calls a login that is refused.
_REFUSED = {"invalid_client", "invalid_grant", "unauthorized_client", "access_denied"}


class Login(Protocol):
    """What a call carries."""

    def headers(self) -> Mapping[str, str]: ...
    def renew(self) -> bool:
        """Make new headers after a refusal; False if they would be the same."""
        ...

    def close(self) -> None: ...


def login_of(
    manifest: Manifest, secrets: Mapping[str, str], names: rest_text.Names, link: Link
) -> Login:
    """Return the login that a manifest names; ConfigError if a secret is missing or no secret."""
    given = {field: _secret(manifest, secrets, field) for field in manifest.secrets}
    match manifest.authenticator:
        case Bearer() as one:
            return _Fixed({"Authorization": f"{one.scheme} {given['token']}"})
        case Basic() as one:
            user = rest_text.filled(one.username, names)
            return _Fixed({"Authorization": _basic(user, given["password"])})
        case ApiKey() as one:
            return _Fixed({one.header: given["api_key"]})
        case OAuth() as one:
            return _ClientCredentials(one, given["client_secret"], names, link)
        case _:
            return _Fixed({})


def _secret(manifest: Manifest, secrets: Mapping[str, str], field: str) -> str:
    value = secrets.get(field)
    if value is None:
        raise ConfigError(
            f"{manifest.name}: its {field} was never stored; give it to syncward resource rotate, "
            "by --secret-file or --secret-stdin",
            code="no_credentials",
        )
    if not _VISIBLE.fullmatch(value):
        raise CredentialsError(
            f"{manifest.name}: its {field} holds what no header may; store it again"
        )
    return value


def _basic(user: str, password: str) -> str:
    value = b64encode(f"{user}:{password}".encode()).decode()
    return f"Basic {value}"


class _Fixed:
    """Headers that never change."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers

    def headers(self) -> Mapping[str, str]:
        return self._headers

    def renew(self) -> bool:
        return False

    def close(self) -> None: ...


class _ClientCredentials:
    """A token from a token endpoint, asked for again before it ends or when it is refused."""

    def __init__(self, config: OAuth, secret: str, names: rest_text.Names, link: Link) -> None:
        self._config = config
        self._client = rest_text.filled(config.client_id, names)
        self._endpoint = rest_text.filled_base(config.token_refresh_endpoint, names)
        self._secret = secret
        self._link = link
        self._token = ""
        self._until = 0.0
        self._held = REDACTOR.holder()
        link.reach(self._endpoint)

    @property
    def _where(self) -> str:
        return f"token endpoint {origin_of(self._endpoint).shown}"

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
        form: dict[str, str] = {"grant_type": self._config.grant_type}
        headers = {
            "Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json",
        }  # fmt: skip
        if self._config.scopes:
            form["scope"] = " ".join(self._config.scopes)
        if self._config.client_login == "body":
            form |= {"client_id": self._client, "client_secret": self._secret}
        else:
            headers["Authorization"] = _basic(
                quote(self._client, safe=""), quote(self._secret, safe="")
            )
        answer = self._link.call(
            "POST", self._endpoint, headers=headers, content=urlencode(form).encode()
        )
        self._take(self._document(answer))

    def _document(self, answer: Answer) -> Mapping[str, Any]:
        """Return the answer's members; what is no token is an error that quotes nothing of it."""
        if answer.status >= _UNAVAILABLE or answer.status == _TOO_MANY:
            raise TransientError(
                f"{self._where}: answers with status {answer.status}; tried again",
                code="api_unavailable",
            )
        try:
            document = rest_json.parse(answer.body)
        except rest_json.NoJson:
            document = None
        refused = document.get("error") if isinstance(document, dict) else None
        if answer.status in {401, 403} or refused in _REFUSED:
            raise CredentialsError(
                f"{self._where}: refuses this client; store its client_secret again, and look at "
                "client_id and scopes"
            )
        if answer.status != _OK or not isinstance(document, dict) or refused is not None:
            raise self._no_token(f"answers with status {answer.status} and no token")
        return document

    def _take(self, document: Mapping[str, Any]) -> None:
        token, kind = document.get("access_token"), document.get("token_type", "bearer")
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise self._no_token("answers without an access_token that a header could hold")
        if not isinstance(kind, str) or kind.lower() != "bearer":
            raise self._no_token("gives a token that is no bearer token")
        self._token = self._held.know(token)
        self._until = monotonic() + _life(document.get("expires_in"))

    def _no_token(self, what: str) -> SyncwardError:
        return ConfigError(
            f"{self._where}: {what}; correct token_refresh_endpoint, or ask whoever runs it",
            code="api_answer",
        )

    def close(self) -> None:
        """Forget the token."""
        self._held.__exit__(None, None, None)


def _life(said: object) -> float:
    """Return for how many seconds a token is used; what cannot be is taken for not said."""
    if isinstance(said, str) and said.isdecimal():
        said = int(said[:9])
    if isinstance(said, bool) or not isinstance(said, int) or said <= 0:
        return _UNSAID_S
    return max(min(said, _LONGEST_S) - _MARGIN_S, 1)
