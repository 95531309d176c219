"""What a check and an area are; every area of `syncward doctor` is a module beside this one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cli.context import Cli

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


_SLOW_S = 0.05


def slow(seconds: float) -> str | None:
    """Say that a round trip is slow."""
    return f"a round trip takes {seconds * 1000:.0f} ms" if seconds > _SLOW_S else None


def said(lines: list[str]) -> str | None:
    """Join what is wrong; None if nothing is."""
    return "; ".join(lines) or None
