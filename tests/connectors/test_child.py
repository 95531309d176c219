"""Children that misbehave: each way ends in its own error, leaves nothing, and tells nothing."""

import json
import os
import re
import signal
import threading
import time
import traceback
from contextlib import closing, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from connectors import registry
from schemas.aid import Aid
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, CredentialsError, ReadAgain, SyncwardError, TransientError
from schemas.records import WireFormat
from schemas.redaction import REDACTOR
from schemas.streams import StreamSpec
from tests.children.installing import install, policy_of

LOGIN = "hunter2-canary-login"
TABLE = {
    "properties": {"id": {"type": "integer"}, "note": {"type": ["null", "string"]}},
    "key": ["id"], "cursors": ["id"],
}  # fmt: skip


class Fake:
    """One fake connector with one table, `t`, and what it said."""

    def __init__(self, root: Path, kind: str) -> None:
        self.kind = kind
        self.data = root / "data"
        self.data.mkdir()
        self.root = root / "connectors"
        self.connector = install(self.root, kind)
        self.package = self.connector.partition("==")[0]
        self.said: list[str] = []
        self.renewed: list[dict[str, str]] = []
        self.policy = policy_of(self.root)
        self.settings: dict[str, object] = {"directory": str(self.data)}
        (self.data / "t.json").write_text(json.dumps(TABLE))
        (self.data / "t.rows").write_text("".join(f'{n}\t\t{{"id":{n}}}\n' for n in range(1, 4)))

    def open(self, misbehave: str = "", **settings: object):
        config = {
            "connector": self.connector,
            "settings": {**self.settings, "misbehave": misbehave, **settings},
        }
        checked = registry.validate_config(self.kind, config, LinkPolicy())
        secrets = {"config": json.dumps({"login": LOGIN})}
        policy = LinkPolicy(children=self.policy)
        aid = Aid(secrets=self, say=self.said.append)
        return registry.open_source(self.kind, checked, secrets, policy, aid)

    def spec(self, mode: str = "merge", **more: object) -> StreamSpec:
        extra: dict[str, object] = {} if mode == "replace" else {"key": ("id",), "cursor": "state"}
        return StreamSpec(name=f"{self.package}.t", mode=mode, **{**extra, **more})

    def read(self, misbehave: str = "", *, mode="merge", cursor=None, settings=(), **more):
        """The rows of each batch and the cursor behind it, as a destination would take them."""
        with (
            closing(self.open(misbehave, **dict(settings))) as source,
            source.extract(self.spec(mode, **more), cursor, WireFormat.ROWS) as batches,
        ):
            return [([r for g in batch.groups for r in g.rows], batch) for batch in batches]

    # what a connector may ask for
    def renewed_secrets(self):
        return self.renewed

    def know(self):
        return REDACTOR.holder()


class Store(Fake):
    """It keeps secrets, too."""

    def __init__(self, root: Path, kind: str) -> None:
        super().__init__(root, kind)
        self.kept: list[dict[str, str]] = []

    def renewed(self, seen, exchange):  # type: ignore[no-redef]  # a protocol's name
        self.kept.append(dict(exchange(seen)))
        return {**seen, **self.kept[-1]}


@pytest.fixture
def tap(tmp_path):
    fake = Store(tmp_path, "singer")
    yield fake
    assert left_behind() == []


def left_behind() -> list[str]:
    """Processes and directories of children that are still there."""
    found = [str(path) for path in Path("/tmp").glob("syncward-child-*")]  # noqa: S108 - where they are
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"fake" in (line := path.read_bytes()) and b"tap-fake\0" in line:
                found.append(str(line))
    return found


def everything(error: BaseException) -> str:
    found = traceback.TracebackException.from_exception(error)
    return "\n".join([str(error), repr(error), *found.format()])


ENDINGS = {
    "garbage": (ConfigError, "connector_answer"),
    "no_object": (ConfigError, "connector_answer"),
    "giant_line": (ConfigError, "connector_limit"),
    "partial_last_line": (TransientError, "connector_incomplete"),
    "nothing": (TransientError, "connector_incomplete"),
    "exit_1_after_all_rows": (TransientError, "connector_failed"),
    "killed": (TransientError, "connector_failed"),
    "state_before_rows": (TransientError, "connector_incomplete"),
    "rows_after_state": (TransientError, "connector_incomplete"),
    "still_syncing": (TransientError, "connector_incomplete"),
    "type_changes": (TransientError, "connector_incomplete"),
    "without_key": (ConfigError, "data_refused"),
    "before_schema": (ConfigError, "connector_answer"),
    "wrong_type": (ConfigError, "data_refused"),
    "batch_files": (ConfigError, "connector_answer"),
    "secret_in_state": (ConfigError, "connector_answer"),
    "show_config": (ConfigError, "connector_answer"),
}


@pytest.mark.parametrize("misbehave", ENDINGS)
def test_each_misbehaviour_ends_in_its_own_error_and_tells_nothing(tap, misbehave):
    kind, code = ENDINGS[misbehave]
    with tap.know() as secrets:
        secrets.know(json.dumps({"login": LOGIN}))
        with pytest.raises(kind) as caught:
            tap.read(misbehave)
    assert caught.value.code == code
    told = everything(caught.value) + "\n".join(tap.said)
    assert LOGIN not in told
    assert "canary" not in everything(caught.value)


@pytest.mark.parametrize("misbehave", ["repeated_state", "noise", "clock_skew", "column_comes"])
def test_what_does_no_harm_is_borne(tap, misbehave):
    found = tap.read(misbehave)
    assert [row[0] for rows, _ in found for row in rows] == {
        "clock_skew": [1], "column_comes": [1, 2, 3, 4]
    }.get(misbehave, [1, 2, 3])  # fmt: skip
    last = found[-1][1]
    assert (last.more, last.upper["kind"]) == (False, "child")
    assert json.loads(last.upper["state"])["bookmarks"]["t"]["at"] > 0
