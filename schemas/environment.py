"""Read the settings from the environment: only where a process starts (import contract)."""

from pathlib import Path
from urllib.parse import unquote

from pydantic import SecretStr, ValidationError

from schemas.errors import StartRefused
from schemas.redaction import REDACTOR
from schemas.settings import DEV_ENV_FILE, Settings


def load_settings(data_dir: Path | None = None) -> Settings:
    """Read the environment and, where it is silent, the data directory's `dev.env`.

    Raise StartRefused with all unusable values; values themselves are never quoted.
    """
    try:
        first = Settings()
        directory = data_dir or first.data_dir
        settings = Settings(_env_file=directory / DEV_ENV_FILE)
    except ValidationError as error:
        reasons = [
            f"SYNCWARD_{str(e['loc'][0]).upper()}: {e['msg']}; see docs/settings.md"
            for e in error.errors(include_input=False, include_url=False)
        ]
        raise StartRefused(reasons) from None
    for url in (settings.database_url, settings.redis_url):
        _know(url)
    return settings


def _know(url: SecretStr | None) -> None:
    """Mask a URL's password for as long as the process lives."""
    if url is None:
        return
    login = url.get_secret_value().partition("://")[2].rpartition("@")[0]
    password = login.partition(":")[2]
    REDACTOR.know(password)
    REDACTOR.know(unquote(password))
