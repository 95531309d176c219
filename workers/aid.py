"""What the connectors of a run may ask this worker for (schemas/aid.py). Start at `of_run`."""

import logging

from schemas.aid import Aid
from storage.work import SealedResource
from workers.attempt import Attempt
from workers.call_list import RunCalls
from workers.pseudonyms import PseudonymKeys
from workers.quotas import RunQuotas
from workers.renewal import StoredRenewal, Unseal

logger = logging.getLogger(__name__)


def of_run(attempt: Attempt, resource: SealedResource, unseal: Unseal) -> Aid:
    """Return the aid for one resource of one attempt."""
    deps = attempt.deps
    return Aid(
        secrets=StoredRenewal(attempt, resource, unseal),
        say=lambda text: attempt.run_log.raw([text]),
        calls=RunCalls(deps.calls, attempt.claim, resource.kind),
        refused=lambda address, rule: logger.warning(
            "egress_refused",
            extra={"resource": resource.resource_id, "address": address, "rule": rule},
        ),
        quotas=RunQuotas(
            deps.quotas,
            resource.resource_id,
            resource.kind,
            token_of=lambda: PseudonymKeys.of_worker(deps).of(resource.account_id).token,
            shown=attempt.control.waiting,
        ),
        shown=attempt.control.waiting,
        resource=resource.name,
    )
