"""Decode the message, call one function."""

import logging
from collections.abc import Callable
from uuid import UUID

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import Middleware
from pydantic import ValidationError

from schemas.jobs import QUEUE, Job
from schemas.log_lines import bind, unbind
from workers.enqueue import ACTOR

logger = logging.getLogger(__name__)


def register(broker: RedisBroker, execute: Callable[[Job], None]) -> dramatiq.Actor[..., None]:
    """Declare the one actor there is. Retries, time limits and delays live in Postgres."""
    broker.add_middleware(BindRun())

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


class BindRun(Middleware):
    """Every line that is logged while a message is processed says which run it is about.

    Dramatiq logs an exception after the actor has ended, hence not a context inside of it.
    """

    def before_process_message(
        self,
        broker: dramatiq.Broker,  # noqa: ARG002 - Dramatiq's signature
        message: dramatiq.MessageProxy,
    ) -> None:
        """Bind the run's id, if the message names one."""
        run_id = message.args[0] if message.args else None
        try:
            bind(run_id=UUID(run_id))
        except (ValueError, TypeError, AttributeError):
            unbind()

    def after_process_message(
        self,
        broker: dramatiq.Broker,  # noqa: ARG002 - as above
        message: dramatiq.MessageProxy,  # noqa: ARG002 - as above
        *,
        result: object = None,  # noqa: ARG002 - as above
        exception: BaseException | None = None,  # noqa: ARG002 - as above
    ) -> None:
        """Bind nothing any more."""
        unbind()


class UnreadableJobError(Exception):
    """A message that is no job: dead-lettered, never executed."""
