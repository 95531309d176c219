"""A source whose library waits for something and cannot be interrupted by anybody."""

import time
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from schemas.egress import LinkPolicy
from schemas.records import ServerReport


class HangingConfig(BaseModel):
    """Nothing to set."""

    model_config = ConfigDict(hide_input_in_errors=True)


CONFIG = HangingConfig
SECRET_FIELDS = ("token",)


def check_link(config: HangingConfig, policy: LinkPolicy) -> None:
    """Allow every link: there is none."""
    del config, policy


def open_source(
    config: Mapping[str, Any], secrets: Mapping[str, str], policy: LinkPolicy
) -> "HangingSource":
    """Connect to nothing."""
    del config, secrets, policy
    return HangingSource()


class HangingSource:
    """Hangs as soon as it is asked anything; neither `cancel` nor `cut` reach it."""

    def test(self) -> ServerReport:
        time.sleep(3_600)
        raise AssertionError

    def cancel(self) -> None:
        return

    def cut(self) -> None:
        return

    def close(self) -> None:
        return
