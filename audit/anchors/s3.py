"""An anchor in an S3-compatible store with Object Lock: nobody removes what is there in time."""

import configparser
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import md5
from pathlib import Path
from typing import Any
from uuid import UUID

import botocore.exceptions
import botocore.session
from botocore.config import Config

from audit.anchors.base import TIMEOUT_S, AnchorFailed
from audit.checkpoint import Checkpoint
from crypto.kms import private
from schemas.anchors import S3Anchor
from schemas.errors import ConfigError

#: Keys count downwards, so that a listing, which counts upwards, begins with the newest.
_EPOCH_TOP, _SIZE_TOP = 10**10 - 1, 10**19 - 1
_KEY = re.compile(r"(?:.*/)?\d{10}-\d{19}/(?P<epoch>\d+)-(?P<size>\d+)")
#: So many entries are listed at once, and so many lists are looked at for one of ours.
_LISTED = 100
_LISTS = 10
_NOTE_MAX = 64 * 1024
_CREDENTIALS_NEEDED = ("aws_access_key_id", "aws_secret_access_key")


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """Of the store; the usual chain of AWS's tools finds others where there are none."""

    key_id: str
    secret: str
    token: str | None


def read_credentials(path: Path) -> Credentials:
    """Read a file in the format of AWS's `credentials`; ConfigError says what is wrong with it."""
    content = private.read(path, "s3 credentials", "write one (docs/anchors.md)")
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(content.decode())
        found = dict(parser["default"])
    except (configparser.Error, UnicodeDecodeError, KeyError):
        found = {}
    if not all(found.get(name) for name in _CREDENTIALS_NEEDED):
        raise ConfigError(
            f"s3 credentials {path}: needs a section [default] with aws_access_key_id and "
            "aws_secret_access_key"
        )
    return Credentials(
        found["aws_access_key_id"], found["aws_secret_access_key"], found.get("aws_session_token")
    )


@dataclass(slots=True)
class S3:
    """One object for each checkpoint, never overwritten, kept for `retain_days`."""

    target: S3Anchor
    log_id: UUID
    #: Read at each new client, so that a rotated file is taken without a restart.
    credentials: Callable[[], Credentials | None] = field(repr=False)
    _client: Any = field(default=None, repr=False)
    _locks: bool = False  # whether the store was seen to keep what it was told to keep

    @property
    def readable(self) -> bool:
        return True

    def publish(self, signed_note: str, checkpoint: Checkpoint) -> None:
        """Put one object, if it is not there yet."""
        key, body = self._key(checkpoint), signed_note.encode()
        until = datetime.now(UTC) + timedelta(days=self.target.retain_days)
        with self._said() as client:
            try:
                client.put_object(
                    Bucket=self.target.bucket,
                    Key=key,
                    Body=body,
                    ContentType="text/plain; charset=utf-8",
                    ContentMD5=b64encode(md5(body, usedforsecurity=False).digest()).decode(),
                    IfNoneMatch="*",
                    ObjectLockMode=self.target.mode,
                    ObjectLockRetainUntilDate=until,
                )
            except botocore.exceptions.ClientError as error:
                if _code(error) not in {"PreconditionFailed", "412"}:
                    raise
                self._require_same(client, key, signed_note)
            if not self._locks:
                self._require_lock(client, key)

    def notes(self) -> Iterator[Sequence[str]]:
        """Yield notes, the newest first, also those hidden behind a delete marker since.

        The first version of an object is ours: we never write over another. What is not the
        checkpoint that its key names is nobody's note; the key stands for it.
        """
        after: dict[str, str] = {}
        for _ in range(_LISTS):
            with self._said() as client:
                answer = client.list_object_versions(
                    Bucket=self.target.bucket, Prefix=self._prefix, MaxKeys=_LISTED, **after
                )
            versions = answer.get("Versions", [])
            for key in dict.fromkeys(one["Key"] for one in versions):
                first = [one["VersionId"] for one in versions if one["Key"] == key][-1]
                note = ""
                if _KEY.fullmatch(key):
                    with self._said() as client:
                        note = self._read(client, key, first)
                yield [note if _is_of(key, note) else key]
            if not answer.get("IsTruncated"):
                return
            after = {
                "KeyMarker": answer["NextKeyMarker"],
                "VersionIdMarker": answer.get("NextVersionIdMarker", ""),
            }

    def close(self) -> None:
        """Close what the client keeps open."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    @property
    def _prefix(self) -> str:
        return f"{self.target.prefix}/{self.log_id}/".lstrip("/")

    def _key(self, checkpoint: Checkpoint) -> str:
        down = f"{_EPOCH_TOP - checkpoint.epoch:010d}-{_SIZE_TOP - checkpoint.size:019d}"
        return f"{self._prefix}{down}/{checkpoint.epoch}-{checkpoint.size}"

    def _read(self, client: Any, key: str, version: str | None = None) -> str:  # noqa: ANN401 - botocore has no types
        named = {"VersionId": version} if version not in {None, "null"} else {}
        with client.get_object(Bucket=self.target.bucket, Key=key, **named)["Body"] as body:
            return str(body.read(_NOTE_MAX).decode(errors="replace"))

    def _require_same(self, client: Any, key: str, signed_note: str) -> None:  # noqa: ANN401 - as above
        if self._read(client, key) != signed_note:
            raise AnchorFailed(f"s3 {self.target.bucket}: another note is there already: {key}")

    def _require_lock(self, client: Any, key: str) -> None:  # noqa: ANN401 - as above
        """Refuse a store that says yes to Object Lock and keeps nothing."""
        head = client.head_object(Bucket=self.target.bucket, Key=key)
        until = head.get("ObjectLockRetainUntilDate")
        if head.get("ObjectLockMode") != self.target.mode or until is None:
            raise AnchorFailed(
                f"s3 {self.target.bucket}: it does not lock objects; make the bucket with Object "
                "Lock"
            )
        self._locks = True

    @contextmanager
    def _said(self) -> Iterator[Any]:
        """Give the client, and say failures in our words: theirs may quote keys."""
        try:
            if self._client is None:
                self._client = self._connect()
            yield self._client
        except botocore.exceptions.ClientError as error:
            self.close()  # with credentials that have changed the next one may be let in
            raise AnchorFailed(f"s3 {self.target.bucket}: refused with {_code(error)}") from None
        except (botocore.exceptions.BotoCoreError, OSError) as error:
            self.close()
            raise AnchorFailed(f"s3 {self.target.bucket}: {type(error).__name__}") from None

    def _connect(self) -> Any:  # noqa: ANN401 - as above
        found = self.credentials()
        given = (
            {"aws_access_key_id": found.key_id, "aws_secret_access_key": found.secret,
             "aws_session_token": found.token}
            if found else {}
        )  # fmt: skip
        return botocore.session.Session().create_client(
            "s3",
            region_name=self.target.region,
            endpoint_url=self.target.endpoint,
            verify=str(self.target.ca) if self.target.ca else True,
            config=Config(
                connect_timeout=TIMEOUT_S / 2,
                read_timeout=TIMEOUT_S,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                proxies={},
            ),
            **given,
        )


def _code(error: Any) -> str:  # noqa: ANN401 - as above
    """Return the store's code, never its text."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code if re.fullmatch(r"\w{1,60}", code) else "an unknown code"


def _is_of(key: str, note: str) -> bool:
    """Say whether a note is the checkpoint that its key names."""
    named = _KEY.fullmatch(key)
    try:
        found = Checkpoint.parse(note.rpartition("\n\n")[0] + "\n")
    except ValueError:
        return False
    return named is not None and (found.epoch, found.size) == (
        int(named["epoch"]), int(named["size"]),
    )  # fmt: skip
