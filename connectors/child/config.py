"""What a child is configured with: a resource's clear settings, and over them its secret ones."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from connectors.child import hosts as child_hosts
from connectors.child import installed as child_installed
from connectors.rest import exact_json
from schemas.errors import CredentialsError
from schemas.secret import SHORTEST_KNOWN, looks_secret, texts_in

#: A JSON object: the settings that nobody may read.
SECRET = "config"  # noqa: S105 - a name
_SETTINGS_MAX = 2**18
_DEPTH_MAX = 20
_HOSTS_MAX = 100


class ChildConfig(BaseModel):
    """Clear settings of a resource that somebody else's connector reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    connector: str
    executable: str = ""
    settings: dict[str, Any] = {}
    raw: bool = True
    hosts: tuple[str, ...] = ()  # what it may reach

    @model_serializer(mode="wrap")
    def _without_no_hosts(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a list that nobody wrote: where secrets are aimed is all of this."""
        found: dict[str, Any] = written(self)
        if not self.hosts:
            del found["hosts"]
        return found

    @field_validator("hosts", mode="before")
    @classmethod
    def _a_list(cls, value: object) -> object:
        """Take what `--set hosts=a,b` gives, too."""
        return [one.strip() for one in value.split(",")] if isinstance(value, str) else value

    @field_validator("hosts")
    @classmethod
    def _as_listed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) > _HOSTS_MAX:
            raise ValueError(f"are more than {_HOSTS_MAX}")
        return tuple(child_hosts.listed(one).shown for one in value)

    @field_validator("connector")
    @classmethod
    def _one_version(cls, value: str) -> str:
        child_installed.requirement(value)
        return value

    @field_validator("executable")
    @classmethod
    def _a_name(cls, value: str) -> str:
        return child_installed.executable_name(value) if value else value

    @field_validator("settings", mode="before")
    @classmethod
    def _of_the_command_line(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("settings")
    @classmethod
    def _clear(cls, value: dict[str, Any]) -> dict[str, Any]:
        if len(json.dumps(value)) > _SETTINGS_MAX:
            raise ValueError("are larger than 256 KiB")
        named = _secret_name(value, 0)
        if named is not None:
            raise ValueError(
                f"{named} is a secret; put it into the resource's secret `{SECRET}`, a JSON object "
                "that is merged over settings"
            )
        return value


def _secret_name(value: object, depth: int) -> str | None:
    """Return the first name that is one of a secret and has a text, or a list of some."""
    if depth > _DEPTH_MAX:
        raise ValueError(f"are nested more than {_DEPTH_MAX} levels deep")
    if isinstance(value, list):
        return next((n for one in value if (n := _secret_name(one, depth + 1))), None)
    if not isinstance(value, dict):
        return None
    for name, one in value.items():
        texts = one if isinstance(one, list) else [one]
        if looks_secret(name) and any(isinstance(text, str) and text for text in texts):
            return str(name)
        found = _secret_name(one, depth + 1)
        if found is not None:
            return found
    return None


class Settings:
    """The whole config of a child, and what of it is secret."""

    def __init__(self, config: ChildConfig, secrets: Mapping[str, str]) -> None:
        self.clear = config.settings
        self.secrets = dict(secrets)
        self._secret = _read(secrets.get(SECRET), config.connector)

    @property
    def merged(self) -> dict[str, Any]:
        """The config as the child gets it."""
        return merged(self.clear, self._secret)

    def document(self) -> bytes:
        """Return it as the child reads it."""
        return exact_json.write(self.merged).encode()

    def shows_a_secret(self, text: str) -> bool:
        """Say whether a text that is to be stored in clear holds one of the secrets."""
        return any(
            secret in text or json.dumps(secret)[1:-1] in text
            for secret in texts_in(self.secrets.get(SECRET, ""))
            if len(secret) >= SHORTEST_KNOWN
        )

    def renewed(self, config: Mapping[str, Any]) -> str | None:
        """Return the secret settings as a child has changed them; None if it did not.

        What it changed is secret from now on, whatever it was before.
        """
        before = self.merged
        changed = {name: value for name, value in config.items() if before.get(name) != value}
        if not changed:
            return None
        return exact_json.write({**self._secret, **changed})

    def take(self, secrets: Mapping[str, str], connector: str) -> None:
        """Go on with secrets that are stored by now."""
        self.secrets = dict(secrets)
        self._secret = _read(secrets.get(SECRET), connector)


def _read(text: str | None, connector: str) -> dict[str, Any]:
    """Read the secret settings; CredentialsError that quotes nothing."""
    found: object = {}
    if text is not None:
        try:
            found = exact_json.parse(text.encode())
        except exact_json.NoJson:
            found = None
    if not isinstance(found, dict):
        raise CredentialsError(
            f"{connector}: its secret `{SECRET}` is no JSON object; store one again with: "
            "syncward resource rotate"
        )
    return found


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return one object with the values of both; `over` counts where both have one."""
    found = dict(under)
    for name, value in over.items():
        before = found.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            found[name] = merged(before, value)
        else:
            found[name] = value
    return found
