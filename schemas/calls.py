"""One call over HTTP to another system, as a line of accounts: never what it asked or was told."""

from dataclasses import dataclass
from datetime import datetime

#: Classes of statuses as metrics and people count them; NO_ANSWER for a call that got none.
NO_ANSWER = "none"
STATUS_CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx", NO_ANSWER)
_FAILED_FROM = 400


@dataclass(frozen=True, slots=True)
class Call:
    """One request that was sent, or was to be sent. Retries and redirects are calls of their own.

    `route` is a path as its manifest writes it, with its placeholders: the values that were put
    there, and paths that another system named, are in no call.
    """

    at: datetime  # when it began
    method: str
    host: str  # with its port where that is not the usual one
    route: str  # "" where nobody wrote one
    status: int | None  # None: no answer came
    error: str | None  # the code of the error that ended it, whatever the status
    request_bytes: int  # of its body
    response_bytes: int  # of the answer's body as it came over the wire
    milliseconds: int

    @property
    def failed(self) -> bool:
        """Whether it brought nothing: no answer, an error status, or an answer that is refused."""
        return self.error is not None or self.status is None or self.status >= _FAILED_FROM


def status_class(status: int | None) -> str:
    """Return the class of a status, out of STATUS_CLASSES."""
    if status is None:
        return NO_ANSWER
    return f"{min(max(status // 100, 1), 5)}xx"
