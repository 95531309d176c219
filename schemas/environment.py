"""Read the settings from the environment: only where a process starts (import contract)."""

from pathlib import Path

from pydantic import ValidationError

from schemas.errors import StartRefused
from schemas.settings import DEV_ENV_FILE, Settings


def load_settings(data_dir: Path | None = None) -> Settings:
    """Read the environment and, where it is silent, the data directory's `dev.env`.

    Raise StartRefused with all unusable values; values themselves are never quoted.
    """
    try:
        first = Settings()
        directory = data_dir or first.data_dir
        return Settings(_env_file=directory / DEV_ENV_FILE)
    except ValidationError as error:
        reasons = [
            f"SYNCWARD_{str(e['loc'][0]).upper()}: {e['msg']}; see docs/settings.md"
            for e in error.errors(include_input=False, include_url=False)
        ]
        raise StartRefused(reasons) from None
