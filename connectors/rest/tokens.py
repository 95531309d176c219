"""A token endpoint of OAuth 2: what is sent to it, and what of its answer is believed."""

import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from connectors.http_link import Answer, Link, origin_of
from connectors.rest import exact_json
from connectors.rest import text as rest_text
from connectors.rest.parts import OAuth
from schemas.errors import (
    ConfigError,
    CredentialsError,
    ReauthNeeded,
    SyncwardError,
    TransientError,
)

#: What a header may hold of a token; a refresh token goes into a body.
TOKEN = re.compile(r"[\x21-\x7e]{1,16384}")
_REFRESH = re.compile(r"[\x20-\x7e]{1,16384}")
#: Seconds before its end at which a token is not used any more; of one that does not say, its life.
_MARGIN_S, _UNSAID_S = 30, 300
_LONGEST_S = 24 * 3_600
_OK, _UNAVAILABLE = 200, 500
_TOO_MANY = 429
#: What OAuth 2 calls a login that is refused; the first is about what was granted to it.
_GRANT = "invalid_grant"
_REFUSED = {"invalid_client", _GRANT, "unauthorized_client", "access_denied"}


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """What an endpoint gives; `life` in seconds, already less a margin."""

    access: str
    life: int
    refresh: str | None


class TokenEndpoint:
    """One endpoint as one client. `know` is told each token at once: it is masked from then on."""

    def __init__(
        self,
        config: OAuth,
        names: rest_text.Names,
        link: Link,
        *,
        know: Callable[[str], str],
        resource: str,
    ) -> None:
        self._resource = resource
        self._config = config
        self._client = rest_text.filled(config.client_id, names)
        self._url = filled_endpoint("token_refresh_endpoint", config.token_refresh_endpoint, names)
        self._link = link
        self._know = know
        link.reach(self._url)

    @property
    def where(self) -> str:
        return f"token endpoint {origin_of(self._url).shown}"

    def ask(self, form: Mapping[str, str], secret: str) -> Token:
        """Return the token that it gives for this grant; its words are never quoted."""
        sent = dict(form)
        headers = {
            "Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json",
        }  # fmt: skip
        if self._config.client_login == "header":
            headers["Authorization"] = basic(quote(self._client, safe=""), quote(secret, safe=""))
        else:
            sent["client_id"] = self._client
            if self._config.client_login == "body":
                sent["client_secret"] = secret
        route = rest_text.route_of(self._config.token_refresh_endpoint)
        try:
            answer = self._link.call(
                "POST", self._url, headers=headers, content=urlencode(sent).encode(), route=route
            )
            return self._token(self._document(answer, by_grant=form["grant_type"]))
        except SyncwardError as error:
            path = route if route.startswith("/") else route.partition("}}")[2]
            error.at(f"POST {origin_of(self._url).shown}{path}")
            raise

    def _document(self, answer: Answer, *, by_grant: str) -> Mapping[str, Any]:
        """Return the answer's members; what is no token is an error that quotes nothing of it."""
        if answer.status >= _UNAVAILABLE or answer.status == _TOO_MANY:
            raise TransientError(
                f"{self.where}: answers with status {answer.status}; tried again",
                code="api_unavailable",
            )
        try:
            document = exact_json.parse(answer.body)
        except exact_json.NoJson:
            document = None
        refused = document.get("error") if isinstance(document, dict) else None
        if refused == _GRANT and by_grant != "client_credentials":
            raise ReauthNeeded(
                f"{self.where}: does not renew this login any more ({_GRANT}); authorise it again: "
                f"syncward resource authorize {self._resource}"
            )
        if answer.status in {401, 403} or (isinstance(refused, str) and refused in _REFUSED):
            raise CredentialsError(
                f"{self.where}: refuses this client; store its client_secret again (syncward "
                f"resource rotate {self._resource}), and look at client_id and scopes"
            )
        if answer.status != _OK or not isinstance(document, dict) or refused is not None:
            raise self._no_token(f"answers with status {answer.status} and no token")
        return document

    def _token(self, document: Mapping[str, Any]) -> Token:
        token, kind = document.get("access_token"), document.get("token_type", "bearer")
        refresh = document.get("refresh_token")
        if not isinstance(token, str) or not TOKEN.fullmatch(token):
            raise self._no_token("answers without an access_token that a header could hold")
        self._know(token)
        if not isinstance(kind, str) or kind.lower() != "bearer":
            raise self._no_token("gives a token that is no bearer token")
        if refresh is not None:
            if not isinstance(refresh, str) or not _REFRESH.fullmatch(refresh):
                raise self._no_token("gives a refresh_token that is none")
            self._know(refresh)
        return Token(token, _life(document.get("expires_in")), refresh)

    def _no_token(self, what: str) -> SyncwardError:
        return ConfigError(
            f"{self.where}: {what}; correct token_refresh_endpoint, or ask whoever runs it",
            code="api_answer",
        )


def filled_endpoint(name: str, text: str, names: rest_text.Names) -> str:
    """Return the URL of an endpoint; ConfigError if a parameter would lead elsewhere."""
    try:
        return rest_text.filled_base(text, names)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def basic(user: str, password: str) -> str:
    """Return the value of an Authorization header."""
    value = b64encode(f"{user}:{password}".encode()).decode()
    return f"Basic {value}"


def _life(said: object) -> int:
    """Return for how many seconds a token is used; what cannot be is taken for not said."""
    if isinstance(said, str) and said.isdecimal():
        said = int(said[:9])
    if isinstance(said, bool) or not isinstance(said, int) or said <= 0:
        return _UNSAID_S
    return max(min(said, _LONGEST_S) - _MARGIN_S, 1)
