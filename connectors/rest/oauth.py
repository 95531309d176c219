"""A login that lives on a refresh token, or begins with what a person has authorised.

Secrets of the resource, which workers store anew: `access_token` with its end, `refresh_token`, and
`authorization`: the code that `resource authorize` has brought, until a worker has exchanged it.
"""

import json
import math
from collections.abc import Callable, Mapping
from time import time

from connectors.http_link import Bounds, Link, check_origin
from connectors.rest import text as rest_text
from connectors.rest.manifest import Manifest
from connectors.rest.parts import OAuth, Scalar
from connectors.rest.tokens import TOKEN, Token, TokenEndpoint, filled_endpoint
from schemas.aid import Aid
from schemas.consent import FIELD, REFUSED, Consent
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, CredentialsError, ReauthNeeded, TransientError
from schemas.redaction import REDACTOR

ACCESS, REFRESH, CODE = "access_token", "refresh_token", FIELD
#: What workers store; an operator may give the first two.
RENEWED = (ACCESS, REFRESH, CODE)
#: An exchange is short: others wait for it, and a run that is cancelled waits for it, too.
BOUNDS = Bounds(body_max=1 << 20, total_s=10, connect_s=5, read_s=8, redirects_max=2)
#: Instead of a code that was exchanged, and of one that was refused.
_USED, _REFUSED = "used", "refused"
#: What another run has stored may have ended as well.
_ROUNDS = 3


class Refreshed:
    """Asks for a token when there is none, when it ends or when it is refused."""

    def __init__(
        self,
        config: OAuth,
        secrets: Mapping[str, str],
        names: rest_text.Names,
        link: Link,
        *,
        aid: Aid,
        clock: Callable[[], float] = time,
    ) -> None:
        self._config = config
        self._secrets: Mapping[str, str] = dict(secrets)
        self._aid = aid
        self._clock = clock
        self._held = REDACTOR.holder()
        self._link = link.apart(BOUNDS)
        self._authorize = f"syncward resource authorize {aid.resource}"
        self._endpoint = TokenEndpoint(
            config, names, self._link, know=self._held.know, resource=aid.resource
        )
        self._token, self._until = self._kept()

    @property
    def problem(self) -> str | None:
        """What a person should know, though the login works."""
        if self._secrets.get(CODE) == _REFUSED:
            return REFUSED
        return None

    def headers(self) -> Mapping[str, str]:
        if not self._usable():
            self._renewed()
        return {"Authorization": f"Bearer {self._token}"}

    def renew(self) -> bool:
        """Get another token; the same one again is no better."""
        before = self._token
        self._renewed()
        return self._token != before

    def cut(self) -> None:
        """End an exchange that is under way; what it would have brought may be lost."""
        self._link.cut()

    def close(self) -> None:
        """Forget the tokens."""
        self._link.close()
        self._held.__exit__(None, None, None)

    def _usable(self) -> bool:
        return bool(self._token) and self._clock() < self._until and not self._pending()

    def _pending(self) -> bool:
        return self._secrets.get(CODE, _USED) not in {_USED, _REFUSED}

    def _kept(self) -> tuple[str, float]:
        """Return the stored access token and when it ends; one that an operator gave is bare."""
        first, blank, last = self._secrets.get(ACCESS, "").partition(" ")
        token, until = (last, first) if blank else (first, "")
        if not TOKEN.fullmatch(token):
            return "", 0.0
        return self._held.know(token), float(until) if until.isdecimal() else math.inf

    def _renewed(self) -> None:
        for _ in range(_ROUNDS):
            self._secrets = self._aid.secrets.renewed(self._secrets, self._exchange)
            self._token, self._until = self._kept()
            if self._usable():
                return
        raise TransientError(f"{self._endpoint.where}: its tokens end at once; tried again")

    def _exchange(self, stored: Mapping[str, str]) -> Mapping[str, str]:
        """Return what is new: the token, and the refresh token if it changes with each use."""
        client = stored.get("client_secret", "")
        if not client and self._config.client_login != "none":
            raise ConfigError(
                f"{self._endpoint.where}: the client_secret was never stored; give it to syncward "
                f"resource rotate {self._aid.resource}, by --secret-file or --secret-stdin",
                code="no_credentials",
            )
        code = stored.get(CODE, _USED)
        if code in {_USED, _REFUSED}:
            return self._refreshed(stored, client)
        try:
            found = self._endpoint.ask(_of_code(code, self._authorize), client)
        except ConfigError as refused:  # APIs have many words for it
            if stored.get(REFRESH) is None:
                if not isinstance(refused, ReauthNeeded):
                    raise
                raise ReauthNeeded(
                    f"{self._endpoint.where}: refuses what was authorised; authorise once more: "
                    f"{self._authorize}"
                ) from None
            return {**self._refreshed(stored, client), CODE: _REFUSED}
        return {**self._fields(found), CODE: _USED}

    def _refreshed(self, stored: Mapping[str, str], client: str) -> Mapping[str, str]:
        refresh = stored.get(REFRESH)
        if refresh is None:
            raise ReauthNeeded(
                f"{self._endpoint.where}: there is no login that could be renewed; authorise it: "
                f"{self._authorize}"
            )
        form = {"grant_type": "refresh_token", "refresh_token": refresh}
        return self._fields(self._endpoint.ask(form, client))

    def _fields(self, found: Token) -> dict[str, str]:
        fields = {ACCESS: f"{math.ceil(self._clock()) + found.life} {found.access}"}
        if found.refresh is not None:
            fields[REFRESH] = found.refresh
        return fields


def leading(manifest: Manifest, parameters: Mapping[str, Scalar]) -> Mapping[str, Scalar]:
    """Return the parameters that say where a login's secrets are sent, and where a person is."""
    texts, who = [manifest.url_base], manifest.authenticator
    if isinstance(who, OAuth):
        texts += [who.token_refresh_endpoint, who.authorization_endpoint or ""]
    names = {name for one in texts for _, name in rest_text.holes(one)}
    return {name: parameters[name] for name in names if name in parameters}


def consent(
    manifest: Manifest, parameters: Mapping[str, object], policy: LinkPolicy
) -> Consent | None:
    """Return what a person is asked; None where there is no login of this kind."""
    config, names = manifest.authenticator, {"config": parameters}
    if not isinstance(config, OAuth) or config.authorization_endpoint is None:
        return None
    endpoint = filled_endpoint("authorization_endpoint", config.authorization_endpoint, names)
    check_origin(endpoint, policy)
    own = {name: rest_text.filled(v, names) for name, v in config.authorization_parameters.items()}
    scope = {"scope": " ".join(config.scopes)} if config.scopes else {}
    return Consent(
        endpoint, {**own, "client_id": rest_text.filled(config.client_id, names), **scope}
    )


def _of_code(pending: str, authorize: str) -> dict[str, str]:
    """Return the form of what `resource authorize` has sealed."""
    try:
        kept = json.loads(pending)
        return {
            "grant_type": "authorization_code",
            "code": str(kept["code"]),
            "redirect_uri": str(kept["redirect_uri"]),
            "code_verifier": str(kept["verifier"]),
        }
    except (ValueError, KeyError, TypeError):
        raise CredentialsError(
            f"authorization: is nothing that could be exchanged; authorise again: {authorize}"
        ) from None
