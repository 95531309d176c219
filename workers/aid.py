"""What the connectors of a run may ask this worker for (schemas/aid.py). Start at `of_run`."""

from schemas.aid import Aid
from storage.work import SealedResource
from workers.attempt import Attempt


def of_run(attempt: Attempt, resource: SealedResource) -> Aid:
    """Return the aid for one resource of one attempt."""
    del attempt, resource  # a worker does not renew secrets yet: the default refuses
    return Aid()
