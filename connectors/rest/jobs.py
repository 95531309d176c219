"""Records that an API prepares first: a job is made, asked about, and its results are read."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from time import monotonic

from connectors.rest import csv_records
from connectors.rest import text as rest_text
from connectors.rest.asking import Asker
from connectors.rest.manifest import Stream
from connectors.rest.pages import Ask
from connectors.rest.requests import AsyncRetriever
from connectors.rest.turning import Page, Read, asked, path_of, turned
from schemas.errors import ConfigError, SyncwardError, TransientError

#: Seconds before the second question; more each time, up to the manifest's interval.
_FIRST_POLL_S = 0.2


def records(asker: Asker, stream: Stream, how: AsyncRetriever, read: Read) -> Iterator[Page]:
    """Yield the pages of a job's results; the job is removed when they are all read."""
    made = _document(asker, read, read.more(asked(asker, read)))  # a window is of the job
    names = {**read.names, "creation_response": _plain(made)}
    read = replace(read, names=names, more=lambda ask: ask)
    _wait(asker, how, read, made)
    requester = how.download_requester
    split = partial(csv_records.parts, fields=stream.fields)
    csv = split if requester.decoder == "CsvDecoder" else None
    yield from turned(asker, replace(read, requester=requester, csv=csv))
    if how.delete_requester is not None:
        with suppress(SyncwardError):  # it ends by itself over there, only later
            _document(asker, read, _about(asker, read, how.delete_requester.path, "DELETE"))


def _plain(made: object) -> dict[str, str | int]:
    """Return the members of the answer that made a job which a request can be asked with."""
    members = made.items() if isinstance(made, dict) else ()
    return {n: v for n, v in members if isinstance(v, str | int) and not isinstance(v, bool)}


def _wait(asker: Asker, how: AsyncRetriever, read: Read, made: object) -> None:
    """Ask about the job until it is done."""
    until = monotonic() + how.polling_job_timeout.total_seconds()
    pause, most = _FIRST_POLL_S, max(how.polling_interval.total_seconds(), _FIRST_POLL_S)
    ask = _about(asker, read, how.polling_requester.path, "GET")
    document = made
    while not _is_done(read.where, how, document):
        if monotonic() > until:
            raise TransientError(
                f"{read.where}: its job was not done in time; a new one is made later",
                code="api_unavailable",
            )
        asker.rest(min(pause, most))
        pause *= 2
        document = _document(asker, read, ask)


def _about(asker: Asker, read: Read, path: str, method: str) -> Ask:
    headers = {name: rest_text.filled(text, read.names) for name, text in read.headers.items()}
    return Ask(method, asker.base + path_of(read.where, path, read.names), path, {}, headers)


def _document(asker: Asker, read: Read, ask: Ask) -> object:
    answered = asker.ask(read.where, ask, read.handler)
    return None if answered is None else answered[1]


def _is_done(where: str, how: AsyncRetriever, document: object) -> bool:
    status = rest_text.found(document, how.status_extractor)
    mapping = how.status_mapping
    if status in mapping.completed:
        return True
    if status in mapping.running:
        return False
    if status in mapping.failed:
        raise TransientError(
            f"{where}: its job failed there; a new one is made later", code="api_unavailable"
        )
    raise ConfigError(
        f"{where}: a job has a status that status_mapping does not have; correct retriever",
        code="api_answer",
    )
