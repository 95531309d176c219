"""`pause --now`: cancel what runs and wait until it has ended."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

from cli.context import Cli
from cli.main import EXIT_FAILED
from schemas.accounts import Account
from schemas.errors import Conflict
from storage import runs

_POLL_S = 0.3
#: A cancel reaches a run within 10 s; a lost worker's run ends with its lease.
_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Stopped:
    """What became of the runs that were there; nothing unless `--now` was said."""

    cancelled: int | None = None
    left: int = 0

    @property
    def document(self) -> dict[str, int]:
        return {} if self.cancelled is None else {"cancelled": self.cancelled, "left": self.left}

    @property
    def text(self) -> str:
        if self.cancelled is None:
            return ""
        left = f"; {self.left} still run, see: syncward run list" if self.left else ""
        return f"; {self.cancelled} runs cancelled{left}"

    def exit(self) -> None:
        """Exit 1 if something still runs."""
        if self.left:
            sys.exit(EXIT_FAILED)


def stop_now(cli: Cli, account: Account, subject_id: UUID | None = None) -> Stopped:
    """Cancel the busy runs of a paused account or connection; runs that wait are kept waiting."""
    asked = _busy(cli, account, subject_id)
    for run_id in asked:
        # one transaction each: others end meanwhile, and each has its own event
        with suppress(Conflict), cli.inside(f"{account.name}/") as (tx, _, _name):
            runs.cancel(tx, run_id, cli.principal)
    deadline = time.monotonic() + _WAIT_S
    left = set(asked) & set(_busy(cli, account, subject_id))
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        left &= set(_busy(cli, account, subject_id))
    return Stopped(len(asked) - len(left), len(left))


def _busy(cli: Cli, account: Account, subject_id: UUID | None) -> Sequence[UUID]:
    with cli.inside(f"{account.name}/") as (tx, _, _name):
        return runs.busy(tx, account_id=account.account_id, subject_id=subject_id)
