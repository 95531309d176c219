"""What the operator allows of other people's connectors: policy as plain data.

`Settings.link_policy()` makes one, connectors/child/process.py enforces it;
docs/child-connectors.md explains it.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ChildPolicy:
    """What is left out is strict: nothing is started."""

    #: where `connector install` puts them; None: nowhere
    directory: Path | None = None
    #: those whose resource lists no hosts may reach the network past the egress guard
    unguarded: bool = False
    #: so may all of them where the kernel cannot guard them
    unguarded_there: bool = False
    #: who may run what must not be able to change it
    writable_refused: bool = True
    memory: int = 2**30  # bytes, of a connector with all its processes
    cpu: timedelta = timedelta(hours=1)  # of each process
    silence: timedelta = timedelta(minutes=10)
    traffic: int = 16 * 2**30  # bytes that one may receive and send over its connections
    confined: bool = True  # by Landlock, where the kernel has it
    readable: tuple[Path, ...] = ()  # besides the system and its own environment
    user: str | None = None  # another login of this host; needs a worker that may switch to it
