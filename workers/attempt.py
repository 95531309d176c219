"""One claimed attempt at a run, and what a worker process has for all of them."""

from dataclasses import dataclass

from sqlalchemy import Engine

from crypto.keyring import Keyring
from schemas.audit import Principal
from schemas.egress import LinkPolicy
from schemas.errors import SyncwardError
from schemas.runs import Claim
from schemas.settings import Settings
from storage.keystore import Keystore
from storage.work import Work
from workers.call_list import CallWriter
from workers.control import RunControl
from workers.heartbeat import Heartbeat
from workers.quotas import SharedQuotas
from workers.records import RecordSealer
from workers.refusals import JobRefusals
from workers.run_log import LogWriter, RunLog


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What a worker process builds once, in main.py."""

    engine: Engine
    keyring: Keyring
    keystore: Keystore
    heartbeat: Heartbeat
    logs: LogWriter
    records: RecordSealer
    calls: CallWriter
    quotas: SharedQuotas
    settings: Settings
    policy: LinkPolicy
    refusals: JobRefusals
    worker_id: str
    principal: Principal


#: What a run works on, or why it cannot be taken: then that is how the attempt ends.
Taken = Work | SyncwardError


@dataclass(frozen=True, slots=True)
class Attempt:
    """One claimed attempt at a run, and what it works with."""

    claim: Claim
    control: RunControl
    run_log: RunLog
    deps: Dependencies
    taken: Taken

    @property
    def reads_from(self) -> str | None:
        """The kind of its source; None while its subject is not known."""
        return self.taken.source.kind if isinstance(self.taken, Work) else None
