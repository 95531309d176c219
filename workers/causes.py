"""What an exception says in its own words: read here and nowhere else.

Drivers quote rows, passwords and URLs. Their words go masked to the run's log, which is sealed, so
that a person can find out what happened; nobody else gets them. Values of variables are not read.
"""

from collections.abc import Iterator

from schemas.errors import SyncwardError

#: Exceptions of one chain that are quoted.
CAUSES_MAX = 8


def raw_texts(error: BaseException) -> Iterator[str]:
    """Yield type and text of what was raised by others, outermost first.

    What was raised `from None` hides its context on purpose.
    """
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting and len(seen) < CAUSES_MAX:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if not isinstance(one, SyncwardError):  # our own words are in the log already
            yield f"{type(one).__name__}: {_text(one)}\n"
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        under = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        if under is not None:
            waiting.append(under)


def _text(error: BaseException) -> str:
    try:
        return "\n".join([str(error), *getattr(error, "__notes__", ())])
    except Exception:  # noqa: BLE001 - an exception that cannot be shown must not hide the outcome
        return "(it cannot be shown)"
