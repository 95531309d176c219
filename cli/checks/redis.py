"""Redis as `syncward doctor redis` sees it."""

from cli.checks.base import Area, Check, slow
from cli.context import Cli
from schemas.errors import ConfigError, TransientError
from schemas.health import QueueHealth
from schemas.profiles import link_faults
from workers.enqueue import JobQueue, open_client


def _queue(cli: Cli) -> QueueHealth:
    if cli.settings.redis_url is None:
        raise ConfigError("SYNCWARD_REDIS_URL is not set, so Redis cannot be asked from here")
    url = cli.settings.redis_url.get_secret_value()
    faults = link_faults("redis_url", url) if cli.settings.profile == "production" else []
    if faults:  # not even asked: the login would travel unprotected
        raise ConfigError("; ".join(f"SYNCWARD_REDIS_URL: {why}" for why in faults))
    queue = JobQueue(open_client(url))
    try:
        found = queue.health()
    finally:
        queue.close()
    if found.problem is not None:
        raise TransientError(found.problem)
    return found


def _policy(redis: QueueHealth) -> str | None:
    if redis.maxmemory_policy is None:
        return "this login may not ask for the memory policy (INFO is refused)"
    if redis.maxmemory_policy == "noeviction":
        return None
    return f"maxmemory-policy is {redis.maxmemory_policy}: it may drop jobs without an error"


def _append_only(redis: QueueHealth) -> str | None:
    return (
        "the append-only file is off: a restart forgets all jobs"
        if (redis.append_only is False)
        else None
    )


def _dedicated(redis: QueueHealth) -> str | None:
    if not redis.foreign_keys:
        return None
    return f"{redis.foreign_keys} keys in this database are not Syncward's"


def _redis_latency(redis: QueueHealth) -> str | None:
    return slow(redis.latency_s)


REDIS = Area(
    "redis",
    _queue,
    Check(
        "reachable",
        "jobs wait in Postgres while Redis is away: nothing is lost, nothing starts",
        "start Redis, or correct SYNCWARD_REDIS_URL; runs start again by themselves",
        lambda _: None,
    ),
    (
        Check(
            "memory_policy",
            "a dropped job is sent again only after its deadline, and a full Redis should say so",
            "redis-cli CONFIG SET maxmemory-policy noeviction",
            _policy,
        ),
        Check(
            "append_only",
            "after a restart of Redis every job that was on its way waits for its deadline",
            "redis-cli CONFIG SET appendonly yes",
            _append_only,
        ),
        Check(
            "dedicated",
            "the queue's upkeep walks over all keys of its database and stalls it for seconds",
            "give Syncward a Redis of its own, or at least a database number of its own",
            _dedicated,
        ),
        Check(
            "latency",
            "each job costs round trips to Redis",
            "move Redis nearer to the schedulers and workers",
            _redis_latency,
        ),
    ),
)
