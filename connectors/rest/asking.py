"""One request to an API: with its login, within its limits, once more where time may help."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from random import random
from threading import Event
from typing import Any

from connectors.egress import EgressRefused
from connectors.http_link import Answer, Bounds, Link, Origin, check_origin
from connectors.rest import answers, limits
from connectors.rest import text as rest_text
from connectors.rest.answers import Meaning
from connectors.rest.auth import Login, login_of
from connectors.rest.budget import budget_of, holder_of
from connectors.rest.limits import Pace
from connectors.rest.manifest import Manifest
from connectors.rest.pages import Ask
from connectors.rest.parts import ErrorHandler, Filter
from schemas.aid import UNAIDED, Aid
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, Deferral, SyncwardError, TransientError
from schemas.quotas import Quota, Unshared

#: Seconds before the second try; doubled each time.
FIRST_RETRY_S = 0.5
#: Links that end in the middle may be well a moment later; the others take longer.
_AT_ONCE = {"connection_lost"}
#: Of errors that somebody here asked for.
_CANCELLED = "cancelled_there"
#: More tries than of errors: a limit says when it is over.
_MORE_OF_LIMITS = 3


class PagesExpired(Exception):  # noqa: N818 - says what it is
    """The place in the pages is not known there any more. Whoever turns pages begins again."""


def base_of(manifest: Manifest, names: rest_text.Names, policy: LinkPolicy) -> str:
    """Return the URL below which all paths lie; ConfigError if it is none or too weak."""
    try:
        base = rest_text.filled_base(manifest.url_base, names).rstrip("/")
    except ValueError as error:
        raise ConfigError(f"{manifest.name}: url_base: {error}") from None
    try:
        check_origin(base, policy)
    except ConfigError as error:
        raise ConfigError(f"{manifest.name}: url_base: {error.public}", code=error.code) from None
    if "?" in base or "#" in base:
        raise ConfigError(f"{manifest.name}: url_base: has a query; use request_parameters")
    return base


@contextmanager
def named(request: str) -> Iterator[None]:
    """Say in errors which request they are of. What time mends by itself is none of a request."""
    try:
        yield
    except (Deferral, EgressRefused):
        raise
    except SyncwardError as error:
        if error.code != _CANCELLED:
            error.at(request)
        raise


class Asker:
    """Asks one API as one login. Used by one thread; `cancel` comes from others."""

    def __init__(
        self,
        manifest: Manifest,
        parameters: Mapping[str, object],
        secrets: Mapping[str, str],
        policy: LinkPolicy,
        *,
        trusted: str,
        aid: Aid = UNAIDED,
    ) -> None:
        self.names: dict[str, Mapping[str, object]] = {"config": parameters, "partition": {}}
        self.base = base_of(manifest, self.names, policy)
        self.origin: Origin = check_origin(self.base, policy)
        self.aid = aid
        self._manifest = manifest
        self._ended = Event()
        self._pace = Pace(manifest.name, aid.quotas or Unshared(), self._ended, aid.shown)
        bounds = Bounds(body_max=manifest.answer_max << 20)
        self._link = Link(policy, bounds=bounds, trusted=trusted, calls=aid.calls)
        self._login: Login = login_of(manifest, secrets, self.names, self._link, aid)
        where = f"{manifest.name} at {self.origin.shown}"
        declared = manifest.api_budget or manifest.rate_limit
        holder = holder_of(manifest.authenticator, secrets, self.names) if declared else ()
        self._budget = budget_of(where, declared, holder)
        self._link.reach(self.base)  # what is forbidden is said when the resource is opened
        #: the other system's clock at its last answer, and how that link was secured
        self.clock: datetime | None = None
        self.tls = "none"

    def ask(self, where: str, ask: Ask, handler: ErrorHandler) -> tuple[Answer, Any] | None:
        """Return an answer with its document; None if it means that there is nothing."""
        with named(self.shown(ask)):
            try:
                answer = self.answer(where, ask, handler)
            except PagesExpired:
                raise TransientError(
                    f"{where}: it forgot what it was asked about; read again",
                    code="api_unavailable",
                ) from None
            return None if answer is None else (answer, answers.document(where, answer))

    def shown(self, ask: Ask) -> str:
        """Name a request without a value: as the list of calls does."""
        return f"{ask.method} {self.origin.shown}{ask.route}"

    def answer(self, where: str, ask: Ask, handler: ErrorHandler) -> Answer | None:
        """Return an answer that is to be read, whatever it holds; None if there is nothing.

        PagesExpired where a manifest says that the pages begin again.
        A wait that is short and an error that time may mend are handled here, a few times.
        """
        tries, renewed, quota = 0, False, self._budget.quota_of(ask.method, ask.route)
        while True:
            answer = self._tried(ask, quota, last=tries >= handler.max_retries)
            if answer is None:
                tries += 1
                self._pace.wait(self._pause(tries))
                continue
            means, fitting = answers.meaning(answer, handler)
            if means is Meaning.LOGIN and not renewed and self._renewed():
                renewed = True
                continue
            if tries < _tries_of(means, handler):
                tries += 1
                self._later(answer, means, fitting, quota, tries)
                continue
            if means is Meaning.NOTHING:
                return None
            if means is Meaning.EXPIRED:
                raise PagesExpired
            failed = _failure(where, means, answer, fitting, self.aid.resource)
            if failed is not None:
                raise failed
            return answer

    def _later(
        self,
        answer: Answer,
        means: Meaning,
        fitting: Filter | None,
        quota: Quota | None,
        tries: int,
    ) -> None:
        """Wait as the answer says, or the manifest, or for a moment; a limit is everybody's."""
        limited = means is Meaning.LIMITED
        told = (limits.told if limited else limits.retry_after)(answer.headers)
        if told is None and fitting is not None and fitting.backoff_time is not None:
            told = fitting.backoff_time.total_seconds()
        if limited and told:  # 0 is no time to wait, whoever says it
            self._pace.limited(told, quota)
        else:
            self._pace.wait(max(self._pause(tries), told or 0.0))

    def _tried(self, ask: Ask, quota: Quota | None, *, last: bool) -> Answer | None:
        """Return the answer; None if the link ended in the middle and this was not the last try."""
        self._pace.before(quota)
        try:
            answer = self._call(ask)
        except Deferral:
            raise
        except TransientError as error:
            if error.code not in _AT_ONCE or last:
                raise
            return None
        self._pace.after(answer.headers, quota)
        return answer

    def _call(self, ask: Ask) -> Answer:
        with named(""):  # a login that fails is none of this request's
            login = self._login.headers()
        headers = {"Accept": "application/json", **ask.headers, **login}
        if ask.method == "POST":
            headers["Content-Type"] = "application/json"
        answer = self._link.call(
            ask.method, ask.whole_url, headers=headers, content=ask.content, route=ask.route
        )
        self.tls = answer.tls
        self.clock = limits.server_time(answer.headers)
        return answer

    def _renewed(self) -> bool:
        with named(""):
            return self._login.renew()

    def _pause(self, tries: int) -> float:
        return float(FIRST_RETRY_S * 2 ** (tries - 1) * (1 - random() / 4))  # noqa: S311 - jitter

    def rest(self, seconds: float) -> None:
        """Wait for what takes its time; ends where somebody asked for it."""
        self._ended.wait(seconds)
        self._pace.check()

    def kept(self) -> None:
        """Note that what was read before is loaded, and will not be read again."""
        self._pace.kept()

    def check(self) -> None:
        """End where somebody asked for it."""
        self._pace.check()

    def cancel(self) -> None:
        """End the call or the wait there is; for another thread."""
        self._ended.set()
        self._link.cut()

    def cut(self) -> None:
        """Do the same, and end a login that is being renewed: it had its time to end."""
        self.cancel()
        self._login.cut()

    @property
    def problem(self) -> str | None:
        """What a person should know of the login, though it works."""
        return self._login.problem

    def close(self) -> None:
        """Close connections and forget the token."""
        self._link.close()
        self._login.close()


def _tries_of(means: Meaning, handler: ErrorHandler) -> int:
    """Say how often an answer of this meaning is asked for again."""
    if means is Meaning.LIMITED:
        return handler.max_retries + _MORE_OF_LIMITS
    return handler.max_retries if means is Meaning.AGAIN else 0


def _failure(
    where: str, means: Meaning, answer: Answer, fitting: Filter | None, resource: str
) -> SyncwardError | None:
    """Return the error that an answer is in the end; None if it is to be read."""
    if means is not Meaning.LIMITED:
        return answers.refused(where, answer, fitting, resource)
    return TransientError(
        f"{where}: its rate limit is reached again and again; tried again later",
        code="api_unavailable",
    )
