"""Read a message of the queue: a job exactly as we send it, or nothing.

Whoever can write to Redis can write anything, so nothing of a message is believed: there is one
actor, one queue and no option of Dramatiq's, and only JSON is looked at.
"""

import json
from typing import Any, Literal

import dramatiq
from pydantic import ValidationError

from schemas.jobs import QUEUE, Job

#: The actor's name on the wire; workers/actors.py registers the function behind it.
ACTOR = "execute"

#: Why a message is not executed.
Reason = Literal["unreadable", "unknown_run"]

#: Bytes of the longest message that is looked at; a job has about 250.
_LONGEST = 2_000
_FIELDS = frozenset(
    {"queue_name", "actor_name", "args", "kwargs", "options", "message_id", "message_timestamp"}
)


def read(data: bytes | None, queue_name: str) -> "dramatiq.Message[None] | None":
    """Return the message if it is a job in the queue of jobs, else None.

    What a later version may have added (keywords, options) is not refused but left out: nothing
    of it reaches Dramatiq.
    """
    if data is None or len(data) > _LONGEST or queue_name != QUEUE:
        return None
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not _is_job(said):
        return None
    return dramatiq.Message(
        queue_name=QUEUE,
        actor_name=ACTOR,
        args=tuple(said["args"]),
        kwargs={},
        options={"redis_message_id": said["options"]["redis_message_id"]},
        message_id=said["message_id"],
        message_timestamp=said["message_timestamp"],
    )


def _is_job(said: Any) -> bool:  # noqa: ANN401 - whatever JSON can say
    if not isinstance(said, dict) or set(said) != _FIELDS or not isinstance(said["options"], dict):
        return False
    key = said["options"].get("redis_message_id")
    return (
        (said["queue_name"], said["actor_name"]) == (QUEUE, ACTOR)
        and isinstance(key, str)
        and isinstance(said["message_id"], str)
        and type(said["message_timestamp"]) is int
        and job(said["args"]) is not None
    )


def job(arguments: Any) -> Job | None:  # noqa: ANN401 - as above
    """Return the job that a message's arguments are, if they are one."""
    try:
        return Job.model_validate(dict(zip(Job.model_fields, arguments, strict=True)))
    except (ValidationError, ValueError, TypeError):
        return None
