"""Decode the message, call one function."""

from collections.abc import Callable
from uuid import UUID

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import Middleware

from schemas.jobs import QUEUE, Job
from schemas.log_lines import bind, unbind
from workers import messages
from workers.messages import ACTOR


def register(broker: RedisBroker, execute: Callable[[Job], None]) -> dramatiq.Actor[..., None]:
    """Declare the one actor there is. Retries, time limits and delays live in Postgres."""
    broker.add_middleware(BindRun())

    def on_message(*arguments: object, **_: object) -> None:
        job = messages.job(arguments)
        if job is None:  # the consumer has looked already; nothing else may come here
            raise UnreadableJobError
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
