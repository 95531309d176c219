"""A Singer tap as a source: another's program, which runs as a child of the worker."""

from collections.abc import Mapping
from typing import Any

from connectors.child.config import SECRET, ChildConfig
from connectors.child.singer import Singer
from connectors.child.source import ChildSource
from schemas.aid import UNAIDED, Aid
from schemas.egress import LinkPolicy

CONFIG = ChildConfig
SECRET_FIELDS = (SECRET,)
#: A tap that reads files may need none.
SECRETS_OPTIONAL = True
#: It may ask the process that runs it (schemas/aid.py).
AIDED = True
__all__ = ["AIDED", "CONFIG", "SECRETS_OPTIONAL", "SECRET_FIELDS", "check_link", "open_source"]


def check_link(config: ChildConfig, policy: LinkPolicy) -> None:
    """Accept it: where a child connects is its own affair, and workers say whether it may run."""


def open_source(
    config: Mapping[str, Any],
    secrets: Mapping[str, str],
    policy: LinkPolicy,
    aid: Aid = UNAIDED,
) -> ChildSource:
    """Look at what is installed; the tap is started when something is read."""
    return ChildSource(Singer(), ChildConfig.model_validate(dict(config)), secrets, policy, aid)
