"""What can go wrong with an embedded server."""

from schemas.errors import SyncwardError


class EmbeddedError(SyncwardError):
    """An embedded server that does not start: the thing, the reason, the next step."""

    code = "embedded"
