"""`syncward resource`: external systems and their sealed credentials."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from sqlalchemy import Connection

from cli import credentials
from cli.context import Cli, Group, command, interactive
from cli.questions import ask_a_worker
from cli.show import ago, plain, table
from connectors import registry
from schemas.accounts import Account, Resource
from schemas.errors import ConfigError
from schemas.ids import new_id
from schemas.runs import Run, RunKind, RunOptions
from schemas.secret import Secret, looks_secret
from storage import resources
from storage.runs import Subject


@click.group(cls=Group)
def resource() -> None:
    """External systems: create, list, show, test, discover, authorize, rotate, delete."""


@command(resource)
@click.argument("name")
@click.option("--kind", required=True, help="Connector, e.g. postgres.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Setting, none that is secret."
)
@click.option("--secret-file", multiple=True, metavar="FIELD=FILE", help="Secret from a file.")
@click.option("--secret-stdin", metavar="FIELD", help="Secret from standard input.")
def create(  # noqa: PLR0917 - click passes what the operator typed
    cli: Cli,
    name: str,
    kind: str,
    settings: tuple[str, ...],
    secret_file: tuple[str, ...],
    secret_stdin: str | None,
) -> None:
    """Create a resource. Secrets come from a file, stdin or a prompt, never from an argument."""
    config = registry.validate_config(kind, _clear(settings), cli.settings.link_policy())
    given = _sources(kind, secret_file, secret_stdin, config)
    keyring = credentials.open_keyring(cli)
    secrets = _read(given)
    with cli.inside(name) as (tx, account, short):
        resource_id = new_id()
        resources.create(
            tx,
            account,
            resource_id=resource_id,
            name=short,
            kind=kind,
            config=config,
            runs_max=cli.settings.resource_runs_max,
            principal=cli.principal,
        )
        for field, secret in secrets.items():
            credentials.store(
                cli,
                tx,
                account,
                keyring,
                resource_id=resource_id,
                field=field,
                version=1,
                secret=secret,
            )
    cli.answer(
        {"created": short, "sealed": sorted(given)},
        lambda: f"resource {short} created; next: syncward resource test {short}",
    )


def _clear(settings: tuple[str, ...]) -> dict[str, str]:
    config: dict[str, str] = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign:
            raise click.UsageError(f"--set {plain(key)}: write KEY=VALUE")
        if looks_secret(key):
            raise click.UsageError(
                f"--set {plain(key)}: a secret never goes on the command line, others can read it "
                f"there; use --secret-file {plain(key)}=FILE or --secret-stdin {plain(key)}"
            )
        config[key] = value
    return config


def _sources(
    kind: str, files: tuple[str, ...], stdin: str | None, config: Mapping[str, Any]
) -> dict[str, str]:
    given = {stdin: "stdin"} if stdin else {}
    for entry in files:
        field, sign, path = entry.partition("=")
        if not sign:
            raise click.UsageError(f"--secret-file {plain(field)}: write FIELD=FILE")
        given[field] = path
    wanted = registry.secret_fields(kind)
    unknown = sorted(set(given) - set(wanted))
    if unknown:
        raise ConfigError(f"{kind} has no secret {', '.join(unknown)}; it has {', '.join(wanted)}")
    if interactive():
        prompted = [*registry.wanted_secrets(kind, config), *given]
        return {field: given.get(field, "prompt") for field in prompted}
    return given


def _read(given: Mapping[str, str]) -> dict[str, Secret]:
    """Read all secrets; not within a transaction, which would wait for whoever types."""
    return {field: credentials.read(field, source, base=Path()) for field, source in given.items()}


@command(resource, "list")
def list_(cli: Cli) -> None:
    """List resources."""
    with cli.inside() as (tx, _, _name):
        found = resources.listing(tx)
    rows = [
        (r.name, r.kind, _where(r), ", ".join(r.secret_versions) or "none", ago(r.updated_at))
        for r in found
    ]
    cli.answer(list(found), lambda: table(("RESOURCE", "KIND", "WHERE", "SEALED", "CHANGED"), rows))


def _where(resource: Resource) -> str:
    if resource.needs_reauth_since is not None:  # first, as it is cut where the line is too long
        return f"needs reauth: {_address(resource.config)}"
    return _address(resource.config)


def _address(config: Mapping[str, Any]) -> str:
    """Say where a resource is, by what its kind has: a file, a manifest, a package, a host."""
    for name in ("path", "manifest", "connector"):
        if name in config:
            return str(config[name])
    if not config.get("host"):
        return "-"
    port, database = config.get("port"), config.get("database")
    return f"{config['host']}{f':{port}' if port else ''}{f'/{database}' if database else ''}"


@command(resource)
@click.argument("name")
def show(cli: Cli, name: str) -> None:
    """Show one resource: clear settings, and which secrets are stored in which version."""
    with cli.inside(name) as (tx, _, short):
        found = resources.get(tx, short)
    shown = {key: value for key, value in found.config.items() if value is not None}
    lines = [f"{key:<13} {plain(value)}" for key, value in shown.items()]
    lines += [f"{field:<13} sealed, version {n}" for field, n in found.secret_versions.items()]
    if found.needs_reauth_since is not None:
        lines.append(
            f"its login was refused {ago(found.needs_reauth_since)}; its connections wait for: "
            f"syncward resource authorize {found.name}"
        )
    cli.answer(found, lambda: "\n".join([f"{found.name} ({found.kind})", *lines]))


@command(resource)
@click.argument("name")
def test(cli: Cli, name: str) -> None:
    """Let a worker connect: server version, TLS, and what is missing."""
    run, document = ask(cli, name, RunKind.TEST)
    cli.answer(
        {"run_id": run.run_id, "resource": run.subject_name, **document},
        lambda: tested(run, document),
    )


def tested(run: Run, document: dict[str, object]) -> str:
    """Say what a test found: one line for each thing that is missing, as it is typed there."""
    parts = [
        f"{run.subject_name}: {document['server_version']}",
        f"TLS {document['tls']}",
        f"login {document['login']}",
    ]
    lines = []
    for role in ("source", "destination"):
        missing = document.get(f"missing_as_{role}")
        if missing is None:
            continue  # the connector has one role only
        sentences = [plain(one) for one in missing] if isinstance(missing, list) else []
        lines.append(f"  as {role}:{'' if sentences else ' ready'}")
        lines += [f"    {sentence}" for sentence in sentences]
    return "\n".join([", ".join(parts), *lines])


@command(resource)
@click.argument("name")
def discover(cli: Cli, name: str) -> None:
    """Let a worker list streams: columns, keys, cursor candidates, row estimates."""
    run, document = ask(cli, name, RunKind.DISCOVER)
    found = document["streams"]
    assert isinstance(found, list)  # noqa: S101 - our own worker wrote it
    rows = [
        (
            s["name"],
            len(s["columns"]),
            ",".join(s["key"]) or "-",
            f"~{s['rows_estimated']:,}" if s["rows_estimated"] else "-",
            s["suggestion"],
        )
        for s in found
    ]
    cli.answer(
        {"run_id": run.run_id, "resource": run.subject_name, "streams": found},
        lambda: table(("STREAM", "COLS", "KEY", "ROWS", "SUGGESTION"), rows, width=200),
    )


def ask(cli: Cli, name: str, kind: RunKind) -> tuple[Run, dict[str, object]]:
    """Run a question about a resource on a worker."""

    def subject(tx: Connection, account: Account, short: str) -> Subject:
        return _subject(account, resources.get(tx, short))

    answer = ask_a_worker(cli, name, subject, kind, RunOptions())
    return answer.run, answer.document


def _subject(account: Account, resource: Resource) -> Subject:
    return Subject(resource.resource_id, account.account_id, resource.resource_id)


@command(resource)
@click.argument("name")
@click.option("--secret-file", multiple=True, metavar="FIELD=FILE", help="Secret from a file.")
@click.option("--secret-stdin", metavar="FIELD", help="Secret from standard input.")
def rotate(cli: Cli, name: str, secret_file: tuple[str, ...], secret_stdin: str | None) -> None:
    """Store new credentials as a new version; the next run uses them."""
    keyring = credentials.open_keyring(cli)
    with cli.inside(name) as (tx, account, short):
        before = resources.get(tx, short)
    given = _sources(before.kind, secret_file, secret_stdin, before.config)
    if not given:
        raise ConfigError("no secret was given; use --secret-file FIELD=FILE or --secret-stdin")
    secrets = _read(given)
    with cli.inside(f"{account.name}/{short}") as (tx, account, short):
        resources.lock(tx, short)
        found = resources.get(tx, short)
        if (found.resource_id, found.config) != (before.resource_id, before.config):
            raise ConfigError(f"resource {short}: changed meanwhile; rotate again")
        for field, secret in secrets.items():
            credentials.store(
                cli,
                tx,
                account,
                keyring,
                resource_id=found.resource_id,
                field=field,
                version=found.secret_versions.get(field, 0) + 1,
                secret=secret,
            )
    cli.answer(
        {"rotated": short, "fields": sorted(given)}, lambda: f"resource {short}: credentials stored"
    )


@command(resource)
@click.argument("name")
def delete(cli: Cli, name: str) -> None:
    """Delete a resource that no connection uses, with its credentials and their keys."""
    with cli.keystore.after() as last, cli.inside(name) as (tx, account, short):
        resources.delete(tx, last or tx, account, resources.get(tx, short), cli.principal)
    cli.answer({"deleted": short}, lambda: f"resource {short} deleted")
