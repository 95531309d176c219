"""What a person is asked by an API: to let Syncward in (`resource authorize`)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

#: What a worker says of a login where the last consent was not taken, but one of before is there.
REFUSED = "the last authorisation was refused; the login of before is used"
#: The field that holds a consent until a worker has exchanged it.
FIELD = "authorization"
#: How an API names an error; anything else is not shown.
ERROR_NAME = re.compile(r"[a-z_]{1,40}")


@dataclass(frozen=True, slots=True)
class Consent:
    """Where a person is sent, and with what; the flow's own parameters are added to it."""

    endpoint: str
    parameters: Mapping[str, str]

    def url(self, *, redirect_uri: str, state: str, challenge: str) -> str:
        """Return what a browser opens: the code flow with PKCE, S256."""
        sent = {
            **self.parameters,
            "response_type": "code",
            "redirect_uri": redirect_uri,
            "state": state,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        sign = "&" if "?" in self.endpoint else "?"
        return f"{self.endpoint}{sign}{urlencode(sent)}"
