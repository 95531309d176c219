"""Sealers to be killed, writers that commit out of order, and what a log must say at the end.

`python -m tests.faults.sealing` is a sealer that goes on while its test lives, whatever is killed;
SEAL_URL, SEAL_KEY and SEAL_NAME say what it seals. Now and then it lets another one go on.
"""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, NoReturn, Self
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import Connection, Engine

from audit import memory
from audit.checkpoint import Checkpoint
from audit.sealer import Sealer
from audit.tree import Edge
from crypto import signing
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import TransientError
from storage import audit, sealing
from storage.engine import open_engine, transaction
from storage.sealing import Sealed

if TYPE_CHECKING:
    from tests.world import Control

WRITER = Principal("operator", "soak")


def event(target: UUID) -> AuditEvent:
    """Return an event that says nothing but its target."""
    return AuditEvent(
        AuditAction.KEYS_FORGOTTEN, TargetKind.INSTANCE, target, WRITER, detail={"keys": 0}
    )


def sealer(engine: Engine, key: Path, name: str = "sealer-1", loss: str | None = None) -> Sealer:
    """Return a sealer with the key of this file, which is made if it is missing."""
    if not key.exists():
        signing.init(key)
    return Sealer(engine, signing.load(key), key, Principal("sealer", name), name, loss)


def seal_all(one: Sealer) -> int:
    """Seal until twice nothing is left (an epoch may begin in between); return the size."""
    idle = 0
    while idle < 3:
        idle = 0 if one.step() is not None else idle + 1
    one.close()
    with transaction(one.engine) as tx:
        return sealing.state(tx).size


# ── who writes ───────────────────────────────────────────────────────────────────────────────────


class RolledBack(Exception):  # noqa: N818 - not an error
    """A writer changed its mind."""


@dataclass(slots=True)
class Writers:
    """Threads that write events; knows which of them were committed."""

    engine: Engine
    stop: Event = field(default_factory=Event)
    committed: set[UUID] = field(default_factory=set)
    rolled_back: int = 0
    failed: list[BaseException] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)
    _threads: list[Thread] = field(default_factory=list)

    def start(self, count: int, *others: Callable[[], set[UUID]]) -> None:
        acts = [*([self._some] * count), *others]
        self._threads = [
            Thread(target=self._repeat, args=(act, seed), daemon=True)
            for seed, act in enumerate(acts)
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in self._threads), "a writer hangs"

    def _repeat(self, act: Callable[[], set[UUID]], seed: int) -> None:
        chance = random.Random(seed)
        try:
            while not self.stop.is_set():
                try:
                    made = act()
                except RolledBack:
                    self.rolled_back += 1
                    continue
                with self._lock:
                    self.committed |= made
                time.sleep(chance.random() * 0.02)
        except BaseException as error:  # noqa: BLE001 - the test raises it
            self.failed.append(error)

    def _some(self) -> set[UUID]:
        """One to three events, perhaps within a savepoint that is undone; one in ten rolls back."""
        made = {uuid4() for _ in range(random.randint(1, 3))}
        with transaction(self.engine) as tx:
            for target in made:
                audit.append(tx, event(target))
                if random.random() < 0.3:
                    time.sleep(random.random() * 0.01)
            made |= self._within_savepoint(tx)
            if random.random() < 0.1:
                raise RolledBack
        return made

    @staticmethod
    def _within_savepoint(tx: Connection) -> set[UUID]:
        target = uuid4()
        kept = random.random() < 0.5
        savepoint = tx.begin_nested()
        audit.append(tx, event(target))
        if not kept:
            savepoint.rollback()
            return set()
        savepoint.commit()
        return {target}

    def long_one(self) -> set[UUID]:
        """A transaction that writes first and last, and stays open for seconds between."""
        first, last = uuid4(), uuid4()
        with transaction(self.engine) as tx:
            audit.append(tx, event(first))
            self.stop.wait(random.uniform(1, 2.5))
            audit.append(tx, event(last))
        self.stop.wait(0.5)
        return {first, last}


def prepared_one(control: "Control", stop: Event) -> set[UUID]:
    """An event of a transaction in two phases; between them nobody's session holds it."""
    target, name = uuid4(), f"soak-{uuid4()}"
    with psycopg.connect(control.admin_url, autocommit=True) as db:
        db.execute("BEGIN")
        db.execute(
            "INSERT INTO audit.event (class, action, target_kind, target_id, body) "
            "VALUES ('A', 'instance.read', 'instance', %s, '{}')",
            (target,),
        )
        db.execute(f"PREPARE TRANSACTION '{name}'".encode())
        stop.wait(random.uniform(0.3, 1.2))
        db.execute(f"COMMIT PREPARED '{name}'".encode())
    stop.wait(0.5)
    return {target}


# ── what happens to sealers ──────────────────────────────────────────────────────────────────────


class SealerProcess:
    """A sealer as a process; when it is killed another one is there in no time."""

    def __init__(self, control: "Control", key: Path, name: str) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.sealing"],
            env={"SEAL_URL": control.url, "SEAL_KEY": str(key), "SEAL_NAME": name},
            stdout=subprocess.PIPE,
            text=True,
        )
        self._sealer = self._next()
        self.kills = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.kill()  # the sealer sees that it is gone
        self._parent.wait()
        assert self._parent.stdout is not None
        self._parent.stdout.close()
        with suppress(ProcessLookupError):
            os.kill(self._sealer, signal.SIGKILL)

    def _next(self) -> int:
        assert self._parent.stdout is not None
        line = self._parent.stdout.readline()
        assert line, f"a sealer ended by itself with {self._parent.wait()}"
        return int(line)

    def kill(self) -> None:
        """End it wherever it is."""
        os.kill(self._sealer, signal.SIGKILL)
        self.kills += 1
        self._sealer = self._next()


def terminate_sealers(control: "Control") -> int:
    """End the sessions of every sealer; return how many there were."""
    return len(control.all(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'syncward-control:sealer'"
    ))  # fmt: skip


# ── what the log must say ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Findings:
    """What is wrong with a log: nothing, if all is well."""

    missed: frozenset[int]
    doubled: frozenset[int]
    unknown: frozenset[int]
    out_of_order: int
    size: int
    checkpoints: int
    epoch: int

    @property
    def clean(self) -> bool:
        return not (self.missed or self.doubled or self.unknown)


def examine(control: "Control", key: Path) -> Findings:
    """Compare sealed with committed, and every checkpoint with the final tree; AssertionError."""
    leaves = {seq: bytes(leaf) for seq, leaf in control.all("SELECT seq, leaf FROM audit.event")}
    public = signing.load(key).public
    with transaction(control.engine("sealer")) as tx:
        state = sealing.state(tx)
        found = sealing.checkpoints(tx, after=0, most=1_000_000)
        _examine_memory(tx, key, state.size)
    edge, sealed = Edge(), Counter[int]()
    for one in found:
        sealed.update(one.seqs)
        list(edge.append(leaves[seq] for seq in one.seqs if seq in leaves))
        assert (edge.size, edge.root()) == (one.size, one.root), "not a prefix of the final tree"
        said = Checkpoint(state.log_id, one.size, one.root, one.epoch, one.signed_at).text
        assert signing.signed_by(said, one.signatures, public), "a signature is not ours"
    return Findings(
        missed=frozenset(leaves) - frozenset(sealed),
        doubled=frozenset(seq for seq, times in sealed.items() if times > 1),
        unknown=frozenset(sealed) - frozenset(leaves),
        out_of_order=_out_of_order(found),
        size=state.size,
        checkpoints=len(found),
        epoch=state.epoch,
    )


def _out_of_order(found: Sequence[Sealed]) -> int:
    """Count events that a rule `seq > last` would have lost."""
    last = late = 0
    for one in found:
        late += sum(seq < last for seq in one.seqs)
        last = max(last, *one.seqs)
    return late


def _examine_memory(tx: Connection, key: Path, size: int) -> None:
    last = memory.recall(memory.path_of(key))
    assert last is not None
    assert last.size == size
    root = Edge.load(size, lambda level, n: sealing.tile(tx, level, n)).root()
    assert root == last.root


def main() -> None:
    """Have a child seal until it is killed, then the next one: starting Python takes longer."""
    while True:
        pid = os.fork()
        if pid == 0:
            _seal_while_test_lives()
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))


def _seal_while_test_lives() -> NoReturn:
    said, parent = os.environ, os.getppid()  # noqa: TID251 - a test's own process
    logging.disable()
    engine = open_engine(said["SEAL_URL"], "sealer", pool_size=1)
    one = sealer(engine, Path(said["SEAL_KEY"]), said["SEAL_NAME"])
    while os.getppid() == parent:
        try:
            if one.step() is None:
                time.sleep(0.005)
            if random.random() < 0.01:
                one.close()
                time.sleep(0.05)
        except TransientError:
            time.sleep(0.02)
    sys.exit()


if __name__ == "__main__":
    main()
