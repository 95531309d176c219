"""Identifiers: UUIDv7, made in Python, so that they sort by creation time."""

from uuid import UUID

from uuid_utils.compat import uuid7


def new_id() -> UUID:
    """Return a new time-ordered identifier (RFC 9562, version 7)."""
    return uuid7()
