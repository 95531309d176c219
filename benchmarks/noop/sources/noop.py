"""A connector that moves nothing, so that only run control is measured."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict

from schemas.egress import LinkPolicy
from schemas.records import (
    Batch,
    Between,
    Cursor,
    DiscoveredStream,
    Ranges,
    ServerReport,
    StreamShape,
    WireFormat,
)
from schemas.streams import StreamSpec


class NoopConfig(BaseModel):
    """Nothing to set."""

    model_config = ConfigDict(hide_input_in_errors=True)


CONFIG = NoopConfig
SECRET_FIELDS = ("token",)


def check_link(config: NoopConfig, policy: LinkPolicy) -> None:
    """Accept it: it has no link."""
    del config, policy


def open_source(
    config: Mapping[str, Any], secrets: Mapping[str, str], policy: LinkPolicy
) -> "NoopSource":
    """Connect to nothing."""
    del policy
    CONFIG.model_validate(dict(config))
    assert secrets["token"]
    return NoopSource()


class NoopSource:
    """Meets schemas.records.Source with one empty batch."""

    wires = (WireFormat.PG_BINARY,)

    def test(self) -> ServerReport:
        return ServerReport(server_version="none", tls="none", login="none", missing=())

    def discover(self) -> Sequence[DiscoveredStream]:
        return ()

    @contextmanager
    def extract(
        self,
        stream: StreamSpec,
        cursor: Cursor | None,
        wire: WireFormat,
        *,
        sweep: bool = False,
        ranges: Ranges | None = None,
        between: Between | None = None,
    ) -> Iterator[Iterator[Batch]]:
        del stream, wire, sweep, ranges, between
        batch = Batch(
            shape=StreamShape(columns=(), key=(), key_is_unique=False),
            wire=WireFormat.PG_BINARY,
            chunks=iter(()),
            rows=lambda: 0,
            lower=cursor,
            upper=cursor,
            full=cursor is None,
            notes=(),
        )
        yield iter((batch,))

    def cancel(self) -> None:
        return

    def cut(self) -> None:
        return

    def close(self) -> None:
        return
