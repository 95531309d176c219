"""What a check and an area are; every area of `syncward doctor` is a module beside this one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection

from cli.context import Cli
from schemas.audit import AuditAction, AuditEvent, TargetKind
from storage import audit, tenancy

F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class Check(Generic[F]):
    """One thing that may be wrong: how it is found, why it matters, what to do about it."""

    name: str
    why: str
    do: str
    wrong: Callable[[F], str | None]  # what is wrong, in a sentence; None: nothing
    note: Callable[[F], str | None] | None = None  # what to know though nothing is wrong


@dataclass(frozen=True, slots=True)
class Area(Generic[F]):
    """`gather` may raise one of our errors: then the area cannot be reached, and that is wrong."""

    name: str
    gather: Callable[[Cli], F]
    unreachable: Check[Any]
    checks: tuple[Check[F], ...]


@contextmanager
def across(cli: Cli, area: str) -> Iterator[Connection]:
    """One transaction that sees the resources of all accounts, and says so in the audit stream."""
    with cli.transaction() as tx:
        tenancy.across(tx)
        audit.append(
            tx,
            AuditEvent(
                AuditAction.INSTANCE_READ,
                TargetKind.INSTANCE,
                audit.INSTANCE_ID,
                cli.principal,
                reason=f"doctor {area}",
            ),
        )
        yield tx


_SLOW_S = 0.05


def slow(seconds: float) -> str | None:
    """Say that a round trip is slow."""
    return f"a round trip takes {seconds * 1000:.0f} ms" if seconds > _SLOW_S else None


def said(lines: list[str]) -> str | None:
    """Join what is wrong; None if nothing is."""
    return "; ".join(lines) or None
