"""Open the two ends of a run: unseal as late as possible, connect, make it cancellable."""

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

from connectors import registry
from connectors.egress import EgressRefused
from crypto.cache import KeyCache
from crypto.envelope import Context
from crypto.errors import CryptoError, UnknownRoot, UnsealError
from crypto.roots import Keyring, Sealed, WrapContext, Wrapped
from crypto.unseal import unseal_credentials
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, CredentialsError, SyncwardError
from schemas.records import Destination, Source, WireFormat
from schemas.redaction import Holder
from storage.work import SealedField, SealedResource, Work
from workers.aid import of_run
from workers.attempt import Attempt
from workers.control import RunControl, left_behind
from workers.metrics import DECRYPTS

logger = logging.getLogger(__name__)


@contextmanager
def open_source(resource: SealedResource, attempt: Attempt) -> Iterator[Source]:
    """Connect to a resource in the role of a source; closed at the end, cancelled by signals."""
    with naming(resource), _held(_begin_source(resource, attempt)) as source:
        yield source


@contextmanager
def open_destination(resource: SealedResource, attempt: Attempt) -> Iterator[Destination]:
    """Connect to a resource in the role of a destination; as `open_source`."""
    begun = _begin(registry.open_destination, resource, attempt)
    with naming(resource), _held(begun) as there:
        yield there


@contextmanager
def open_both(subject: Work, attempt: Attempt) -> Iterator[tuple[Source, Destination]]:
    """Connect to both ends of a connection at the same time; the source's errors come first."""
    if subject.destination is None:
        raise RuntimeError("only a connection has a destination")
    here = _begin_source(subject.source, attempt)
    there = _begin(registry.open_destination, subject.destination, attempt)
    with ExitStack() as stack:
        try:
            source = stack.enter_context(_held(here))
        except BaseException:
            left_behind(there.future, _close)
            raise
        yield source, stack.enter_context(_held(there))


End = TypeVar("End", Source, Destination)


@dataclass(frozen=True, slots=True)
class _Opening(Generic[End]):
    """An end that a thread is connecting to."""

    resource: SealedResource
    control: RunControl
    future: "Future[End]"


def _begin_source(resource: SealedResource, attempt: Attempt) -> _Opening[Source]:
    """Begin to connect to a source, which may ask for aid."""

    def unseal(newest: SealedResource) -> dict[str, str]:
        return unsealed(newest, attempt.deps.keyring, attempt.control.secrets)

    aid = of_run(attempt, resource, unseal)
    return _begin(partial(registry.open_source, aid=aid), resource, attempt)


def _begin(
    connect: Callable[[str, Mapping[str, Any], Mapping[str, str], LinkPolicy], End],
    resource: SealedResource,
    attempt: Attempt,
) -> _Opening[End]:
    """Begin to connect; the credentials are opened in the thread that uses them."""
    control, deps = attempt.control, attempt.deps
    opening = control.opening(
        lambda: connect(
            resource.kind,
            resource.config,
            unsealed(resource, deps.keyring, control.secrets),
            deps.policy.for_account(resource.account_id),
        )
    )
    return _Opening(resource, control, opening)


@contextmanager
def _held(opening: _Opening[End]) -> Iterator[End]:
    """Wait for an end and hold it; tell the operator, and nobody else, which rule forbade it."""
    try:
        with naming(opening.resource):
            end = opening.control.opened(opening.future, _close)
    except EgressRefused as refused:
        logger.warning(
            "egress_refused",
            extra={
                "resource": opening.resource.resource_id,
                "address": refused.address,
                "rule": refused.rule,
            },
        )
        raise
    try:
        opening.control.on_signal(end.cancel, end.cut)
        yield end
    finally:
        end.close()


@contextmanager
def naming(resource: SealedResource) -> Iterator[None]:
    """Complete the commands in an error of this resource: connectors do not know its name."""
    try:
        yield
    except SyncwardError as error:
        for command in ("rotate", "authorize", "test"):
            said = f"syncward resource {command} "
            error.public = error.public.replace(f"{said}NAME", f"{said}{resource.name}")
        raise


def _close(end: Source | Destination) -> None:
    end.close()


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


def unsealed(resource: SealedResource, keyring: Keyring, secrets: Holder) -> dict[str, str]:
    """Open all credentials of a resource. Keep the result no longer than the call it is for.

    From here on they are masked wherever this process writes something. What was stored for
    settings that led elsewhere is not opened; what workers renew is then as if it were not there.
    """
    resource = _aimed(resource)
    answers = unseal_credentials(keyring, _sealed(resource))
    if any(isinstance(answer, UnknownRoot) for answer in answers) and keyring.reload():
        answers = unseal_credentials(keyring, _sealed(resource))  # its root has just been brought
    if isinstance(keyring, KeyCache) and any(isinstance(a, UnsealError) for a in answers):
        keyring.flush()  # a KMS that answered wrong is asked again, not believed for minutes
    return {
        field.field: secrets.know(_plaintext(resource, field, answer))
        for field, answer in zip(resource.sealed, answers, strict=True)
    }


def _aimed(resource: SealedResource) -> SealedResource:
    """Return the resource without what is not for where it leads; CredentialsError if it needs it.

    Whoever may change a resource's settings, by whatever means, must not get its secrets by that.
    """
    if all(one.aim is None for one in resource.sealed):
        return resource
    aim = registry.aim_digest(resource.kind, resource.config)
    elsewhere = {one.field for one in resource.sealed if one.aim not in {None, aim}}
    if elsewhere - registry.renewed_fields(resource.kind):
        raise CredentialsError(
            f"resource {resource.name}: its settings lead elsewhere than when its secrets were "
            f"stored; store them again: syncward resource rotate {resource.name}"
        )
    kept = tuple(one for one in resource.sealed if one.field not in elsewhere)
    return replace(resource, sealed=kept)


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
