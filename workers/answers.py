"""Runs that answer a question about one resource: test and discover."""

from crypto.keyring import Keyring
from schemas.egress import LinkPolicy
from schemas.records import ServerReport
from schemas.runs import Outcome, OutcomeKind
from storage.work import Work
from workers.control import RunControl
from workers.ends import open_destination, open_source


def test(subject: Work, keyring: Keyring, control: RunControl, policy: LinkPolicy) -> Outcome:
    """Connect in both roles and report version, TLS and what is missing for each."""
    with open_source(subject.source, keyring, control, policy) as source:
        as_source: ServerReport = source.test()
    with open_destination(subject.source, keyring, control, policy) as destination:
        as_destination: ServerReport = destination.test()
    return Outcome(
        OutcomeKind.SUCCEEDED,
        document={
            "server_version": as_source.server_version,
            "tls": as_source.tls,
            "login": as_source.login,
            "missing_as_source": list(as_source.missing),
            "missing_as_destination": list(as_destination.missing),
        },
    )


def discover(subject: Work, keyring: Keyring, control: RunControl, policy: LinkPolicy) -> Outcome:
    """List the streams that the resource's login can read."""
    with open_source(subject.source, keyring, control, policy) as source:
        streams = [stream.model_dump() for stream in source.discover()]
    return Outcome(OutcomeKind.SUCCEEDED, document={"streams": streams})
