"""The one door into the queue. It opens it too, so that nobody else imports dramatiq or redis."""

import logging
import ssl
from collections.abc import Callable
from contextlib import suppress
from threading import Event
from time import monotonic
from typing import Any
from urllib.parse import parse_qs

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker, _RedisConsumer
from dramatiq.middleware import Middleware
from redis.backoff import NoBackoff
from redis.retry import Retry

from schemas.errors import ConfigError
from schemas.health import LinkHealth, QueueHealth
from schemas.jobs import QUEUE, Job
from schemas.urls import split
from storage.handshake import expiry
from workers import messages, sentinels
from workers.messages import ACTOR, Reason

logger = logging.getLogger(__name__)

#: Where nothing ever comes; a worker that stops waits for it.
_PAUSE_LONGEST_S = 1.0
#: Every key of ours in Redis begins with this.
NAMESPACE = "syncward"
#: A list with an item for each job that was sent: an idle worker waits for one instead of asking.
_BELL = f"{NAMESPACE}:bell"
#: Items that are kept while no worker waits.
_BELL_MAX = 100
#: What `health` looks at to find keys of others.
_SCANS, _SCAN_KEYS = 4, 500

#: How long an answer of Redis is believed before it is asked again.
_ALIVE_FOR_S = 1.0


def open_client(url: str) -> redis.Redis:
    """Return a client with timeouts and without retries; ConfigError if the URL is none.

    Retries belong to Postgres: a command that redis-py repeats may enqueue a job twice.
    """
    options: dict[str, Any] = {
        "socket_timeout": 5,
        "socket_connect_timeout": 3,
        "health_check_interval": 30,
        "retry": Retry(NoBackoff(), 0),
    }
    _refuse_unverified(url)
    if split(url).scheme.startswith("rediss"):
        options["ssl_min_version"] = ssl.TLSVersion.TLSv1_2
    try:
        if sentinels.named_in(url):
            return sentinels.open_client(url, **options)
        return redis.Redis.from_url(url, **options)
    except ValueError:
        raise ConfigError(
            "SYNCWARD_REDIS_URL: not a URL; write rediss://user:password@host:6379/0"
        ) from None


def _refuse_unverified(url: str) -> None:
    """ConfigError if the URL takes back what TLS is for: anybody could answer then."""
    said = parse_qs(split(url).query)
    off = {
        "ssl_cert_reqs": {"none", "optional"},
        "ssl_check_hostname": {"false", "f", "0", "no", "n"},
    }
    for name, values in off.items():
        if values & {value.lower() for value in said.get(name, [])}:
            raise ConfigError(
                f"SYNCWARD_REDIS_URL: {name} turns the check of the server's certificate off; take "
                "it out, and name the authority's file: ssl_ca_certs=/path"
            )


class DeadLetters(Middleware):
    """Keep messages that raised. Without Dramatiq's retries a failure would be acknowledged."""

    def after_process_message(
        self,
        broker: dramatiq.Broker,  # noqa: ARG002 - Dramatiq's signature
        message: dramatiq.MessageProxy,
        *,
        result: object = None,  # noqa: ARG002 - as above
        exception: BaseException | None = None,
    ) -> None:
        """Mark a failed message, so that it goes to the dead-letter queue."""
        if exception is not None:
            message.fail()


class _EagerConsumer(_RedisConsumer):
    """Takes the next job as soon as one was sent, or as soon as a slot is free for it.

    Dramatiq's own consumer sleeps while the queue is empty, and just as long while all slots are
    taken; fetching ahead instead would hoard what others could run.
    """

    def __init__(self, broker: RedisBroker, queue_name: str, prefetch: int, timeout: int) -> None:
        super().__init__(broker, queue_name, prefetch, 0)  # type: ignore[no-untyped-call]  # dramatiq ships no types here
        idle = queue_name.endswith(".DQ")  # Dramatiq's queue of delayed messages: there are none
        self._longest_s = _PAUSE_LONGEST_S if idle else timeout / 1_000
        self._bell = not idle
        self._slot_free = Event()

    def ack(self, message: dramatiq.MessageProxy) -> None:
        super().ack(message)  # type: ignore[no-untyped-call]  # as above
        self._slot_free.set()

    def nack(self, message: dramatiq.MessageProxy) -> None:
        super().nack(message)  # type: ignore[no-untyped-call]  # as above
        self._slot_free.set()

    def __next__(self) -> dramatiq.MessageProxy | None:
        """Return a message, or None after a pause that ends early when there may be one."""
        try:
            message = self._take()
            if message is None:
                self._rest()
        except redis.ConnectionError as error:
            raise dramatiq.ConnectionClosed(error) from None  # type: ignore[no-untyped-call]  # as above
        return message

    def _rest(self) -> None:
        """Wait for a free slot, or for the bell; what rang unheard is found after the timeout."""
        if not self._bell or self.outstanding_message_count >= self.prefetch:
            self._slot_free.wait(self._longest_s)
            self._slot_free.clear()
            return
        try:
            self.broker.client.blpop([_BELL], timeout=self._longest_s)
        except redis.exceptions.NoPermissionError:  # a login of a version without it
            self._bell = False
        except redis.exceptions.ResponseError:  # a key of others, or a server that gives way
            self._slot_free.wait(self._longest_s)

    def _take(self) -> dramatiq.MessageProxy | None:
        """Return the next job; what is none is buried before Dramatiq looks at it."""
        if not self.message_cache:
            free = self.prefetch - self.outstanding_message_count
            self.message_cache = self.broker.do_fetch(self.queue_name, free) if free > 0 else []
        while self.message_cache:
            data = self.message_cache.pop(0)
            message = messages.read(data, self.queue_name)
            if message is not None:
                self.queued_message_ids.add(message.message_id)
                return dramatiq.MessageProxy(message)
            self._bury(data)
        return None

    def _bury(self, data: bytes | None) -> None:
        """Dead-letter a message that is no job.

        What it says of itself is not believed: its key is looked up among those that we hold.
        """
        logger.error("job_unreadable")
        self.broker.refused("unreadable")
        acks = f"{NAMESPACE}:__acks__.{self.broker.broker_id}.{self.queue_name}"
        held = list(self.broker.client.smembers(acks))
        stored = (
            self.broker.client.hmget(f"{NAMESPACE}:{self.queue_name}.msgs", held) if held else []
        )
        for key, found in zip(held, stored, strict=True):
            if found is None:
                self.broker.do_ack(self.queue_name, key)  # a key without a message
            elif found == data:
                self.broker.do_nack(self.queue_name, key)

    def close(self) -> None:
        """Put back what was fetched and not yet looked at: another worker takes it at once."""
        fetched, self.message_cache = self.message_cache, []
        found = [messages.read(data, self.queue_name) for data in fetched]
        with suppress(redis.RedisError):  # else the dispatch deadline sends them again
            self.requeue([message for message in found if message is not None])  # type: ignore[no-untyped-call]  # as above
        super().close()


class _JobBroker(RedisBroker):
    refused: Callable[[Reason], None]

    @property
    def consumer_class(self) -> type[_EagerConsumer]:
        return _EagerConsumer


def open_broker(
    client: redis.Redis, refused: Callable[[Reason], None] = lambda _: None
) -> RedisBroker:
    """Return a broker without any of Dramatiq's retries, limits or delays.

    The heartbeat may be short because a job that is delivered twice is refused by its number.
    `refused` hears of each message that is no job.
    """
    broker = _JobBroker(  # type: ignore[no-untyped-call]  # dramatiq ships no types here
        client=client,
        namespace=NAMESPACE,
        middleware=[DeadLetters()],
        heartbeat_timeout=15_000,
        maintenance_chance=10_000,
        dead_message_ttl=3_600_000,
    )
    broker.refused = refused
    broker.declare_queue(QUEUE)
    return broker


class JobQueue:
    """Sends jobs; knows whether Redis answers."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._broker = open_broker(client)
        self._ask_at = float("-inf")
        self._alive = False
        self._rings = True

    def alive(self) -> bool:
        """Say whether Redis answered within the last second; never raises.

        One that is silent costs its whole timeout, so that it is asked less often the longer it
        lets us wait: a scheduler has other things to do.
        """
        began = monotonic()
        if began >= self._ask_at:
            try:
                self._alive = bool(self._client.ping())
            except redis.RedisError:
                self._alive = False
            self._ask_at = monotonic() + max(_ALIVE_FOR_S, 3 * (monotonic() - began))
        return self._alive

    def send(self, job: Job) -> bool:
        """Send a job. Call after the transaction that marked its run has committed.

        False if Redis did not take it: the run is put back when its dispatch deadline passes.
        """
        message: dramatiq.Message[None] = dramatiq.Message(
            queue_name=QUEUE,
            actor_name=ACTOR,
            args=(str(job.run_id), job.dispatch),
            kwargs={},
            options={},
        )
        try:
            self._broker.enqueue(message)
        except redis.RedisError:
            self._ask_at = float("-inf")
            return False
        self._ring()
        return True

    def _ring(self) -> None:
        """Wake an idle worker. Without it the job is found a moment later."""
        if not self._rings:
            return
        try:
            self._client.ltrim(_BELL, 1 - _BELL_MAX, -1)  # first: who may not do it does not ring
            self._client.rpush(_BELL, 1)
        except redis.exceptions.NoPermissionError:  # a login of a version without it
            self._rings = False
        except redis.RedisError:
            self._ask_at = float("-inf")

    def health(self) -> QueueHealth:
        """Ask Redis how it is set up; never raises, never shows what a library said."""
        started = monotonic()
        try:
            self._client.ping()
            latency = monotonic() - started
            foreign = self._foreign_keys()
        except redis.RedisError as error:
            return QueueHealth(problem=_problem(error, self._client))
        try:
            info: dict[str, Any] = self._client.info()
        except redis.RedisError:  # a login may be allowed the queue and nothing else
            return QueueHealth(latency_s=latency, foreign_keys=foreign)
        return QueueHealth(
            latency_s=latency,
            version=str(info.get("redis_version", "unknown")),
            maxmemory=int(info.get("maxmemory", 0)),
            maxmemory_policy=info.get("maxmemory_policy"),
            append_only=bool(info["aof_enabled"]) if "aof_enabled" in info else None,
            foreign_keys=foreign,
        )

    def link(self) -> LinkHealth:
        """Say how the link to Redis is protected, as its own socket tells; never raises."""
        pool = self._client.connection_pool
        try:
            used = pool.get_connection()
        except redis.RedisError as error:
            return LinkHealth("Redis", _problem(error, self._client))
        sock: object = used._sock  # noqa: SLF001 - redis-py shows it nowhere else
        pool.release(used)
        if not isinstance(sock, ssl.SSLSocket):
            return LinkHealth("Redis")
        return LinkHealth("Redis", version=sock.version(), expires_at=expiry(sock))

    def _foreign_keys(self) -> int:
        """Count keys that are not the queue's among the first few."""
        seen: set[Any] = set()  # bytes; the stubs allow for decoding clients
        cursor = 0
        for _ in range(_SCANS):
            cursor, keys = self._client.scan(cursor, count=_SCAN_KEYS)
            seen.update(keys)
            if not cursor:
                break
        return sum(not key.startswith(f"{NAMESPACE}:".encode()) for key in seen)

    def close(self) -> None:
        """Close the connections; the queue itself stays."""
        self._broker.close()
        self._client.close()


def _problem(error: redis.RedisError, client: redis.Redis) -> str:
    """Say in our words why Redis cannot be asked."""
    where = sentinels.whom(client) or "Redis {host}:{port}".format(**_address(client))
    match error:
        case redis.AuthenticationError() | redis.exceptions.NoPermissionError():
            return f"{where}: refuses the login of SYNCWARD_REDIS_URL"
        case redis.exceptions.BusyLoadingError():
            return f"{where}: is loading its data; it answers when that is done"
        case redis.TimeoutError():
            return f"{where}: does not answer in time"
        case redis.ConnectionError():
            return f"{where}: cannot be reached (is it up, and is its TLS what the URL says?)"
        case _:
            return f"{where}: refuses commands"


def _address(client: redis.Redis) -> dict[str, Any]:
    known = client.connection_pool.connection_kwargs
    return {name: known.get(name, "?") for name in ("host", "port")}
