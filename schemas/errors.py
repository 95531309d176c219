"""Every error a person may meet, classified by who can act on it.

SyncwardError
├── ConfigError          a person must act; the run fails now
│   └── CredentialsError the other system refused the login; the connection is paused
│       └── ReauthNeeded it does not renew it any more; all connections of the login are paused
├── TransientError       time will fix it; the run is queued again
│   ├── AuditUnavailable the audit log cannot take the event; nothing was done
│   └── Deferral         it said when to come back; no attempt is counted
├── GuardTripped         a person must approve what would happen to the data
├── NotFound             the thing named does not exist
├── Conflict             the thing named exists already, or is in the wrong state
├── ReadAgain            a window is not enough; the stream is read from the beginning, now
├── LeaseLost            this worker no longer owns the run; it stops without a word
├── RunCancelled         somebody asked for the run to stop
├── Draining             the worker is going away; the run is handed back
└── StartRefused         the process must not start; all reasons at once

Anything else is our bug: its traceback goes to the run's log, people read "Internal error".
`public` is always written by us: never a driver's text, which may quote a DSN or a row.
"""

from collections.abc import Sequence
from datetime import timedelta


class SyncwardError(Exception):
    """Base of all errors whose text may be shown to people."""

    #: stable name of the failure, stored with the run and used as a metric label
    code = "error"

    def __init__(self, public: str, *, code: str | None = None) -> None:
        super().__init__(public)
        self.public = public
        #: what it was about, where that was said later than the reason
        self.place: str | None = None
        if code is not None:
            self.code = code

    def at(self, place: str) -> None:
        """Say in its text what it was about; the first to say it knows best. "": the text does."""
        if self.place is None:
            self.place = place
            self.public = f"{self.public} ({place})" if place else self.public
            self.args = (self.public,)


class ConfigError(SyncwardError):
    """A person must change something: fail now, do not retry."""

    code = "config"


class CredentialsError(ConfigError):
    """The other system refused the credentials: retrying could lock the login."""

    code = "credentials"


class ReauthNeeded(CredentialsError):  # noqa: N818 - an event more than an error
    """The other system does not renew this login any more: a person must authorise it again."""

    code = "needs_reauth"


class TransientError(SyncwardError):
    """Time will fix it: the run goes back to the queue."""

    code = "transient"

    def __init__(
        self, public: str, *, code: str | None = None, retry_after: timedelta | None = None
    ) -> None:
        super().__init__(public, code=code)
        self.retry_after = retry_after


class AuditUnavailable(TransientError):  # noqa: N818 - reads best where it is raised
    """The audit log cannot be written, so what it would record does not happen."""

    code = "audit_unavailable"


class Deferral(TransientError):  # noqa: N818 - an event more than an error
    """It said when to come back (a rate limit): waiting is no attempt, but bounded."""

    code = "deferred"

    def __init__(self, public: str, *, retry_after: timedelta, code: str | None = None) -> None:
        super().__init__(public, code=code, retry_after=retry_after)


class GuardTripped(SyncwardError):  # noqa: N818 - DESIGN section 3 names it
    """A guard stopped the run before it changed data; it awaits approval."""

    code = "guard"


class NotFound(SyncwardError):  # noqa: N818 - reads best where it is raised
    """The thing named does not exist."""

    code = "not_found"


class Conflict(SyncwardError):  # noqa: N818 - reads best where it is raised
    """The thing named exists already or is not in a state that allows this."""

    code = "conflict"


class ReadAgain(SyncwardError):  # noqa: N818 - an event more than an error
    """What a window holds is not enough for the target: read everything, in the same run.

    `same`: nothing was kept of it and it was the right one, so it is read once more instead.
    """

    code = "read_again"

    def __init__(self, public: str, *, same: bool = False) -> None:
        super().__init__(public)
        self.same = same


class LeaseLost(SyncwardError):  # noqa: N818 - an event more than an error
    """Somebody else owns the run now: stop, write nothing."""

    code = "lease_lost"


class RunCancelled(SyncwardError):  # noqa: N818 - an event more than an error
    """The run was asked to stop."""

    code = "cancelled"


class Draining(SyncwardError):  # noqa: N818 - an event more than an error
    """The worker is shutting down: hand the run back without counting an attempt."""

    code = "draining"


class StartRefused(SyncwardError):  # noqa: N818 - an event more than an error
    """The process refuses to start; `reasons` lists everything that is wrong, at once."""

    code = "start_refused"

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("refuses to start:\n" + "\n".join(f"  - {r}" for r in reasons))
        self.reasons = tuple(reasons)
