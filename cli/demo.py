"""`syncward demo`: real servers, real syncs, a real crash, and proofs of what is promised.

`_story` is the table of contents; later parts of the product add their own line to it.
"""

import os
import secrets as random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import TypeVar
from uuid import UUID

import click
from sqlalchemy import text

from cli import demo_audit, demo_guard, dev, leak_search
from cli.apply import make_so
from cli.audit.tail import line_of
from cli.context import Cli, command
from cli.demo_world import World, stop_world
from cli.records import Reader, read_event
from cli.show import stream_table
from cli.supervisor import Supervisor
from embedded.postgres import Cluster
from embedded.valkey import Server
from schemas.audit import AuditAction
from schemas.errors import SyncwardError
from schemas.records import StreamResult
from schemas.runs import Run, RunState
from storage import accounts, audit, audit_tail, connections, logs, outputs, runs

T = TypeVar("T")

#: A short lease, so that the demo does not wait half a minute for the crash to be noticed.
_SETTINGS = {"lease": "5s", "heartbeat": "1s"}
_PATIENCE_S = 60.0
#: pgbench goes on for so long after the crash run was due.
_TRAFFIC_AFTER_S = 5.0


@click.group()
def _group() -> None:
    """Only here to register the command."""


commands = _group.commands


@command(_group)
@click.option("--keep", is_flag=True, help="Leave it running at the end.")
@click.option("--scale", default=5, show_default=True, help="pgbench scale: 100,000 rows each.")
def demo(cli: Cli, *, keep: bool, scale: int) -> None:
    """Show Syncward at work on real embedded servers; exit 0 only if all is proven equal."""
    root = cli.settings.data_dir.resolve() / "demo"
    _clear(root)
    with ExitStack() as at_exit:
        story = Story(cli)
        instance = dev.start(root, cli.principal, guard_parent=not keep)
        if not keep:
            at_exit.callback(shutil.rmtree, root, ignore_errors=True)
            at_exit.callback(instance.stop)
        world = World.start(root / "world", scale=scale, guard_parent=not keep)
        if not keep:
            at_exit.callback(world.stop)
        operator = Operator(instance)
        supervisor = Supervisor(instance.children(_SETTINGS), instance.log_dir, story.doing)
        equal = _story(story, instance, world, operator, _running(supervisor, at_exit))
        story.finish(equal=equal)
    if keep:
        _leave_running(root, cli)
    if not equal:
        sys.exit(1)


def _clear(root: Path) -> None:
    """Stop and remove what an earlier demo left."""
    if (root / "up.pid").exists():
        _down(root)
    stop_world(root / "world")
    for directory, server in (("postgres", Cluster), ("valkey", Server)):
        if (root / directory).exists():
            server(root / directory).stop()
    shutil.rmtree(root, ignore_errors=True)


def _down(root: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "cli.main", "down"],
        env={**os.environ, "SYNCWARD_DATA_DIR": str(root)},  # noqa: TID251 - the same program again
        check=False,
        capture_output=True,
    )


def _leave_running(root: Path, cli: Cli) -> None:
    """Hand over from the demo's own supervisor to one that outlives it."""
    subprocess.run(
        [sys.executable, "-m", "cli.main", "up", "--dev", "--detach"],
        env={**os.environ, "SYNCWARD_DATA_DIR": str(root)},  # noqa: TID251 - the same program again
        check=True,
        capture_output=True,
    )
    where = f"SYNCWARD_DATA_DIR={root}"
    cli.note(
        f"\nIt is left running. Try:\n  {where} ./syncward run list\n"
        f"  {where} ./syncward connection show shop-to-lake\n  {where} ./syncward down"
    )


def _running(supervisor: Supervisor, at_exit: ExitStack) -> Supervisor:
    """Run the supervisor in a thread until the demo ends, however it ends."""
    stop = Event()
    thread = Thread(target=supervisor.run, args=(stop,), daemon=True)

    def end() -> None:
        stop.set()
        thread.join(timeout=30)

    at_exit.callback(end)
    thread.start()
    return supervisor


@dataclass
class Story:
    """Prints numbered claims, each with its evidence."""

    cli: Cli
    started: float = field(default_factory=time.monotonic)
    lines: list[dict[str, str]] = field(default_factory=list)

    def doing(self, text_: str) -> None:
        """Say what takes a moment."""
        if not self.cli.json:
            click.echo(f"    … {text_}", err=True)

    def claim(self, claim: str, *evidence: str) -> None:
        """Print a claim and what proves it."""
        self.lines.append({"claim": claim, "evidence": "; ".join(evidence)})
        if not self.cli.json:
            lines = "".join(f"\n      {line}" for line in evidence)
            click.echo(f"{len(self.lines):>3}. {claim}{lines}")

    def show(self, title: str, body: str) -> None:
        """Print an excerpt under a title."""
        if not self.cli.json:
            indented = "\n".join(f"    {line}" for line in body.splitlines())
            click.echo(f"\n{title}\n{indented}")

    def finish(self, *, equal: bool) -> None:
        """Print the verdict."""
        seconds = time.monotonic() - self.started
        verdict = (
            "verified: source and destination are equal"
            if equal
            else "NOT PROVEN: see the claims above"
        )
        self.cli.answer(
            {"equal": equal, "seconds": round(seconds, 1), "claims": self.lines},
            lambda: f"\n{verdict}   ({seconds:.0f} s)",
        )


@dataclass(frozen=True, slots=True)
class Operator:
    """What an operator would type, against the demo's instance."""

    instance: dev.Instance

    def cli(self) -> Cli:
        """Return a command line with this instance's settings, whatever the environment says."""
        made = Cli(account="demo")
        made.__dict__["settings"] = dev.settings(self.instance)
        return made

    def apply(self, document: Path) -> int:
        """Create the account and apply the document; return how many things it made."""
        cli = self.cli()
        with cli.transaction() as tx:
            accounts.create(tx, "demo", company="Demo", plan="unlimited", principal=cli.principal)
        return len(make_so(cli, document, write=True))

    def runs(self) -> Sequence[Run]:
        """Return the connection's runs, live ones first, then the newest."""
        with self.cli().inside() as (tx, account, _):
            found = connections.get(tx, "shop-to-lake")
            return runs.listing(
                tx, account.account_id, runs.Filter(subject_id=found.connection_id), limit=100
            )

    def seconds_to_next_slot(self) -> float:
        """Return how soon the schedule starts the next run."""
        with self.cli().inside() as (tx, _, _name):
            due = connections.get(tx, "shop-to-lake").next_due_at
        return max(0.0, (due - datetime.now(UTC)).total_seconds()) if due else 0.0

    def streams(self, run_id: UUID) -> Sequence[StreamResult]:
        """Return what a run's streams have done so far."""
        with self.cli().inside() as (tx, _, _name):
            return outputs.streams(tx, run_id)

    def progress(self, run_id: UUID) -> int:
        """Return the rows read so far by a running run."""
        with self.cli().inside() as (tx, _, _name):
            return runs.progress(tx, run_id)[1]

    def run_log(self, run_id: UUID) -> str:
        """Return a run's log."""
        cli = self.cli()
        with cli.inside() as (tx, _, _name):
            found, lines = runs.get(tx, run_id), logs.read(tx, run_id)
            audit.append(tx, read_event(AuditAction.LOGS_READ, found, cli.principal))
        reader = Reader(cli, found)
        reader.require_keys()
        return "\n".join(
            f"{line.stored.at:%H:%M:%S} {line.stored.level:<7} "
            + (f"{line.stored.stream.removeprefix('public.')}: " if line.stored.stream else "")
            + (line.message or f"[cannot be opened: {line.problem}]")
            for line in reader.page(lines)
        )

    def audit_tail(self, run_id: UUID) -> str:
        """Return the audit events of one run."""
        with self.cli().transaction() as tx:
            events = audit_tail.newest(tx, audit_tail.Filters(), 1_000)
        return "\n".join(line_of(e) for e in events if str(run_id) in e.body)

    def plant(self, control: str, instance: dev.Instance) -> None:
        """Put a word where a leak would be, so that a search that finds nothing says something."""
        cli = self.cli()
        with cli.transaction() as tx:
            accounts.create(
                tx, "control", company=control, plan="standard", principal=cli.principal
            )
        instance.valkey.remember("control", control)
        (instance.log_dir / "control.log").write_text(f"control={control}\n", encoding="utf-8")

    def sealed(self) -> tuple[int, int]:
        """Return (stored credentials, how many bytes of them begin like an envelope)."""
        with self.cli().inside() as (tx, _, _name):
            rows = tx.execute(text("SELECT count(*), count(DISTINCT fingerprint) FROM credentials"))
            stored, distinct = rows.one()
        return int(stored), int(distinct)


def _story(
    story: Story, instance: dev.Instance, world: World, operator: Operator, supervisor: Supervisor
) -> bool:
    story.claim(
        "Real servers from Python packages; nothing was installed",
        f"{world.version} on ports {instance.postgres.port} and {world.cluster.port}, "
        f"Valkey on port {instance.valkey.port}; {world.rows:,} source rows by pgbench",
    )
    made = operator.apply(world.document())
    applied = time.monotonic()
    story.claim(
        "One document made account, resources, credentials, schedule",
        f"{made} things applied, {operator.sealed()[0]} passwords sealed; this side can store "
        "them and cannot open them",
    )
    by_hand = world.copy_by_hand()
    story.doing("waiting for the schedule (every 10s) to start the first run")
    first = _until(lambda: _first_success(operator), "the first run")
    seconds = _seconds(first)
    rows = sum(r.rows_loaded for r in operator.streams(first.run_id))
    story.claim(
        "The schedule started the first run, nobody asked for it",
        f"trigger {first.trigger}, {time.monotonic() - applied:.1f} s after apply; "
        f"{rows:,} rows in {seconds:.1f} s, psql COPY by hand: {by_hand:.1f} s",
    )
    crashed = _crash(story, instance, world, operator, supervisor)
    _until(lambda: _settled(operator), "a run after the traffic")
    equal = _prove(story, world)
    held = _lose_rows(story, world, operator)
    clean = _search(story, instance, world, operator, supervisor)
    caught = _rewrite_an_event(story, instance)
    story.show("Log of the run that was killed", operator.run_log(crashed))
    story.show("Its output", stream_table(operator.streams(crashed)))
    story.show("Its audit trail", operator.audit_tail(crashed))
    story.show(
        "Try next",
        "make demo KEEP=1\nmake up\n./syncward apply -f examples/two-databases.yaml",
    )
    return equal and held and clean and caught


def _until(look: Callable[[], T | None], what: str) -> T:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        found = look()
        if found is not None:
            return found
        time.sleep(0.1)
    raise SyncwardError(f"demo: {what} did not come within {_PATIENCE_S:.0f} s")


def _first_success(operator: Operator) -> Run | None:
    ended = [r for r in operator.runs() if r.finished_at is not None]
    for run in ended:
        if run.state is not RunState.SUCCEEDED:
            raise SyncwardError(f"demo: run {run.run_id} {run.state}: {run.error}")
    return ended[-1] if ended else None


def _seconds(run: Run) -> float:
    if run.started_at is None or run.finished_at is None:
        return 0.0
    return (run.finished_at - run.started_at).total_seconds()


def _crash(
    story: Story, instance: dev.Instance, world: World, operator: Operator, supervisor: Supervisor
) -> UUID:
    """Kill the worker and flush Redis in the middle of a long merge, under traffic; then wait."""
    world.touch_every_account()
    traffic = world.traffic(operator.seconds_to_next_slot() + _TRAFFIC_AFTER_S)
    story.doing("pgbench is writing; waiting for the next scheduled run to be in the middle")
    _until(lambda: True if world.loading() else None, "the next run")
    victim = next(r for r in operator.runs() if r.state is RunState.RUNNING)
    worker = next(c.process for c in supervisor.children if c.name.startswith("worker"))
    if worker is None:
        raise SyncwardError("demo: there is no worker to kill")
    os.kill(worker.pid, signal.SIGKILL)
    instance.valkey.flush()
    killed = time.monotonic()
    done_before = len(operator.streams(victim.run_id))
    story.claim(
        "kill -9 of the worker and FLUSHALL of Redis, in the middle of a run",
        f"run {victim.run_id}, {done_before} streams done, the largest half way",
    )
    ended = _until(lambda: _ended(operator, victim.run_id), "the recovery")
    recovered = time.monotonic() - killed
    results = operator.streams(ended.run_id)
    resumed = sum(1 for r in results if r.attempt == 1)
    output, _ = traffic.communicate(timeout=60)
    processed = next((ln for ln in output.splitlines() if "actually processed" in ln), "")
    story.claim(
        f"The system recovered by itself: attempt {ended.attempt} {ended.state}",
        f"{recovered:.1f} s after the kill (lease {_SETTINGS['lease']}); resumed: {resumed} of "
        f"{len(results)} streams were not read again",
        f"meanwhile pgbench: {processed.strip()}",
    )
    return ended.run_id


def _ended(operator: Operator, run_id: UUID) -> Run | None:
    return next((r for r in operator.runs() if r.run_id == run_id and r.finished_at), None)


def _settled(operator: Operator) -> Run | None:
    """Return the newest finished run if it found nothing new any more."""
    for run in operator.runs():
        if run.state is RunState.SUCCEEDED:
            results = operator.streams(run.run_id)
            moved = sum(r.rows_inserted + r.rows_updated for r in results)
            return run if moved == 0 else None
    return None


def _lose_rows(story: Story, world: World, operator: Operator) -> bool:
    """Let the source lose 90 % of a table, and look at what the destination serves meanwhile."""
    demo_guard.fill(world.cluster)
    make_so(operator.cli(), demo_guard.document(world.document()), write=True)
    found = demo_guard.lose_and_run(world.cluster, operator.cli(), _until)
    story.claim(
        f"The source loses 90 % of its rows: {found.run.state}; the old ones stay served",
        *(found.run.error or "").split(". "),
        f"served before: {found.served_before:,} rows, while it waits: {found.served_then:,}; "
        f"rejected: {found.rejected.state}",
    )
    return found.held


def _search(
    story: Story,
    instance: dev.Instance,
    world: World,
    operator: Operator,
    supervisor: Supervisor,
) -> bool:
    """Search what an intruder would take for the source's password, and for a planted control."""
    control = random.token_urlsafe(18)
    operator.plant(control, instance)
    pids = [c.process.pid for c in supervisor.children if c.process is not None]
    searched = leak_search.search(
        [
            leak_search.dump(instance.postgres, dev.DATABASE),
            *leak_search.files_below(instance.valkey.root, "Redis"),
            *leak_search.files_below(instance.log_dir, "logs"),
            *leak_search.processes(pids),
        ],
        [world.source_password(), control],
    )
    leaks = [hit for hit in searched.hits if hit.secret == 0]
    found = {hit.place.split("/")[0].split(" ")[0] for hit in searched.hits if hit.secret == 1}
    planted = {"pg_dump", "Redis", "logs"}
    story.claim(
        f"The source's password is nowhere: {len(leaks)} hits",
        f"dump of the control database, Redis, logs, environments: {searched.bytes / 1e6:.1f} MB "
        f"searched in {len(leak_search.forms(control))} forms",
        f"the planted control was found in {len(found & planted)} of {len(planted)} places",
        *(f"FOUND in {hit.place} as {hit.form}" for hit in leaks),
    )
    return not leaks and planted <= found


def _rewrite_an_event(story: Story, instance: dev.Instance) -> bool:
    """Let a superuser rewrite one event of the audit log, and ask whether anybody notices."""
    sealed = _until(
        lambda: size if (size := demo_audit.sealed_size(instance)) > demo_audit.INDEX else None,
        "the sealer",
    )
    before = demo_audit.verify(instance.data_dir)
    with demo_audit.rewritten(instance) as action:
        during = demo_audit.verify(instance.data_dir)
    after = demo_audit.verify(instance.data_dir)
    story.claim(
        f"A superuser rewrote event {demo_audit.INDEX} ({action}) with its hash: {during.said}",
        f"audit verify: exit {before.exit_code} before, {during.exit_code} then, "
        f"{after.exit_code} after it was put back; {sealed} events sealed",
    )
    found = f"TAMPERED at index {demo_audit.INDEX}" in during.said
    return found and (before.exit_code, during.exit_code, after.exit_code) == (0, 10, 0)


def _prove(story: Story, world: World) -> bool:
    proofs = world.proofs()
    good = [p for p in proofs if p.equal]
    lost = sum(max(0, p.rows[0] - p.rows[1]) for p in proofs)
    doubled = sum(max(0, p.rows[1] - p.rows[0]) for p in proofs)
    story.claim(
        f"Tables equal: {len(good)} of {len(proofs)}; rows lost {lost}, doubled {doubled}",
        *(
            f"{p.table:<18} {p.rows[0]:>9,} = {p.rows[1]:>9,} rows, checksum "
            f"{p.checksums[0][-12:]} {'=' if p.checksums[0] == p.checksums[1] else '≠'} "
            f"{p.checksums[1][-12:]}"
            for p in proofs
        ),
    )
    return len(good) == len(proofs)
