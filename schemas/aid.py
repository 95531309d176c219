"""What a connector may ask the process that runs it, without knowing what that process is.

A source module that wants it says `AIDED = True` and takes an `Aid` as the fourth argument of its
`open_source` (docs/writing-connectors.md). Each member is a protocol with a default for use outside
of a worker (`connector try`, tests), which does nothing or refuses, and says so. A worker's own are
put together in workers/aid.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from schemas.calls import Call
from schemas.errors import ConfigError
from schemas.quotas import Quotas, Shown, unseen

#: Gets the newest secrets that are stored, and returns those that are new now, by field.
Exchange = Callable[[Mapping[str, str]], Mapping[str, str]]


class Renewal(Protocol):
    """Secrets that do not last: tokens that end, logins that change whenever they are used."""

    def renewed(self, seen: Mapping[str, str], exchange: Exchange) -> Mapping[str, str]:
        """Return secrets that are newer than the ones `seen`: all fields, as they are stored now.

        Of all who ask for the same resource at the same time, in any process, one calls its
        `exchange`; the others get what that one brought. What `exchange` returns is stored before
        anybody uses it. An error of `exchange` is raised as it is, and then nothing is stored.
        `exchange` must end by itself in a bounded time: others wait for it.
        """
        ...


class KeptNowhere:
    """There is no store, so what an exchange brought would be lost, and with it the login."""

    def renewed(self, seen: Mapping[str, str], exchange: Exchange) -> Mapping[str, str]:
        """Refuse, before anything is exchanged."""
        del seen, exchange
        raise ConfigError(
            "this login has to be renewed, and only a worker can store what is new; use a "
            "resource: syncward resource test NAME"
        )


def _unheard(text: str) -> None:
    """Outside of a worker nobody keeps what others say."""


def _unseen(address: str, rule: str) -> None:
    """Nor does anybody look for what they were refused."""


class Calls(Protocol):
    """The list of a run's calls over HTTP. Any thread may add to it."""

    def note(self, call: Call) -> None:
        """Keep what is known of one call: at once, without an error, whatever becomes of it."""
        ...


class NotedNowhere:
    """There is no run that the calls could belong to."""

    def note(self, call: Call) -> None:
        """Forget it."""
        del call


@dataclass(frozen=True, slots=True)
class Aid:
    """All that a connector may ask for. The defaults are for use outside of a worker."""

    secrets: Renewal = field(default_factory=KeptNowhere)
    #: keeps a line that another's program has said in the run's sealed log, masked; from any thread
    say: Callable[[str], None] = _unheard
    calls: Calls = field(default_factory=NotedNowhere)
    #: tells the operator alone which address another's program was refused, and by which rule
    refused: Callable[[str, str], None] = _unseen
    #: turns for calls, shared with all workers; None: a connector counts by itself
    quotas: Quotas | None = None
    #: shows to operators, while a block lasts, that the run waits in place and for what
    shown: Shown = unseen
    #: the name of the resource, for texts that say what to type
    resource: str = "NAME"


#: What there is outside of a worker.
UNAIDED = Aid()
