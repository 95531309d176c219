"""`syncward resource authorize`: a person lets Syncward in at an API, by the code flow with PKCE.

This host cannot open the client's secret, so it cannot exchange the code. It seals code and
verifier for the workers, and a `test` of the resource exchanges them there and reads a page.
"""

import json
import sys
import webbrowser
from collections.abc import Mapping

import click

from cli import consent, credentials
from cli.consent import Expected, Loopback
from cli.context import Cli, command
from cli.resources import ask, resource, tested
from connectors import registry
from crypto.tickets import Tickets, proof
from schemas.accounts import Resource
from schemas.consent import FIELD, REFUSED, Consent
from schemas.errors import ConfigError, SyncwardError
from schemas.redaction import REDACTOR
from schemas.runs import RunKind
from schemas.secret import Secret
from storage import resources

#: The group with all of its commands.
commands = {"resource": resource}

#: Where a browser on another machine ends: nobody listens there.
PASTED_PORT = 8_765


@command(resource)
@click.argument("name")
@click.option("--port", default=0, type=click.IntRange(0, 65_535), help="Loopback port to wait on.")
@click.option("--paste", is_flag=True, help="The browser is elsewhere: paste where it ended.")
@click.option("--browser", is_flag=True, help="Open the browser of this host.")
@click.option("--timeout", default=300, type=click.IntRange(5, 3_600), help="Seconds to wait.")
def authorize(cli: Cli, name: str, port: int, *, paste: bool, browser: bool, timeout: int) -> None:
    """Let a person authorise the login at the API; connections that wait for it go on."""
    credentials.open_keyring(cli)  # nobody is asked for what could not be sealed
    with cli.inside(name) as (tx, account, short):
        found = resources.get(tx, short)
    asked = registry.consent(found.kind, found.config, cli.settings.link_policy())
    verifier, challenge = proof()
    flow = _Flow(found, asked, challenge, Tickets(life_s=timeout), browser=browser)
    if paste:
        uri = f"http://127.0.0.1:{port or PASTED_PORT}{consent.PATH}"
        came: consent.Came | None = flow.by_hand(uri)
    else:
        came, uri = flow.on_loopback(port, timeout)
    pending = {
        "code": _code(short, came, timeout).reveal(),
        "verifier": REDACTOR.know(verifier),
    }
    full = f"{account.name}/{short}"
    _seal(cli, full, found, Secret(_sealed(pending, uri)))
    _exchange(cli, full, short)


def _sealed(pending: Mapping[str, str], uri: str) -> str:
    """Write what a worker exchanges, and the address of this host so that no part of it is masked.

    A part of a secret is taken for one wherever it stands, and a loopback host stands in answers.
    """
    escaped = "".join(f"\\u{ord(character):04x}" for character in uri)
    return f'{json.dumps(pending)[:-1]}, "redirect_uri": "{escaped}"}}'


class _Flow:
    """One authorisation of one resource, under way."""

    def __init__(
        self, found: Resource, asked: Consent, challenge: str, tickets: Tickets, *, browser: bool
    ) -> None:
        self._asked, self._challenge, self._browser = asked, challenge, browser
        self._tickets, self._purpose = tickets, str(found.resource_id)
        self._expected = Expected(tickets, self._purpose)

    def on_loopback(self, port: int, timeout: int) -> tuple[Secret | consent.Declined | None, str]:
        """Return what a browser of this host brings, and where it was sent."""
        with Loopback(port, self._expected, _tell) as listening:
            self._send(listening.redirect_uri)
            return listening.wait(timeout), listening.redirect_uri

    def by_hand(self, redirect_uri: str) -> consent.Came:
        """Return what a person pastes."""
        self._send(redirect_uri)
        _tell("then paste the address at which the browser ended (its page does not load):")
        try:
            line = sys.stdin.readline(consent.LONGEST + 2)
        except UnicodeDecodeError:
            return consent.Refused("it is no text")
        return consent.pasted(line, redirect_uri, self._expected)

    def _send(self, redirect_uri: str) -> None:
        state = self._tickets.issue(self._purpose)
        url = self._asked.url(redirect_uri=redirect_uri, state=state, challenge=self._challenge)
        _tell(f"open this address, and authorise there:\n{url}")
        if self._browser:
            webbrowser.open(url)


def _tell(sentence: str) -> None:
    click.echo(sentence, err=True)


def _code(name: str, came: consent.Came | None, timeout: int) -> Secret:
    if came is None:
        raise ConfigError(
            f"resource {name}: nobody authorised it within {timeout} s; try again, or with --paste "
            "where the browser is on another machine"
        )
    if isinstance(came, consent.Declined):
        raise ConfigError(f"resource {name}: the API did not grant it ({came.name}); try again")
    if isinstance(came, consent.Refused):
        raise ConfigError(f"resource {name}: what was pasted is refused: {came.why}")
    return came


def _seal(cli: Cli, full: str, before: Resource, pending: Secret) -> None:
    """Store what only a worker can exchange."""
    keyring = credentials.open_keyring(cli)
    with cli.inside(full) as (tx, account, short):
        resources.lock(tx, short)
        now = resources.get(tx, short)
        if (now.resource_id, now.config) != (before.resource_id, before.config):
            raise ConfigError(f"resource {short}: changed meanwhile; authorise it again")
        credentials.store(
            cli,
            tx,
            account,
            keyring,
            resource_id=now.resource_id,
            field=FIELD,
            version=resources.next_version(tx, now, FIELD),
            secret=pending,
            revives=False,  # a worker does, once the API has given tokens for it
        )


def _exchange(cli: Cli, full: str, name: str) -> None:
    """Let a worker exchange what was sealed for it, and read a page with what it got."""
    try:
        run, document = ask(cli, full, RunKind.TEST)
    except SyncwardError as error:
        later = ""
        if error.code in {"deadline", "no_worker"}:
            later = "; the authorisation is sealed, and the next run exchanges it, if the API still"
            later += " takes it then"
        raise SyncwardError(f"{error.public}{later}", code=error.code) from None
    missing = document.get("missing_as_source")
    if isinstance(missing, list) and REFUSED in missing:
        raise ConfigError(f"resource {name}: {REFUSED}; authorise it again")
    cli.answer(
        {"authorized": name, "run_id": run.run_id},
        lambda: f"resource {name} is authorised; {tested(run, document)}",
    )
