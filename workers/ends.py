"""Open the two ends of a run: unseal as late as possible, connect, make it cancellable."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from connectors import registry
from connectors.egress import EgressRefused
from crypto.cache import KeyCache
from crypto.envelope import Context
from crypto.errors import CryptoError, UnknownRoot, UnsealError
from crypto.roots import Keyring, Sealed, WrapContext, Wrapped
from crypto.unseal import unseal_credentials
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError
from schemas.records import Destination, Source, WireFormat
from schemas.redaction import Holder
from storage.work import SealedField, SealedResource, Work
from workers.control import RunControl
from workers.metrics import DECRYPTS

logger = logging.getLogger(__name__)


@contextmanager
def open_source(
    resource: SealedResource, keyring: Keyring, control: RunControl, policy: LinkPolicy
) -> Iterator[Source]:
    """Connect to a resource in the role of a source; closed at the end, cancelled by signals."""
    source = _opened(
        resource,
        control,
        lambda: registry.open_source(
            resource.kind,
            resource.config,
            unsealed(resource, keyring, control.secrets),
            policy.for_account(resource.account_id),
        ),
    )
    try:
        control.on_signal(source.cancel, source.cut)
        yield source
    finally:
        source.close()


@contextmanager
def open_destination(
    resource: SealedResource | None, keyring: Keyring, control: RunControl, policy: LinkPolicy
) -> Iterator[Destination]:
    """Connect to a resource in the role of a destination; as `open_source`."""
    if resource is None:
        raise RuntimeError("only a connection has a destination")
    destination = _opened(
        resource,
        control,
        lambda: registry.open_destination(
            resource.kind,
            resource.config,
            unsealed(resource, keyring, control.secrets),
            policy.for_account(resource.account_id),
        ),
    )
    try:
        control.on_signal(destination.cancel, destination.cut)
        yield destination
    finally:
        destination.close()


def common_wire(taken: object, source: Source, destination: Destination) -> WireFormat:
    """Return the fastest format that both ends speak; ConfigError if there is none."""
    for wire in source.wires:
        if wire in destination.wires:
            return wire
    if not isinstance(taken, Work) or taken.destination is None:
        raise RuntimeError("only a connection has two ends")
    raise ConfigError(
        f"{taken.name}: no format that a source of kind {taken.source.kind} offers is one that a "
        f"destination of kind {taken.destination.kind} takes; choose another destination"
    )


def warm(keyring: Keyring, *resources: SealedResource | None) -> None:
    """Unwrap the keys of all ends at once: the worker's cache has them when each is opened."""
    sealed = [item for found in resources if found is not None for item in _sealed(found)]
    keyring.unwrap_many([(item.wrapped, item.wrap) for item in sealed])


End = TypeVar("End", Source, Destination)


def _opened(resource: SealedResource, control: RunControl, connect: Callable[[], End]) -> End:
    """Connect; tell the operator, and nobody else, which rule forbade an address."""
    try:
        return control.opened(connect, lambda late: late.close())
    except EgressRefused as refused:
        logger.warning(
            "egress_refused",
            extra={
                "resource": resource.resource_id,
                "address": refused.address,
                "rule": refused.rule,
            },
        )
        raise


def unsealed(resource: SealedResource, keyring: Keyring, secrets: Holder) -> dict[str, str]:
    """Open all credentials of a resource. Keep the result no longer than the call it is for.

    From here on they are masked wherever this process writes something.
    """
    answers = unseal_credentials(keyring, _sealed(resource))
    if any(isinstance(answer, UnknownRoot) for answer in answers) and keyring.reload():
        answers = unseal_credentials(keyring, _sealed(resource))  # its root has just been brought
    if isinstance(keyring, KeyCache) and any(isinstance(a, UnsealError) for a in answers):
        keyring.flush()  # a KMS that answered wrong is asked again, not believed for minutes
    return {
        field.field: secrets.know(_plaintext(resource, field, answer))
        for field, answer in zip(resource.sealed, answers, strict=True)
    }


def _sealed(resource: SealedResource) -> list[Sealed]:
    account_id = resource.account_id
    return [
        Sealed(
            Wrapped(root_id=field.key.root_id, blob=field.key.wrapped),
            WrapContext(account_id=account_id, purpose="credentials", dek_id=field.key.dek_id),
            field.envelope,
            Context(
                account_id=account_id,
                kind="resource",
                resource_id=resource.resource_id,
                field=field.field,
                version=field.version,
            ),
        )
        for field in resource.sealed
    ]


def _plaintext(resource: SealedResource, field: SealedField, answer: bytes | CryptoError) -> str:
    if isinstance(answer, UnsealError) or not field.key.wrapped:  # empty: it was shredded
        DECRYPTS.labels("credentials", "refused").inc()
        raise ConfigError(
            f"resource {resource.name}: its {field.field} cannot be opened with this worker's "
            f"keyring; store it again with: syncward resource rotate {resource.name}",
            code="unsealable",
        )
    if isinstance(answer, CryptoError):  # its root is not here yet: the run waits for it
        raise answer
    DECRYPTS.labels("credentials", "opened").inc()
    return answer.decode()
