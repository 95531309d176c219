"""Decode the message, call one function."""

import logging
from collections.abc import Callable

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from pydantic import ValidationError

from schemas.jobs import QUEUE, Job
from workers.enqueue import ACTOR

logger = logging.getLogger(__name__)


def register(broker: RedisBroker, execute: Callable[[Job], None]) -> dramatiq.Actor[..., None]:
    """Declare the one actor there is. Retries, time limits and delays live in Postgres."""

    def on_message(*arguments: object, **_: object) -> None:
        try:
            job = Job.model_validate(dict(zip(Job.model_fields, arguments, strict=True)))
        except (ValidationError, ValueError):
            logger.error("job_unreadable")  # noqa: TRY400 - the traceback would quote the message
            raise UnreadableJobError from None
        execute(job)

    return dramatiq.Actor(
        on_message, broker=broker, actor_name=ACTOR, queue_name=QUEUE, priority=0, options={}
    )


class UnreadableJobError(Exception):
    """A message that is no job: dead-lettered, never executed."""
