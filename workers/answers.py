"""Runs that answer a question about one resource: test and discover."""

from connectors import registry
from schemas.records import ServerReport
from schemas.runs import Outcome, OutcomeKind
from storage.work import Work
from workers.attempt import Attempt
from workers.ends import open_destination, open_source


def test(subject: Work, attempt: Attempt) -> Outcome:
    """Connect in each role that the connector has; report the system and what is missing."""
    kind = subject.source.kind
    reports: dict[str, ServerReport] = {}
    if kind in registry.sources():
        with open_source(subject.source, attempt) as source:
            reports["source"] = source.test()
    if kind in registry.destinations():
        with open_destination(subject.source, attempt) as destination:
            reports["destination"] = destination.test()
    first = next(iter(reports.values()))
    return Outcome(
        OutcomeKind.SUCCEEDED,
        document={
            "server_version": first.server_version,
            "tls": first.tls,
            "login": first.login,
            **{f"missing_as_{role}": list(report.missing) for role, report in reports.items()},
        },
    )


def discover(subject: Work, attempt: Attempt) -> Outcome:
    """List the streams that the resource's login can read."""
    with open_source(subject.source, attempt) as source:
        streams = [stream.model_dump() for stream in source.discover()]
    return Outcome(OutcomeKind.SUCCEEDED, document={"streams": streams})
