"""Read the settings from the environment: only where a process starts (import contract)."""

from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pydantic import SecretStr, ValidationError

from schemas.errors import StartRefused
from schemas.profiles import Process, all_reasons
from schemas.redaction import REDACTOR
from schemas.settings import DEV_ENV_FILE, Settings

#: Which servers are used. `dev.env` chooses `development` for its own servers, not for others.
_SERVERS = {"database_url", "redis_url"}


def load_settings(data_dir: Path | None = None, *, process: Process | None = None) -> Settings:
    """Read the environment and, where it is silent, the data directory's `dev.env`.

    Raise StartRefused with all unusable values (values themselves are never quoted) and, for a
    process, with everything else that can be said without them.
    """
    try:
        settings = _read(data_dir, {})
    except ValidationError as error:
        wrong = {
            str(e["loc"][0]): e["msg"] for e in error.errors(include_input=False, include_url=False)
        }
    else:
        for url in (settings.database_url, settings.keystore_url, settings.redis_url):
            _know(url)
        return settings
    reasons = [
        f"SYNCWARD_{name.upper()}: {why}; see docs/settings.md" for name, why in wrong.items()
    ]
    if process is not None:
        usable = _read(data_dir, {n: Settings.model_fields[n].get_default() for n in wrong})
        said = tuple(f"SYNCWARD_{name.upper()}" for name in wrong)
        reasons += [r for r in all_reasons(usable, process) if not r.startswith(said)]
    raise StartRefused(reasons)


def _read(data_dir: Path | None, instead: dict[str, Any]) -> Settings:
    """Read both, with these values in the place of what either says."""
    first = Settings(**instead)
    settings = Settings(_env_file=(data_dir or first.data_dir) / DEV_ENV_FILE, **instead)
    from_file = settings.model_fields_set - first.model_fields_set
    if "profile" in from_file and _SERVERS & first.model_fields_set:
        settings = settings.model_copy(update={"profile": "production"})
    return settings.of_dev_env() if _SERVERS & from_file else settings


def _know(url: SecretStr | None) -> None:
    """Mask a URL's password for as long as the process lives."""
    if url is None:
        return
    login = url.get_secret_value().partition("://")[2].rpartition("@")[0]
    password = login.partition(":")[2]
    REDACTOR.know(password)
    REDACTOR.know(unquote(password))
