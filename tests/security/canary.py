"""Canary secrets through everything that handles one, then a search of all that is left behind.

`make canary`, or `python -m tests.security.canary [--secrets 50] [--leak]`. Every canary is the
password of a resource; its run succeeds, is refused, quotes it in an error, is tried again or is
cancelled. Searched are a dump of the control database, its files and WAL, Redis' file, all logs,
the environments of all processes and every answer of the command line. A leak that is planted at
the end must be found in each of these places; `--leak` plants a real one: then this fails.
"""

import argparse
import itertools
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

from cli import dev, leak_search
from cli.leak_search import Place, Searched
from cli.supervisor import Supervisor
from embedded.postgres import Cluster
from schemas.audit import Principal
from tests.spare import ours

#: What happens to the run of a canary, in turn.
FATES = ("loads", "refused", "quoted", "retried", "cancelled")
#: Put around random characters: what quoting and encoding get wrong.
ODD = ("", " ", "'", '"', "%", "/", "+", "\\", "ü", "@:")
PLACES = ("pg_dump", "files", "redis", "logs", "process", "answer")
_PATIENCE_S = 90.0
#: State, attempt and error of a connection's live run, else of the one that ended last.
_NEWEST = """
SELECT r.state, r.attempt, r.error_code FROM connections c, LATERAL (
    SELECT state, attempt, error_code, NULL::timestamptz AS finished_at
    FROM active_runs WHERE subject_id = c.id
    UNION ALL SELECT state, attempt, error_code, finished_at
    FROM runs WHERE subject_id = c.id) AS r
WHERE c.name = %s ORDER BY r.finished_at DESC NULLS FIRST LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Canary:
    """One secret, the login it belongs to, and the fate of its run."""

    number: int
    fate: str
    secret: str

    @property
    def name(self) -> str:
        return f"bird{self.number}"


@dataclass
class Aviary:
    """A development instance with real processes, a cluster of sources, and all that was said."""

    root: Path
    instance: dev.Instance
    sources: Cluster
    birds: list[Canary]
    answers: list[Place] = field(default_factory=list)
    typed: set[tuple[str, ...]] = field(default_factory=set)
    environments: dict[str, set[bytes]] = field(default_factory=dict)

    def say(self, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Type a command as an operator would; what it answers is kept for the search.

        The first of its kind is a process of its own, for the watch; the others are forks.
        """
        environment = {"PATH": os.defpath, "SYNCWARD_DATA_DIR": str(self.instance.data_dir)}
        if words[:2] in self.typed:
            done = ours().run("cli.main", *words, environment=environment, given=stdin or "")
        else:
            self.typed.add(words[:2])
            done = subprocess.run(
                [sys.executable, "-m", "cli.main", *words], input=stdin or "", env=environment,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        said = (done.stdout.encode(), done.stderr.encode())
        self.answers.append(Place(f"answer of {' '.join(words[:3])}", said))
        return done

    def watch(self, stop: threading.Event, supervisor: Supervisor) -> None:
        """Keep the environment and arguments of every process that comes by."""
        ours = os.getpid()
        while not stop.wait(0.2):
            for pid in _below(ours):
                for place in leak_search.processes([pid]):
                    self.environments.setdefault(place.name.split()[-1], set()).update(place.pieces)
        assert supervisor.children

    def places(self) -> Iterator[Place]:
        """Everything that is left behind, each with the kind of place in front."""
        yield leak_search.dump(self.instance.postgres, dev.DATABASE)
        yield from leak_search.files_below(self.instance.postgres.root, "files")
        yield from leak_search.files_below(self.instance.valkey.root, "redis")
        yield from leak_search.files_below(self.instance.log_dir, "logs")
        yield from leak_search.files_below(self.instance.keyring_dir, "files/keyring")
        for what, contents in self.environments.items():
            yield Place(f"process {what}", sorted(contents))
        yield from self.answers


def _below(pid: int) -> list[int]:
    """Return all living descendants of a process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        todo += (fresh := children.get(todo.pop(), []))
        found += fresh
    return found


def hatch(count: int) -> list[Canary]:
    """Make canaries: each fate in turn, each oddity in turn, never twice the same."""
    kinds = itertools.cycle(FATES)
    return [
        Canary(n, next(kinds), secrets.token_urlsafe(9) + ODD[n % len(ODD)] + secrets.token_hex(4))
        for n in range(count)
    ]


@contextmanager
def aviary(root: Path, count: int) -> Iterator[Aviary]:
    """Start everything; stopped at the end."""
    with ExitStack() as at_exit:
        instance = dev.start(root / "instance", Principal("operator", "canary"), guard_parent=True)
        at_exit.callback(instance.stop)
        sources = at_exit.enter_context(Cluster(root / "sources", durable=False, guard_parent=True))
        made = Aviary(root, instance, sources, hatch(count))
        supervisor = Supervisor(
            instance.children({"lease": "5s", "heartbeat": "1s"}), instance.log_dir, lambda _: None
        )
        stop = threading.Event()
        threads = [
            threading.Thread(target=supervisor.run, args=(stop,)),
            threading.Thread(target=made.watch, args=(stop, supervisor)),
        ]
        for thread in threads:
            thread.start()
        try:
            yield made
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def prepare(place: Aviary) -> Path:
    """Make the databases, a login for each canary, and the document; return its path."""
    with _session(place.sources, "postgres") as db:
        db.execute("CREATE DATABASE shop")
        db.execute("CREATE DATABASE lake")
        db.execute(sql.SQL("CREATE ROLE writer LOGIN PASSWORD {}").format(sql.Literal("w" * 24)))
        db.execute("GRANT CREATE ON DATABASE lake TO writer")
        for bird in place.birds:
            other = secrets.token_hex(12) if bird.fate == "refused" else bird.secret
            db.execute(
                sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(
                    sql.Identifier(bird.name), sql.Literal(other)
                )
            )
    with _session(place.sources, "shop") as db:
        for bird in place.birds:
            _view(db, bird)
    return _document(place)


def _view(db: psycopg.Connection, bird: Canary) -> None:
    """Give a canary something to read: rows, an error that quotes it, or a long wait."""
    name = sql.Identifier(f"t_{bird.name}")
    quoting = sql.Literal(
        f"login with {bird.secret} failed, {quote(bird.secret, safe='')}, "
        f"{b64encode(b'user:' + bird.secret.encode()).decode()}, {bird.secret.encode().hex()}"
    )
    if bird.fate in {"quoted", "retried"}:
        state = sql.Literal("40001" if bird.fate == "retried" else "P0001")
        db.execute(
            sql.SQL("CREATE FUNCTION {} () RETURNS int LANGUAGE plpgsql AS {}").format(
                sql.Identifier(f"f_{bird.name}"),
                sql.Literal(
                    sql.SQL(
                        "BEGIN RAISE EXCEPTION USING MESSAGE = {q}, DETAIL = {q}, HINT = {q}, "
                        "ERRCODE = {s}; END"
                    )
                    .format(q=quoting, s=state)
                    .as_string(db)
                ),
            )
        )
        reads: sql.Composable = sql.SQL("SELECT {} () AS id").format(
            sql.Identifier(f"f_{bird.name}")
        )
    elif bird.fate == "cancelled":
        reads = sql.SQL("SELECT 1 AS id, pg_sleep(600)::text AS slept")
    else:
        reads = sql.SQL("SELECT 1 AS id")
    db.execute(sql.SQL("CREATE VIEW {} AS {}").format(name, reads))
    db.execute(sql.SQL("GRANT SELECT ON {} TO {}").format(name, sql.Identifier(bird.name)))


@contextmanager
def _session(cluster: Cluster, database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(
        host=cluster.host, port=cluster.port, user=cluster.superuser, password=cluster.password,
        dbname=database, autocommit=True,
    ) as db:  # fmt: skip
        yield db


def _document(place: Aviary) -> Path:
    directory = place.root / "input"  # what the operator typed in; not searched
    directory.mkdir(mode=0o700)
    (directory / "writer.pw").write_text("w" * 24)
    address = {"host": place.sources.host, "port": place.sources.port, "sslmode": "disable"}
    resources = {
        "lake": {
            "kind": "postgres", "config": {**address, "database": "lake", "user": "writer"},
            "secret": {"password": {"file": "writer.pw"}},
        }
    }  # fmt: skip
    connections = {}
    for bird in place.birds:
        (directory / f"{bird.name}.pw").write_text(bird.secret)
        resources[bird.name] = {
            "kind": "postgres", "config": {**address, "database": "shop", "user": bird.name},
            "secret": {"password": {"file": f"{bird.name}.pw"}},
        }  # fmt: skip
        connections[f"{bird.name}-to-lake"] = {
            "source": bird.name, "destination": "lake", "schedule": "manual",
            "target": {"schema": f"to_{bird.name}"},
            "streams": {f"public.t_{bird.name}": {"mode": "replace"}},
        }  # fmt: skip
    path = directory / "canaries.yaml"
    path.write_text(
        json.dumps({"account": "zoo", "resources": resources, "connections": connections})
    )
    return path


def fly(place: Aviary, document: Path) -> None:
    """Send every canary through its fate, asking for it in every way there is."""
    place.say("account", "create", "zoo", "--plan", "unlimited")
    applied = place.say("apply", "-f", str(document))
    assert applied.returncode == 0, applied.stderr[:500]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda bird: _fate(place, bird), place.birds))
    first = place.birds[0]
    place.say("resource", "rotate", first.name, "--secret-stdin", "password", stdin=first.secret)
    for words in (
        ("resource", "test", first.name),
        ("resource", "discover", first.name),
        ("resource", "show", first.name, "--json"),
        ("resource", "list"),
        ("connection", "show", f"{first.name}-to-lake", "--json"),
        ("connection", "list"),
        ("diff", "-f", str(document)),
        ("apply", "-f", str(document)),
        ("run", "list", "--json"),
        ("audit", "tail", "--json"),
        ("keys", "status"),
        ("doctor", "--json"),
        ("metrics",),
        ("top", "--once"),
        ("account", "list", "--json"),
    ):
        place.say(*words)


def _fate(place: Aviary, bird: Canary) -> None:
    name = f"{bird.name}-to-lake"
    place.say("run", "enqueue", name)
    wanted = {
        "loads": {"succeeded"}, "refused": {"failed"}, "quoted": {"failed"},
        "retried": {"queued"}, "cancelled": {"running"},
    }[bird.fate]  # fmt: skip
    _until(place, name, wanted, attempt=1)
    if bird.fate in {"retried", "cancelled"}:
        place.say("run", "explain", name)
        place.say("run", "cancel", name)
        _until(place, name, {"cancelled"}, attempt=0)
    for words in (("run", "show"), ("run", "logs"), ("run", "output")):
        place.say(*words, name, "--json")
    place.say("run", "logs", name)


def _until(place: Aviary, name: str, states: set[str], *, attempt: int) -> None:
    """Wait in the database: a command for each look would cost a second of processor time."""
    deadline = time.monotonic() + _PATIENCE_S
    with _session(place.instance.postgres, dev.DATABASE) as db:
        while True:
            state, tried, code = db.execute(_NEWEST, [name]).fetchone() or ("none", 0, None)
            if state in states and tried >= attempt:
                return
            if time.monotonic() > deadline:
                sys.exit(f"{name}: {state} ({code}), wanted {states}")
            time.sleep(0.1)


def plant(place: Aviary, leak: str) -> None:
    """Put a secret into each kind of place, as a leak would: each kind must be found."""
    with _session(place.instance.postgres, dev.DATABASE) as db:
        db.execute("CREATE TABLE IF NOT EXISTS planted (leak text)")
        db.execute("INSERT INTO planted VALUES (%s)", [leak.encode().hex()])
        db.execute("CHECKPOINT")
    place.instance.valkey.remember("planted", b64encode(b"x" + leak.encode()).decode())
    with (place.instance.log_dir / "planted.log").open("a") as log:
        log.write(f"https://user:{quote(leak, safe='')}@host/\n")
    place.environments.setdefault("environ", set()).add(b"TOKEN=" + leak.encode())
    place.answers.append(Place("answer of nobody", (leak.encode(),)))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the search said of the canaries, and of the planted control."""

    searched: Searched
    leaks: list[str]
    control: frozenset[str]  # kinds of places where the control was found

    @property
    def good(self) -> bool:
        return not self.leaks and self.control == frozenset(PLACES)


def judge(place: Aviary, *, leak: bool) -> Verdict:
    """Search for the canaries; then plant a control and search for that."""
    known = [bird.secret for bird in place.birds]
    if leak:
        plant(place, known[-1])
    searched = leak_search.search(place.places(), known)
    leaks = [
        f"{place.birds[hit.secret].name} ({place.birds[hit.secret].fate}) in {hit.place} "
        f"as {hit.form}"
        for hit in searched.hits
    ]
    control = secrets.token_urlsafe(18)
    plant(place, control)
    found = leak_search.search(place.places(), [control])
    kinds = {hit.place.replace("/", " ").split(" ")[0] for hit in found.hits}
    return Verdict(searched, leaks, frozenset(kinds))


def run(count: int, *, leak: bool, root: Path) -> Verdict:
    """Do all of it in a directory."""
    with aviary(root, count) as place:
        fly(place, prepare(place))
        return judge(place, leak=leak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--secrets", type=int, default=50)
    parser.add_argument("--leak", action="store_true", help="plant a real leak: this must fail")
    chosen = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        verdict = run(chosen.secrets, leak=chosen.leak, root=Path(directory))
    for line in verdict.leaks:
        print(f"FOUND {line}")
    print(
        f"{chosen.secrets} canaries, {len(FATES)} fates, {verdict.searched.bytes / 1e6:,.0f} MB in "
        f"{len(leak_search.forms('x'))} forms: {len(verdict.leaks)} hits "
        f"({time.monotonic() - started:.0f} s)"
    )
    print(
        f"planted control found in {len(verdict.control)} of {len(PLACES)} kinds of places: "
        + ", ".join(sorted(verdict.control))
    )
    sys.exit(0 if verdict.good else 1)


if __name__ == "__main__":
    main()
