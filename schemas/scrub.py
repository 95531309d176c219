"""Remove what libraries would follow behind the settings' back from a process's environment."""

import os

#: libpq's variables would redirect connections (PGHOSTADDR) or change sessions (PGOPTIONS), the
#: others traffic.
_SCRUBBED = ("PG", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


def scrub() -> None:
    """Forget these variables, before anything that would read them is opened."""
    for name in list(os.environ):  # noqa: TID251 - scrubbing the environment is the purpose here
        if name.upper().startswith(_SCRUBBED):
            del os.environ[name]  # noqa: TID251 - as above
