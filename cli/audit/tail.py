"""`syncward audit tail`: the newest events, or a stream that another program follows."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import click
from sqlalchemy import Connection

from audit import ocsf
from cli.audit.group import audit
from cli.context import Cli, command
from cli.show import jsonable
from schemas.audit import AuditAction, AuditEvent, TargetKind
from schemas.errors import ConfigError, NotFound
from schemas.streams import parse_duration
from storage import audit as events
from storage import audit_names, audit_tail
from storage.audit_tail import Filters, StoredEvent

#: Between two looks of a follower.
POLL_S = 0.2
#: A follower's reading is an event itself: when it begins, and again after so long.
READ_AGAIN_S = 3600.0
#: Kinds that a principal given by its name alone may have.
_KINDS = ("operator", "scheduler", "worker", "sealer")

Names = Mapping[str, str]
Line = Callable[[StoredEvent], str]


@command(audit)
@click.option("-f", "--follow", is_flag=True, help="Go on until interrupted; sealed events only.")
@click.option("--after", type=click.IntRange(-1), metavar="INDEX",
              help="Sealed events after this index, in their order.")  # fmt: skip
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000),
              help="Of events, without -f.")  # fmt: skip
@click.option("--principal", metavar="P", help="Who did it: kind:name, or a name.")
@click.option("--action", multiple=True, type=click.Choice([a.value for a in AuditAction]),
              metavar="A", help="One action; may be repeated.")  # fmt: skip
@click.option("--target", metavar="ID|KIND", help="What it was done to.")
@click.option(
    "--since", metavar="T", help="A time (UTC unless it says otherwise), or how long ago: 2h."
)
@click.option("--until", metavar="T", help="Events before this time; not with -f.")
@click.option("--class", "class_", type=click.Choice(["A", "B"]), help="A: security. B: runs.")
@click.option("--format", "format_", type=click.Choice(["text", "jsonl", "ocsf"]),
              help="jsonl and ocsf: one JSON document a line.")  # fmt: skip
def tail(
    cli: Cli,
    *,
    follow: bool,
    after: int | None,
    limit: int,
    principal: str | None,
    action: tuple[str, ...],
    target: str | None,
    since: str | None,
    until: str | None,
    class_: str | None,
    format_: str | None,
) -> None:
    """Show the newest events, or those after an index. Reading them is an event itself."""
    if follow and until:
        raise click.UsageError("--until ends what -f follows; use one of them")
    with cli.auditing() as tx:
        names = audit_names.shown(tx)
        kind, id_ = _target(target)
        filters = Filters(
            account_id=_account(cli, tx),
            principals=_principals(principal, names),
            actions=action,
            target_kind=kind,
            target_id=id_,
            class_=class_,
            since=_moment(since),
            until=_moment(until),
        )
    reader = _Reader(cli, filters, _described(filters, after), _line(cli, format_, names))
    with _ending_quietly():
        if follow:
            reader.follow(after)
        elif format_ in {"jsonl", "ocsf"}:
            for event in reader.once(after, limit):
                click.echo(reader.line(event))
        else:
            found = reader.once(after, limit)
            cli.answer(
                [document(event, names) for event in found],
                lambda: "\n".join(reader.line(event) for event in found),
            )


@dataclass(slots=True)
class _Reader:
    """One reading, which says in the log that it reads."""

    cli: Cli
    filters: Filters
    described: str
    line: Line

    def once(self, after: int | None, limit: int) -> list[StoredEvent]:
        with self.cli.auditing() as tx:
            if after is None:
                found = audit_tail.newest(tx, self.filters, limit)
            else:
                found = list(self._from(tx, after + 1, limit))
            self._say(tx, len(found))
        return found

    def _from(self, tx: Connection, begin: int, limit: int) -> Iterator[StoredEvent]:
        more = True
        while more and limit > 0:
            page = audit_tail.following(tx, self.filters, begin=begin, limit=limit)
            self._missing(page, begin)
            yield from page.events
            begin, more, limit = page.end, page.more, limit - len(page.events)

    def follow(self, after: int | None) -> None:
        """Print what is sealed, each event once and in order, until somebody ends it."""
        with self.cli.auditing() as tx:
            sealing = audit_tail.sealing(tx)
            begin = sealing.size if after is None else after + 1
            self._say(tx, 0)
        if begin > sealing.size:
            raise ConfigError(
                f"audit: {sealing.size} events are sealed, none after index {after}; is this the "
                "log that you followed? Compare it with its anchors: syncward audit verify"
            )
        said_at, printed, warned = time.monotonic(), 0, False
        while True:
            with self.cli.auditing() as tx:
                page = audit_tail.following(tx, self.filters, begin=begin, limit=10_000)
                alive = warned or page.more or audit_tail.sealing(tx).alive
                if time.monotonic() >= said_at + READ_AGAIN_S:
                    self._say(tx, printed)
                    said_at, printed = time.monotonic(), 0
            if not alive:
                warned = True
                click.echo(
                    "syncward: no sealer seals; nothing new is shown until one does: "
                    "syncward sealer",
                    err=True,
                )
            self._missing(page, begin)
            for event in page.events:
                click.echo(self.line(event))
            sys.stdout.flush()
            begin, printed = page.end, printed + len(page.events)
            if not page.more:
                time.sleep(POLL_S)

    @staticmethod
    def _missing(page: audit_tail.Page, begin: int) -> None:
        if page.missing:
            click.echo(
                f"syncward: {page.missing} events from index {begin} to {page.end - 1} are not in "
                "the database: pruned, or removed; find out: syncward audit verify",
                err=True,
            )

    def _say(self, tx: Connection, count: int) -> None:
        events.append(
            tx,
            AuditEvent(
                AuditAction.AUDIT_READ,
                TargetKind.INSTANCE,
                events.INSTANCE_ID,
                self.cli.principal,
                account_id=self.filters.account_id,
                detail={"events": count, "filters": self.described},
            ),
        )


@contextmanager
def _ending_quietly() -> Iterator[None]:
    """End without a word when the reader of a pipe has gone, or somebody presses Ctrl-C."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # what is still buffered has no reader: the interpreter must not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return


# ── what was typed ───────────────────────────────────────────────────────────────────────────────


def _account(cli: Cli, tx: Connection) -> UUID | None:
    name = cli.account or cli.settings.account
    if name is None:
        return None
    found = audit_tail.account_id(tx, name)
    if found is None:
        try:
            found = UUID(name)  # one that was deleted has no name any more
        except ValueError:
            raise NotFound(f"account {name} does not exist; of a deleted one give the id") from None
    return found


def _principals(wanted: str | None, names: Names) -> tuple[str, ...]:
    if wanted is None:
        return ()
    exact = (wanted,) if ":" in wanted else tuple(f"{kind}:{wanted}" for kind in _KINDS)
    known = (id_ for id_, name in names.items() if wanted in {name, f"operator:{name}"})
    return (*exact, *known)


def _target(wanted: str | None) -> tuple[str | None, UUID | None]:
    if wanted is None:
        return None, None
    if wanted in set(TargetKind):
        return wanted, None
    try:
        return None, UUID(wanted)
    except ValueError:
        kinds = ", ".join(TargetKind)
        raise click.UsageError(f"--target: an id, or one of {kinds}") from None


def _moment(wanted: str | None) -> datetime | None:
    if wanted is None:
        return None
    try:
        found = datetime.fromisoformat(wanted)
    except ValueError:
        try:
            return datetime.now(UTC) - parse_duration(wanted)
        except (ValueError, OverflowError):
            raise click.UsageError(
                f"{wanted}: not a time; for example 2026-11-24, 2026-11-24T02:00:00Z, 30m, 7d"
            ) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _described(filters: Filters, after: int | None) -> str:
    """Say what was asked for, for the event of the reading."""
    said = {
        "after": after,
        "account": filters.account_id,
        "principal": " or ".join(filters.principals),
        "action": " ".join(filters.actions),
        "target": filters.target_kind or filters.target_id,
        "class": filters.class_,
        "since": filters.since and filters.since.isoformat(),
        "until": filters.until and filters.until.isoformat(),
    }
    return "; ".join(f"{key} {value}" for key, value in said.items() if value not in {None, ""})


# ── what is shown ────────────────────────────────────────────────────────────────────────────────


def _line(cli: Cli, format_: str | None, names: Names) -> Line:
    if format_ == "ocsf":
        return lambda event: one_line(ocsf.document(event, names))
    if format_ == "jsonl" or cli.json:
        return lambda event: one_line(document(event, names))
    return lambda event: line_of(event, names)


def document(event: StoredEvent, names: Names) -> dict[str, object]:
    """Return the keys of an event, as docs/siem.md has them."""
    found = jsonable(event)
    assert isinstance(found, dict)  # noqa: S101 - a dataclass becomes a dict
    found["class"] = found.pop("class_")
    body = found["body"] = audit_tail.said(event.body)
    found["principal_name"] = _name(str(body.get("principal", "")), names)
    return found


def one_line(document: Mapping[str, object]) -> str:
    """Return JSON in ASCII: no line separator and no control character is left in it."""
    return json.dumps(document, ensure_ascii=True, allow_nan=False).replace("\x7f", "\\u007f")


def line_of(event: StoredEvent, names: Names | None = None) -> str:
    """Show an event in one line of at most 80 columns, unless a name or a reason is long."""
    body = audit_tail.said(event.body)
    principal = _name(str(body.get("principal", "?")), names or {})
    outcome = "" if body.get("outcome", "success") == "success" else f" {body['outcome']}"
    reason = f" ({body['reason']})" if body.get("reason") else ""
    index = "-" if event.index is None else str(event.index)
    target = f"{event.target_kind} {str(event.target_id)[:8]}"
    return _printable(
        f"{index:>6} {event.at.astimezone(UTC):%m-%d %H:%M:%S} {event.class_} {event.action:<20} "
        f"{target} {principal}{outcome}{reason}"
    )


def _name(principal: str, names: Names) -> str:
    """Return `kind:name` with the name that belongs to an id."""
    kind, _, _ = principal.partition(":")
    return f"{kind}:{names[principal]}" if principal in names else principal


def _printable(text: str) -> str:
    """Return text that neither drives a terminal nor breaks a line."""
    return "".join(c if c.isprintable() else "?" for c in text)
