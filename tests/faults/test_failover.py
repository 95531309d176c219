"""A Valkey with a replica and three Sentinels: the master is killed, and everything drains."""

import secrets
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from pydantic import SecretStr

from connectors.egress import EgressRefused, resolve
from embedded.daemons import end, exited, free_port, spawn
from embedded.valkey import Server, find_program
from schemas.egress import LinkPolicy, endpoints
from schemas.jobs import Job
from schemas.runs import RunState
from tests.faults.test_processes import Fleet, big, checksums
from workers import sentinels
from workers.enqueue import JobQueue, open_client

pytestmark = [pytest.mark.integration, pytest.mark.full, pytest.mark.timeout(240)]

DOWN_AFTER_S = 1.0


def until(condition, what: str, seconds: float = 60) -> float:
    """Wait for something; return the seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, what
        time.sleep(0.05)
    return time.monotonic() - started


class Watched:
    """Two Valkeys that replicate, and three Sentinels with a password of their own."""

    def __init__(self, directory: Path) -> None:
        self.password, self.guards = secrets.token_urlsafe(12), secrets.token_urlsafe(12)
        self.servers = [self._server(directory / name) for name in ("one", "two")]
        one, two = self.servers
        with self.to(two) as link:
            link.replicaof("127.0.0.1", one.port)
        self.sentinels = [self._sentinel(directory / f"sentinel-{n}") for n in range(3)]
        until(self._complete, "replica and Sentinels never found each other")

    def _server(self, root: Path) -> Server:
        root.mkdir(mode=0o700)
        (root / "password").write_text(self.password)
        started = Server(root, durable=False, guard_parent=True).start()
        with self.to(started) as link:
            link.config_set("masterauth", self.password)
            link.config_set("repl-diskless-sync-delay", 0)
        return started

    def _sentinel(self, root: Path) -> tuple[int, int]:
        """Start a Sentinel; return its port and its pid."""
        root.mkdir(mode=0o700)
        port = free_port(None)
        lines = (
            f"bind 127.0.0.1\nport {port}\ndir {root}\nlogfile {root}/log",
            f"requirepass {self.guards}",
            f"sentinel monitor syncward 127.0.0.1 {self.servers[0].port} 2",
            f"sentinel auth-pass syncward {self.password}",
            f"sentinel down-after-milliseconds syncward {int(DOWN_AFTER_S * 1_000)}",
            "sentinel failover-timeout syncward 6000",
        )
        path = root / "sentinel.conf"
        path.touch(mode=0o600)
        path.write_text("\n".join(lines) + "\n")
        return port, spawn(str(find_program()), str(path), "--sentinel")

    def to(self, server: Server) -> redis.Redis:
        return redis.Redis(port=server.port, password=self.password, socket_timeout=5)

    def _states(self) -> list[dict[str, Any]]:
        found = []
        for port, _pid in self.sentinels:
            with redis.Redis(port=port, password=self.guards, socket_timeout=5) as link:
                try:
                    found.append(link.sentinel_masters()["syncward"])
                except redis.ConnectionError:
                    return []
        return found

    def _complete(self) -> bool:
        return [(s["num-slaves"], s["num-other-sentinels"]) for s in self._states()] == [(1, 2)] * 3

    def master(self) -> Server:
        """Return the server that all Sentinels call the master."""
        ports = {state["port"] for state in self._states()}
        return next(s for s in self.servers if ports == {s.port})

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port, _pid in self.sentinels)
        return (
            f"redis+sentinel://:{self.password}@{hosts}/0"
            f"?master=syncward&sentinel_password={self.guards}"
        )

    def stop(self) -> None:
        for _port, pid in self.sentinels:
            end(pid, find_program().name, signal.SIGTERM, signal.SIGKILL)
            exited(pid)
        for server in self.servers:
            server.stop()


@pytest.fixture
def watched(tmp_path):
    made = Watched(tmp_path)
    yield made
    made.stop()


def test_a_job_that_is_sent_during_a_failover_is_taken_or_refused_and_nothing_is_raised(watched):
    queue = JobQueue(open_client(watched.url))
    assert queue.alive()
    assert queue.send(Job(run_id=uuid4(), dispatch=1))
    old = watched.master()
    old.kill()
    answers: list[bool] = []

    def taken() -> bool:
        answers.append(queue.send(Job(run_id=uuid4(), dispatch=1)))
        return answers[-1]

    outage = until(taken, "no new master took a job")
    assert answers[0] is False
    assert outage > DOWN_AFTER_S / 2
    assert watched.master() is not old
    assert queue.alive()
    health = queue.health()
    assert (health.problem, health.maxmemory_policy) == (None, "noeviction")
    queue.close()


def test_no_link_leads_to_our_own_redis_before_and_after_a_failover(watched):
    client = open_client(watched.url)
    policy = LinkPolicy(
        loopback=True,
        own=endpoints([watched.url]),
        moving=sentinels.servers(client),
    )

    def refused(port: int, policy: LinkPolicy) -> bool:
        try:
            resolve("127.0.0.1", port, policy)
        except EgressRefused:
            return True
        return False

    ports = [server.port for server in watched.servers]
    assert [refused(port, policy) for port in (*ports, watched.sentinels[0][0])] == [True] * 3
    assert not refused(free_port(None), policy)
    old = watched.master()
    old.kill()
    until(lambda: JobQueue(open_client(watched.url)).alive(), "no new master")
    fresh = replace(policy, moving=sentinels.servers(open_client(watched.url)))
    assert watched.master() is not old
    for held in (policy, fresh):
        assert [refused(port, held) for port in ports] == [True] * 2
    client.close()


def test_sentinels_that_are_gone_are_named_by_their_master(watched):
    for _port, pid in watched.sentinels:
        end(pid, find_program().name, signal.SIGKILL)
        exited(pid)
    queue = JobQueue(open_client(watched.url))
    assert not queue.alive()
    assert not queue.send(Job(run_id=uuid4(), dispatch=1))
    problem = queue.health().problem
    assert problem is not None
    assert problem.startswith("Redis master syncward behind Sentinels: cannot be reached")
    queue.close()


def test_the_master_is_killed_twice_and_everything_drains(watched, world):
    world.close()
    world.control.act("DELETE FROM workers")
    world.cli.settings = world.cli.settings.model_copy(update={"redis_url": SecretStr(watched.url)})
    fleet = Fleet(world, workers=2)
    try:
        big(world, 2_000)
        fleet.wait(world.enqueue().run_id, RunState.SUCCEEDED)
        for number in range(2):
            old = watched.master()
            world.pair.source(f"UPDATE big SET v = 'while {number} fails over'")
            old.kill()
            asked = world.enqueue()
            run = fleet.wait(asked.run_id, RunState.SUCCEEDED, seconds=60)
            assert run.attempt == 1
            assert checksums(world)[0] == checksums(world)[1]
            assert watched.master() is not old
            old.start()  # comes back as a replica of the other
            until(watched._complete, "the old one was not seen again")
            until(partial(_follows, watched, old), "the old one never became a replica")
        assert [c.process.poll() for c in fleet.supervisor.children if c.process] == [None] * 3
    finally:
        fleet.stop()
    assert world.control.one("SELECT count(*) FROM active_runs") == 0
    assert world.control.one("SELECT count(*) FROM runs WHERE state = 'succeeded'") == 3
    doubled = "SELECT count(*) FROM audit.event WHERE action = 'run.started'"
    assert world.control.one(doubled) == 3, "each run was claimed once"


def _follows(watched: Watched, server: Server) -> bool:
    with watched.to(server) as link:
        try:
            found = link.info("replication")
        except redis.ConnectionError:
            return False
    if found["role"] == "slave" and found["master_link_status"] == "up":
        return True
    with watched.to(server) as link:  # a restart forgot what CONFIG SET said
        link.config_set("masterauth", watched.password)
    return False
