"""What the control database says against the start of a process: all of it at once."""

import logging
from collections.abc import Callable

from sqlalchemy import Engine

from schemas.settings import Settings
from schemas.start import Reasons
from storage import logins, revision
from storage.engine import Process

logger = logging.getLogger(__name__)


def ask(
    engine: Engine,
    settings: Settings,
    process: Process,
    *,
    keystore: Engine | None = None,
    also: Callable[[], None] | None = None,
) -> None:
    """Refuse to start on an older schema or, in production, with a login that may do too much.

    `keystore` is a keystore apart: its login is looked at, too. `also` is asked where the schema is
    right. A database that is away is waited for by everything that needs it, and is no reason.
    """
    reasons, there, right = Reasons(), True, False
    with reasons.collecting():
        there = revision.require(engine)
        right = there
    if there and settings.profile == "production":
        with reasons.collecting():
            logins.require(engine, process)
    if keystore is not None and settings.profile == "production":
        with reasons.collecting():
            logins.require(keystore, process)
    if right and also is not None:
        with reasons.collecting():
            also()
    reasons.refuse_if_any()
    if not there:
        logger.warning("schema_not_checked", extra={"reason": "the control database is away"})
