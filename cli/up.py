"""`syncward up` and `syncward down`: everything on this machine, supervised."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import click

from cli import dev
from cli.context import Cli, command
from cli.demo_world import stop_world
from cli.supervisor import Child, Supervisor
from schemas.errors import ConfigError, StartRefused, SyncwardError
from schemas.log_lines import log_to_stderr
from schemas.profiles import Process, all_reasons
from schemas.settings import Settings
from storage import health
from storage.engine import open_engine, transaction

logger = logging.getLogger(__name__)

_PID_FILE = "up.pid"

#: How the line begins that says that everything runs.
_RUNNING = "running in "
#: Processes that say nothing for so long after a start are named.
_HEARD_WITHIN_S = 60

#: What `up` starts; each says for itself what only it can find out.
_SUPERVISED: tuple[Process, ...] = ("scheduler", "worker")
#: What whoever starts an instance of their own may say otherwise: where its workers may go.
_OF_WORKERS = (
    "files_root", "connectors_dir", "connectors_unguarded", "connectors_user",
    "connectors_confined", "connectors_readable", "connectors_memory", "connectors_cpu",
    "connectors_traffic", "connectors_silence",
)  # fmt: skip
#: What only the sealer is told.
_OF_SEALER = frozenset({"SYNCWARD_AUDIT_SIGNING_KEY", "SYNCWARD_AUDIT_S3_CREDENTIALS_FILE"})


@click.group()
def _group() -> None:
    """Only here to register the two commands."""


commands = _group.commands


@command(_group)
@click.option("--dev", "development", is_flag=True, help="Bring embedded Postgres and Valkey.")
@click.option("--detach", is_flag=True, help="Leave it running in the background.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64))
def up(cli: Cli, *, development: bool, detach: bool, workers: int) -> None:
    """Run scheduler, workers and sealer, restarting what dies, until Ctrl-C."""
    if detach and not development:
        raise click.UsageError("--detach goes with --dev; else let systemd run it (deploy/systemd)")
    if not development:
        _supervise_configured(cli, workers)
        return
    data_dir = cli.settings.data_dir.resolve()
    running = _running(data_dir)
    if running is not None:
        cli.answer({"running": running}, lambda: f"already running (pid {running}) in {data_dir}")
        return
    if detach:
        _detach(cli, data_dir, workers)
        return
    _supervise(cli, data_dir, workers)


def _supervise(cli: Cli, data_dir: Path, workers: int) -> None:
    instance = dev.start(data_dir, cli.principal)
    stop = _stop_on_signals()
    handed_on = {
        name: os.environ[f"SYNCWARD_{name.upper()}"]  # noqa: TID251 - handed on to our own processes
        for name in _OF_WORKERS
        if f"SYNCWARD_{name.upper()}" in os.environ  # noqa: TID251 - as above
    }
    supervisor = Supervisor(
        instance.children({"log_format": cli.settings.log_format, **handed_on}, workers=workers),
        instance.log_dir,
        _say(cli.settings),
    )
    pid_file = data_dir / _PID_FILE
    pid_file.write_text(str(os.getpid()), encoding="utf-8")
    try:
        silent = _not_heard_of(supervisor, instance, workers, stop)
        click.echo(_started(data_dir, instance, silent))
        supervisor.run(stop)
    finally:
        supervisor.stop()
        pid_file.unlink(missing_ok=True)
        instance.stop()


def _supervise_configured(cli: Cli, workers: int) -> None:
    """Supervise against configured servers: children get this environment as it is."""
    supervised = list(_SUPERVISED)
    if cli.settings.audit_signing_key is not None:  # best on another host (docs/anchors.md)
        supervised.append("sealer")
    reasons = dict.fromkeys(
        why for process in supervised for why in all_reasons(cli.settings, process)
    )
    if reasons:
        raise StartRefused(list(reasons))
    sealing = dict(os.environ)  # noqa: TID251 - handed on to our own processes
    environment = {k: v for k, v in sealing.items() if k not in _OF_SEALER}
    children = [Child("scheduler", "scheduler.process", environment)]
    children += [Child(f"worker-{n + 1}", "workers.process", environment) for n in range(workers)]
    if "sealer" in supervised:
        children.append(Child("sealer", "audit.process", sealing))
    logs = cli.settings.data_dir / "logs"
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    Supervisor(children, logs, _say(cli.settings)).run(_stop_on_signals())


def _say(settings: Settings) -> Callable[[str], None]:
    """Return how the supervisor reports that a process ended: to people, or as JSON lines."""
    if settings.log_format == "people":
        return lambda line: click.echo(line, err=True)
    log_to_stderr("json")
    return lambda line: logger.warning("process_ended", extra={"about": line})


def _stop_on_signals() -> Event:
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _not_heard_of(
    supervisor: Supervisor, instance: dev.Instance, workers: int, stop: Event
) -> list[str]:
    """Wait until all processes have said that they live; return those that have not in time."""
    url = dev.settings(instance).database_url
    assert url is not None  # noqa: S101 - `dev.start` has written it
    engine = open_engine(url.get_secret_value(), "operator", pool_size=1)
    deadline = time.monotonic() + _HEARD_WITHIN_S
    try:
        while True:
            supervisor.tick()
            with transaction(engine) as tx:
                seen, log = health.schedule(tx), health.audit(tx)
            silent = [] if seen.schedulers else ["the scheduler"]
            silent += [] if seen.workers >= workers else ["a worker"]
            silent += [] if log.sealer_alive else ["the sealer"]
            if not silent or time.monotonic() > deadline or stop.wait(0.2):
                return silent
    finally:
        engine.dispose()


def _started(data_dir: Path, instance: dev.Instance, silent: list[str]) -> str:
    ports = f"Postgres on port {instance.postgres.port}, Valkey on port {instance.valkey.port}"
    lines = [
        f"{_RUNNING}{data_dir}: {ports}, scheduler, workers, sealer",
        f"logs in {instance.log_dir}; stop with: syncward down",
        "next: syncward account create NAME, then: syncward apply -f FILE",
    ]
    if silent:
        lines.append(f"not heard of yet: {', '.join(silent)}; look there, and: syncward doctor")
    return "\n".join(lines)


def _detach(cli: Cli, data_dir: Path, workers: int) -> None:
    """Start the supervisor in a session of its own and wait until it says that it runs."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = data_dir / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-m", "cli.main", "up", "--dev", "--workers", str(workers)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "SYNCWARD_DATA_DIR": str(data_dir)},  # noqa: TID251 - the same program again
        )
    while _RUNNING not in log.read_text(encoding="utf-8"):
        if process.poll() is not None:
            raise SyncwardError(log.read_text(encoding="utf-8").strip() or f"failed; see {log}")
        time.sleep(0.1)
    cli.answer(
        {"running": process.pid, "data_dir": str(data_dir)},
        lambda: log.read_text(encoding="utf-8").strip(),
    )


def _running(data_dir: Path) -> int | None:
    """Return the pid of this directory's supervisor, if it lives."""
    try:
        pid = int((data_dir / _PID_FILE).read_text(encoding="utf-8"))
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if {b"up", b"--dev"} <= set(words) else None  # the pid may be another program's now


@command(_group)
def down(cli: Cli) -> None:
    """Stop what `up --dev` started: drain workers, then stop the servers. Data stays."""
    data_dir = cli.settings.data_dir.resolve()
    pid = _running(data_dir)
    if pid is None:
        raise ConfigError(f"nothing is running in {data_dir}; start it with: syncward up --dev")
    os.kill(pid, signal.SIGTERM)
    for _ in range(600):
        if _running(data_dir) != pid:
            break
        time.sleep(0.1)
    stop_world(data_dir / "world")  # of a demo that was left running
    cli.answer({"stopped": pid}, lambda: f"stopped; data stays in {data_dir}")
