"""`syncward audit verify`: is the log what was sealed? Live, of an export, or of one proof."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import click

from cli.audit.group import audit
from cli.context import Cli, command
from cli.show import plain
from schemas.errors import ConfigError, SyncwardError

if TYPE_CHECKING:  # `--help` must not wait for SQLAlchemy and cryptography
    from audit.findings import Report
    from crypto.signing import PublicKey

_FILE = click.Path(path_type=Path)


@command(audit)
@click.option("--pubkey", type=_FILE, help="Public keys that are trusted, one a line.")
@click.option("--anchor", "anchors", type=_FILE, multiple=True, metavar="FILE",
              help="A copy of an anchor; again for more.")  # fmt: skip
@click.option("--export", "exported", type=_FILE, metavar="DIR",
              help="An export instead of the live log: no database, no settings.")  # fmt: skip
@click.option("--proof", type=_FILE, metavar="FILE", help="One proof of `audit prove`.")
@click.option("--from", "start", type=click.IntRange(0, 2**63 - 1), default=0, metavar="INDEX",
              help="Only events from the checkpoint before INDEX on.")  # fmt: skip
def verify(
    cli: Cli,
    *,
    pubkey: Path | None,
    anchors: tuple[Path, ...],
    exported: Path | None,
    proof: Path | None,
    start: int,
) -> None:
    """Recompute the log. Exit 0 intact, 10 tampered, 11 incomplete, 12 cannot verify."""
    if exported is not None and proof is not None:
        raise click.UsageError("--export and --proof are two different things")
    offline = exported is not None or proof is not None
    if offline and pubkey is None:
        raise click.UsageError("--export and --proof need --pubkey: a key that came another way")
    keys, problem = _keys(cli, pubkey)
    if problem is not None:
        report = _unverifiable(problem)
    elif proof is not None:
        from audit.proof import check  # noqa: PLC0415 - `--help` must not wait for it

        report = check(proof, keys)
    elif exported is not None:
        report = _exported(exported, keys, anchors, start)
    else:
        own, notes = ([], []) if anchors else _own_anchors(cli)
        report = _live(cli, keys, anchors or own, start)
        for note in notes:
            report.note(note, always=True)
    cli.answer(_document(report), lambda: _text(report))
    if report.exit_code:
        sys.exit(report.exit_code)


def _keys(cli: Cli, pubkey: Path | None) -> tuple[list["PublicKey"], str | None]:
    """Return the trusted keys, or why there are none."""
    from crypto.signing import read_public  # noqa: PLC0415 - as above

    path = pubkey or cli.settings.audit_public_key
    if path is None:
        return [], (
            "no public key: give --pubkey FILE or set SYNCWARD_AUDIT_PUBLIC_KEY (the sealer's "
            "host shows it: syncward audit key show)"
        )
    try:
        return read_public(path), None
    except ConfigError as error:
        return [], error.public


def _unverifiable(why: str) -> "Report":
    from audit.findings import Level, Report  # noqa: PLC0415 - as above

    report = Report()
    report.add(Level.UNVERIFIABLE, why)
    return report


def _own_anchors(cli: Cli) -> tuple[list[Path], list[str]]:
    """Return the anchors of the settings that are files here, and what to do about the others."""
    found, notes = [], []
    for number, word in enumerate((cli.settings.audit_anchors or "").split(), 1):
        url = urlsplit(word)
        path = Path(unquote(url.path))
        where = f"anchor {number} ({url.scheme}://{url.netloc.rpartition('@')[2]}{url.path})"
        if url.scheme != "file":
            notes.append(
                f"{where} was not compared: copy what it holds to a file, and give it with --anchor"
            )
        elif not path.is_file():
            notes.append(
                f"{where} was not compared: no file that can be read is there (is it mounted?); "
                "mount it, or give a copy with --anchor"
            )
        else:
            found.append(path)
    return found, notes


def _exported(
    directory: Path, keys: Sequence["PublicKey"], anchors: Sequence[Path], start: int
) -> "Report":
    from audit.exported import ExportEvidence  # noqa: PLC0415 - as above
    from audit.verify import Verifier  # noqa: PLC0415 - as above

    with _bar() as progress, ExportEvidence.open(directory) as evidence:
        return Verifier(evidence, keys, anchors=anchors, start=start, progress=progress).run()


def _live(cli: Cli, keys: Sequence["PublicKey"], anchors: Sequence[Path], start: int) -> "Report":
    from audit.live import LiveEvidence  # noqa: PLC0415 - as above
    from audit.verify import Verifier  # noqa: PLC0415 - as above
    from storage.audit_log import snapshot  # noqa: PLC0415 - as above

    with _bar() as progress, snapshot(cli.audit_engine) as tx:
        evidence = LiveEvidence(tx)
        report = Verifier(evidence, keys, anchors=anchors, start=start, progress=progress).run()
    try:
        _record(cli, report)
    except SyncwardError as error:  # a read-only standby, or a log that takes no events
        report.note(f"this verification could not be recorded: {error.public}")
    return report


def _record(cli: Cli, report: "Report") -> None:
    """Leave an event of this verification."""
    from schemas.audit import AuditAction, AuditEvent, TargetKind  # noqa: PLC0415 - as above
    from storage import audit as events  # noqa: PLC0415 - as above

    with cli.auditing() as tx:
        events.append(
            tx,
            AuditEvent(
                AuditAction.AUDIT_VERIFIED,
                TargetKind.INSTANCE,
                events.INSTANCE_ID,
                cli.principal,
                detail={
                    "size": report.size,
                    "result": report.result,
                    "first_bad": report.first_bad,
                },
            ),
        )


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """Show a bar where somebody looks."""
    if not sys.stderr.isatty():
        yield lambda _done, _of: None
        return
    from cli.progress import counting  # noqa: PLC0415 - as above

    with counting() as show:
        yield lambda done, total: show("verify", done, total)


def _document(report: "Report") -> dict[str, object]:
    return {
        "result": report.result,
        "first_bad": report.first_bad,
        "log_id": report.log_id,
        "size": report.size,
        "events": report.events,
        "checkpoints": report.checkpoints,
        "anchored": report.anchored,
        "keys": report.keys,
        "counts": {level.name.lower(): count for level, count in report.counts.items()},
        "findings": [
            {
                "level": finding.level.name.lower(),
                "index": finding.index,
                "end": finding.end,
                "text": finding.text,
            }
            for finding in report.findings
        ],
    }


def _text(report: "Report") -> str:
    summary = (
        f"{report.result}: {report.size} events, {report.events} recomputed; "
        f"{report.checkpoints} checkpoints signed by a trusted key, {report.anchored} agree with "
        "an anchor"
    )
    return "\n".join([*map(plain, report.lines), summary])
