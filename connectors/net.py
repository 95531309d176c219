"""Addresses: the one place through which every host name of an operator passes."""

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator

from schemas.errors import ConfigError

_HOST = re.compile(r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")


def validate_host(host: str) -> str:
    """Return the host in lower case; ConfigError unless it is one plain name or one address.

    libpq takes more for a host: a path is a socket directory, a comma a list, both a way around
    whatever was checked.
    """
    folded = host.strip().lower()
    try:
        return str(ipaddress.ip_address(folded))
    except ValueError:
        pass
    if not _HOST.match(folded):
        raise ConfigError("host: write one host name or one IP address, without port, path or list")
    return folded


#: A setting of resources that pydantic checks.
Host = Annotated[str, AfterValidator(validate_host)]
