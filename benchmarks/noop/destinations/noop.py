"""The other end of nothing."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from connectors.results import acted
from schemas.egress import LinkPolicy
from schemas.records import (
    Batch,
    LoadRequest,
    Purge,
    ServerReport,
    StreamClaim,
    StreamResult,
    StreamShape,
    TargetView,
    WireFormat,
)


class NoopConfig(BaseModel):
    """Nothing to set."""

    model_config = ConfigDict(hide_input_in_errors=True)


CONFIG = NoopConfig
SECRET_FIELDS = ("token",)


def check_link(config: NoopConfig, policy: LinkPolicy) -> None:
    """Accept it: it has no link."""
    del config, policy


def open_destination(
    config: Mapping[str, Any], secrets: Mapping[str, str], policy: LinkPolicy
) -> "NoopDestination":
    """Connect to nothing."""
    del policy
    CONFIG.model_validate(dict(config))
    assert secrets["token"]
    return NoopDestination()


class NoopDestination:
    """Meets schemas.records.Destination and accepts the empty batch."""

    wires = (WireFormat.PG_BINARY,)

    def test(self) -> ServerReport:
        return ServerReport(server_version="none", tls="none", login="none", missing=())

    def claim_stream(self, request: LoadRequest) -> StreamClaim:
        del request
        return StreamClaim(None, None)

    def highest_fence(self, connection_id: UUID) -> int:
        del connection_id
        return 0

    def load(self, request: LoadRequest, batch: Batch) -> StreamResult:
        for _ in batch.chunks:
            pass
        return StreamResult(
            stream=request.stream.name,
            state="succeeded",
            mode=request.stream.mode,
            attempt=request.attempt,
        )

    def compare(self, request: LoadRequest, shape: StreamShape) -> TargetView:
        del request, shape
        return TargetView(None)

    def reset(self, request: LoadRequest) -> StreamResult:
        return acted(request)

    def purge(self, request: LoadRequest, how: Purge) -> StreamResult:
        del how
        return acted(request)

    def cancel(self) -> None:
        return

    def cut(self) -> None:
        return

    def close(self) -> None:
        return
