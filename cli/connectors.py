"""`syncward connector`: manifests of APIs, checked and tried out before anything is stored."""

import json
from collections.abc import Mapping
from pathlib import Path

import click

from cli import connector_install, credentials
from cli.context import Cli, Group, command, interactive
from cli.show import plain, table
from connectors.rest import manifest as rest_manifest
from connectors.rest import manifest_files
from connectors.rest import trial as rest_trial
from connectors.rest.manifest import Manifest
from connectors.rest.trial import Trial
from schemas.errors import ConfigError
from schemas.secret import looks_secret

_CELL_MAX = 40


@click.group(cls=Group)
def connector() -> None:
    """Manifests of APIs: lint, try. Connectors of others: install, list, remove."""


command(connector)(connector_install.install)
command(connector, "list")(connector_install.list_)
command(connector)(connector_install.remove)
commands = {"connector": connector}


def _manifest(named: str) -> Manifest:
    """Read a manifest that comes with Syncward by its name, any other as a file of this host."""
    known = manifest_files.builtin()
    path = known.get(named, Path(named))
    try:
        with path.open("rb") as file:
            content = file.read(manifest_files.FILE_MAX + 1)
    except OSError:
        raise ConfigError(
            f"{named}: no such file that can be read, and no manifest of that name; there are "
            f"{', '.join(known)}"
        ) from None
    if len(content) > manifest_files.FILE_MAX:
        raise ConfigError(f"{named}: is larger than 1 MiB")
    return manifest_files.parse(content, named)


@command(connector)
@click.argument("manifest")
def lint(cli: Cli, manifest: str) -> None:
    """Say what is wrong with a manifest, a line each; nothing is asked over the network."""
    found = _manifest(manifest)
    remarks = rest_trial.remarks(found)
    cli.answer(
        {
            "manifest": found.name,
            "streams": list(found.streams),
            "secrets": list(found.secrets),
            "parameters": list(found.parameters),
            "remarks": remarks,
        },
        lambda: "\n".join(
            [
                *remarks,
                f"{found.name}: {len(found.streams)} streams",
                f"secrets: {', '.join(found.secrets) or 'none'}",
                f"parameters: {', '.join(found.parameters) or 'none'}",
            ]
        ),
    )


@command(connector, "try")
@click.argument("manifest")
@click.option("--stream", required=True, help="Which one to read.")
@click.option("--limit", type=click.IntRange(1, 1_000), default=10, show_default=True)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Parameter.")
@click.option("--secret-file", multiple=True, metavar="FIELD=FILE", help="Secret from a file.")
@click.option("--secret-stdin", metavar="FIELD", help="Secret from standard input.")
def try_(  # noqa: PLR0917 - click passes what the operator typed
    cli: Cli,
    manifest: str,
    stream: str,
    limit: int,
    settings: tuple[str, ...],
    secret_file: tuple[str, ...],
    secret_stdin: str | None,
) -> None:
    """Read a few records from this host and show them, or the schema that they would have."""
    found = _manifest(manifest)
    secrets = _secrets(found, secret_file, secret_stdin)
    trial = rest_trial.attempt(
        found,
        _parameters(settings),
        secrets,
        cli.settings.link_policy(),
        stream=stream,
        limit=limit,
    )
    cli.answer(
        {
            "records": [json.loads(json.dumps(r, default=str)) for r in trial.records],
            "schema": trial.schema,
            "new": list(trial.new),
            "pages": trial.pages,
            "changes": list(trial.changes),
        },
        lambda: _shown(trial),
    )


def _parameters(settings: tuple[str, ...]) -> dict[str, str]:
    given = {}
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign or looks_secret(name):
            raise click.UsageError(
                f"--set {plain(name)}: write NAME=VALUE; a secret comes by --secret-file or "
                "--secret-stdin"
            )
        given[name] = value
    return given


def _secrets(manifest: Manifest, files: tuple[str, ...], stdin: str | None) -> Mapping[str, str]:
    sources = {stdin: "stdin"} if stdin else {}
    for entry in files:
        field, _, path = entry.partition("=")
        sources[field] = path
    unknown = sorted(set(sources) - set(manifest.tried_with))
    if unknown:
        wanted = ", ".join(manifest.tried_with) or "none"
        raise ConfigError(f"{manifest.name} has no secret {', '.join(unknown)}; it has {wanted}")
    missing = [field for field in manifest.tried_with if field not in sources]
    if missing and not interactive():
        raise ConfigError(
            f"{manifest.name}: its {missing[0]} is missing; give it by --secret-file or "
            "--secret-stdin"
        )
    sources |= dict.fromkeys(missing, "prompt")
    return {
        field: credentials.read(field, source, base=Path()).reveal()
        for field, source in sources.items()
    }


def _shown(trial: Trial) -> str:
    """Show rows as a run would load them; without a schema the one to put into the manifest."""
    lines = []
    if trial.rows:
        names = [name for name in trial.columns if name != rest_manifest.RAW]
        cells = [tuple(plain(_short(value)) for value in row[: len(names)]) for row in trial.rows]
        lines.append(table(tuple(name.upper() for name in names), cells))
    else:
        lines.append("    schema:")
        lines += [f"      {json.dumps(plain(n))}: {t}" for n, t in trial.schema.items()]
    if trial.new:
        lines.append(f"not in the schema: {', '.join(plain(name) for name in trial.new)}")
    for number, changes in enumerate(trial.changes):
        lines.append(f"changes.{number}: {changes} records of the last day on its first page")
    lines.append(f"{len(trial.records)} records of {trial.pages} pages; nothing was stored")
    return "\n".join(lines)


def _short(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _CELL_MAX else f"{text[: _CELL_MAX - 1]}…"
