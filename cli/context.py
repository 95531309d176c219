"""What every command shares: settings, one engine, the account, and how answers are shown."""

import getpass
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, Literal

import click
from sqlalchemy import Connection, Engine

from cli.show import jsonable
from schemas.accounts import Account
from schemas.audit import Principal
from schemas.environment import load_settings
from schemas.errors import ConfigError, StartRefused
from schemas.ids import new_id
from schemas.profiles import refusals
from schemas.settings import Settings

if TYPE_CHECKING:  # `--help` must not wait for SQLAlchemy
    from storage.keystore import Keystore


#: Longer than any sentence of a command.
_UNCUT = 1_000


@dataclass
class Cli:
    """One invocation."""

    json: bool = False
    account: str | None = None

    @cached_property
    def settings(self) -> Settings:
        return load_settings()

    @cached_property
    def engine(self) -> Engine:
        from storage.engine import open_engine  # noqa: PLC0415 - `--help` must not wait for it

        return self._admitted(open_engine(self.control_url(), "operator", pool_size=1))

    @cached_property
    def audit_engine(self) -> Engine:
        """An engine that only reads the audit log and adds to it: for logins of auditors, too."""
        from storage.engine import open_engine  # noqa: PLC0415 - as above

        return self._admitted(open_engine(self.control_url(), "auditor", pool_size=1), "auditor")

    def _admitted(
        self, engine: Engine, process: Literal["operator", "auditor", "sealer"] = "operator"
    ) -> Engine:
        """Return an engine whose login may be used; StartRefused if it may do too much."""
        from storage import logins  # noqa: PLC0415 - as above

        if self.settings.profile == "production":
            logins.require(engine, process)
        return engine

    def control_url(self) -> str:
        """Return the control database's URL; StartRefused if the profile forbids what it says."""
        if self.settings.database_url is None:
            raise ConfigError(
                "SYNCWARD_DATABASE_URL is not set; start a development instance with: "
                "syncward up --dev"
            )
        reasons = refusals(self.settings, "operator")
        if reasons:
            raise StartRefused(reasons)
        return self.settings.database_url.get_secret_value()

    @cached_property
    def keystore(self) -> "Keystore":
        from storage.engine import open_engine  # noqa: PLC0415 - as above
        from storage.keystore import Keystore  # noqa: PLC0415 - as above

        url = self.settings.keystore_url
        if url is None:
            return Keystore(self.engine)
        own = open_engine(url.get_secret_value(), "operator", pool_size=1, database="keystore")
        return Keystore(self.engine, self._admitted(own))

    @cached_property
    def principal(self) -> Principal:
        """Return who gives this command; its events carry one id of the request."""
        from schemas.audit_body import NAME_MAX, escaped  # noqa: PLC0415 - as above

        name = getpass.getuser()
        if len(escaped(name).encode()) > NAME_MAX:
            raise ConfigError(
                f"operator: the name in LOGNAME or USER is longer than {NAME_MAX:,} bytes, more "
                "than the audit log takes; set LOGNAME to your login's name"
            )
        return Principal("operator", name, request=str(new_id()))

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction as operator, in no account yet."""
        from storage.engine import transaction  # noqa: PLC0415 - as above

        with transaction(self.engine) as tx:
            yield tx

    @contextmanager
    def auditing(self) -> Iterator[Connection]:
        """One transaction as auditor."""
        from storage.engine import transaction  # noqa: PLC0415 - as above

        with transaction(self.audit_engine) as tx:
            yield tx

    @contextmanager
    def sealing(self) -> Iterator[Connection]:
        """One transaction as sealer: on its host there is no other login."""
        from storage.engine import open_engine, transaction  # noqa: PLC0415 - as above

        engine = open_engine(self.control_url(), "sealer", pool_size=1)
        try:
            with transaction(self._admitted(engine, "sealer")) as tx:
                yield tx
        finally:
            engine.dispose()

    @contextmanager
    def inside(self, name: str | None = None) -> Iterator[tuple[Connection, Account, str]]:
        """One transaction inside the account; also splits `acme/shop` into account and name."""
        from storage import accounts  # noqa: PLC0415 - as above

        account_name, short = self.split(name)
        with self.transaction() as tx:
            yield tx, accounts.resolve(tx, account_name), short

    def close(self) -> None:
        """Close what was opened."""
        if "engine" in self.__dict__:
            self.engine.dispose()
        if "audit_engine" in self.__dict__:
            self.audit_engine.dispose()
        if "keystore" in self.__dict__:
            self.keystore.dispose()

    def split(self, name: str | None) -> tuple[str | None, str]:
        """Return (account, name) of `acme/shop`, or the account of `-A` and the name."""
        default = self.account or self.settings.account
        if name is None or "/" not in name:
            return default, name or ""
        account, _, short = name.partition("/")
        return account, short

    def answer(self, data: object, text: Callable[[], str]) -> None:
        """Print one JSON document, or the text."""
        click.echo(json.dumps(jsonable(data), indent=2) if self.json else text())

    def note(self, text: str) -> None:
        """Say something that is no answer, on stderr, to people only."""
        if not self.json:
            click.echo(text, err=True)


class Group(click.Group):
    """A group whose help says what each command does in a whole sentence, not in a piece of it."""

    group_class = type

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        rows = [(name, one.get_short_help_str(_UNCUT)) for name, one in found if one is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def command(group: click.Group, name: str | None = None) -> Callable[..., Any]:
    """Register a command that takes `--json` and `-A/--account` and gets a Cli first."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @wraps(function)
        def run(*args: Any, json: bool, account: str | None, **kwargs: Any) -> None:  # noqa: ANN401 - click decides
            cli = Cli(json=json, account=account)
            try:
                function(cli, *args, **kwargs)
            finally:
                cli.close()

        run = click.option("--json", is_flag=True, help="One JSON document on stdout.")(run)
        run = click.option(
            "-A", "--account", metavar="NAME", help="Account; the sole one by default."
        )(run)
        return group.command(name or function.__name__.replace("_", "-"))(run)

    return decorate


def interactive() -> bool:
    """Say whether somebody sits at a terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()
