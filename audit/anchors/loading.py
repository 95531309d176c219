"""From SYNCWARD_AUDIT_ANCHORS to anchors; what only the file system can tell is asked here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from audit.anchors.base import Anchor
from audit.anchors.file import File
from audit.anchors.syslog_tls import Syslog
from schemas import anchors
from schemas.anchors import AnchorUri, FileAnchor, S3Anchor, SyslogAnchor
from schemas.errors import StartRefused
from schemas.settings import Settings

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Opening:
    """Makes the anchors of a log; nothing is connected yet."""

    uris: tuple[AnchorUri, ...]
    credentials_file: Path | None

    def of(self, log_id: UUID) -> tuple[Anchor, ...]:
        """Return the anchors in the order of the setting."""
        return tuple(self._one(uri, log_id) for uri in self.uris)

    def _one(self, uri: AnchorUri, log_id: UUID) -> Anchor:
        match uri:
            case FileAnchor():
                return File(uri.path)
            case SyslogAnchor():
                return Syslog(uri)
            case S3Anchor():
                from audit.anchors import s3  # noqa: PLC0415 - takes half a second, and few need it

                return s3.S3(uri, log_id, self._credentials(s3.read_credentials))

    def _credentials(self, read: Callable[[Path], C]) -> Callable[[], C | None]:
        path = self.credentials_file
        return lambda: None if path is None else read(path)


def load(settings: Settings) -> Opening:
    """Return what the setting names; StartRefused with every reason against it.

    What the setting alone can tell is refused before, by schemas.profiles.
    """
    uris = anchors.parse(settings.audit_anchors or "").anchors
    opening = Opening(uris, settings.audit_s3_credentials_file)
    reasons = _misplaced(settings, uris) if settings.profile == "production" else []
    if any(isinstance(uri, S3Anchor) for uri in uris) and opening.credentials_file:
        from audit.anchors import s3  # noqa: PLC0415 - as above

        s3.read_credentials(opening.credentials_file)
    if reasons:
        raise StartRefused([f"SYNCWARD_AUDIT_ANCHORS: {why}" for why in reasons])
    return opening


def _misplaced(settings: Settings, uris: tuple[AnchorUri, ...]) -> list[str]:
    """Say which files would be lost, or rewritten, with what they are to protect."""
    found: list[str] = []
    devices: dict[int, int] = {}
    for number, uri in enumerate(uris, 1):
        if not isinstance(uri, FileAnchor):
            continue
        directory = uri.path.parent.resolve()
        if directory.is_relative_to(settings.data_dir.resolve()):
            found.append(
                f"anchor {number} is in the data directory; put it on another host's mount"
            )
        elif above := next((d for d in (directory, *directory.parents) if _is_cluster(d)), None):
            found.append(
                f"anchor {number} is in the data directory of a database ({above}), whose "
                "administrator could rewrite both; put it on another host's mount"
            )
        if not directory.is_dir():
            continue  # not mounted now: published when it is
        first = devices.setdefault(directory.stat().st_dev, number)
        if first != number:
            found.append(
                f"anchors {first} and {number} are on the same file system; whoever has it has "
                "both. Put one elsewhere"
            )
    return found


def _is_cluster(directory: Path) -> bool:
    return (directory / "PG_VERSION").exists()
