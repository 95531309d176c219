"""Values of metric labels come from closed sets: whatever is new to a set counts as `other`."""

from collections.abc import Set as AbstractSet

OTHER = "other"


def closed(value: str | None, known: AbstractSet[str]) -> str:
    """Return the value if it is one of the known, else `other`."""
    return value if value is not None and value in known else OTHER
