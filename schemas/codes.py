"""Every code that an ended attempt may carry: a closed set, because codes become metric labels."""

#: Codes of schemas/errors.py, of connectors and of outcomes. A code that is missing here counts as
#: `other`; tests/unit/test_metrics.py finds codes in the source that are missing.
ERROR_CODES = frozenset(
    {
        "cancelled",
        "cancelled_there",
        "config",
        "conflict",
        "control_restored",
        "credentials",
        "deadline",
        "disk_full",
        "draining",
        "error",
        "guard",
        "incomplete",
        "internal",
        "keyring",
        "lease_lost",
        "no_credentials",
        "not_found",
        "rows_missing",
        "selftest",
        "start_refused",
        "streams",
        "transient",
        "unknown_run",
        "unsealable",
    }
)

#: Codes of guards: a person must approve what they found.
GUARD_CODES = frozenset({"guard", "control_restored"})

#: What a value outside of its closed set counts as.
OTHER = "other"


def closed(value: str | None, known: frozenset[str]) -> str:
    """Return the value if it is one of the known, else `other`."""
    return value if value in known else OTHER
