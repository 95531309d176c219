"""What `syncward doctor` checks, as data: an area gathers facts once, its checks look at them.

A later part of the system adds an `Area` here; docs/operations.md lists every check (tested).
"""

from typing import Any

from cli.checks.audit import AUDIT
from cli.checks.base import Area, Check
from cli.checks.crypto import CRYPTO
from cli.checks.database import DATABASE
from cli.checks.disk import DISK
from cli.checks.redis import REDIS
from cli.checks.schedule import SCHEDULE
from cli.checks.tls import TLS

__all__ = ["AREAS", "Area", "Check"]

#: In the order in which they are looked at.
AREAS: dict[str, Area[Any]] = {
    area.name: area for area in (DATABASE, REDIS, SCHEDULE, AUDIT, CRYPTO, TLS, DISK)
}
