"""Jobs: the queue message. A run id and a dispatch number; nothing else may ever travel here."""

from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

QUEUE = "sync"


class Job(BaseModel):
    """Wake-up for one dispatch of one run. Stale or doubled jobs are harmless."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    run_id: UUID
    dispatch: int = Field(strict=True, ge=0, lt=2**31)
