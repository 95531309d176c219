"""Whoever changes where a resource's secrets are sent has to know them."""

import re
import socket

import pytest
from sqlalchemy import text

from cli.apply import make_so
from connectors import registry
from schemas.errors import ConfigError
from storage import resources
from tests.oauth_world import OAuthWorld
from tests.rest_api import Api
from tests.world import OPERATOR

pytestmark = pytest.mark.integration

STREAMS = {"public.t": "{mode: merge, key: [id], cursor: xmin}"}


def test_another_host_or_port_of_a_database_wants_the_password_again(world):
    world.apply(STREAMS)
    path = world.document(STREAMS)
    text = path.read_text()
    before = world.control.all("SELECT config FROM resources ORDER BY name")
    bare = re.sub(r", secret: \{password: \{file: \w+\.pw\}\}", "", text)
    for setting, value in (("host", '"127.0.0.2"'), ("port", "1")):
        moved = re.sub(rf'"{setting}": [^,]+,', f'"{setting}": {value},', bare)
        for write in (False, True):
            path.write_text(moved)
            with pytest.raises(ConfigError, match=r"sent elsewhere .* under secret: password"):
                make_so(world.cli, path, write=write)
    assert world.control.all("SELECT config FROM resources ORDER BY name") == before

    known = registry.aim("postgres", {"host": "a", "port": 1, "user": "x"})
    assert known == registry.aim("postgres", {"host": "a", "port": 1, "user": "y"})
    path.write_text(re.sub(r'"port": [^,]+,', '"port": 1,', text))
    world.apply_file(path)  # who gives it knows it
    assert world.control.all("SELECT config ->> 'port' FROM resources") == [("1",), ("1",)]
    assert world.events().count("credential.sealed") == 4


def test_tokens_that_workers_stored_are_forgotten_and_what_an_operator_gave_is_asked_for(world):
    api = Api()
    shop = OAuthWorld(world, api)
    shop.apply()
    assert shop.sync().error is None
    document = shop.document(secrets={}, port="1")
    written = document.read_text()
    document.write_text(
        re.sub(r"    secret:\n      client_secret:\n        file: \S+\n", "", written)
    )
    assert "secret" not in document.read_text()
    with pytest.raises(ConfigError, match="under secret: client_secret"):
        shop.world.apply_file(document)
    assert shop.versions() == {"access_token": 2, "client_secret": 1, "refresh_token": 2}

    document.write_text(written)
    shop.world.apply_file(document)
    assert shop.versions() == {"client_secret": 2}
    assert shop.count("resource.updated") == 1
    left = shop.world.control.one(
        "SELECT count(*) FROM keystore.dek WHERE purpose = 'credentials' AND unused_since IS NULL"
    )
    assert left == 2  # of both versions of the client's secret
    api.close()


def by_sql(world, **settings):
    """Change a resource's settings as an operator's login may, past the command line."""
    with world.cli.inside() as (tx, account, _):
        found = resources.get(tx, "shop")
        resources.update_config(tx, account, found, {**found.config, **settings}, OPERATOR)


def test_a_host_that_is_changed_past_the_command_line_gets_no_secret(world):
    world.apply(STREAMS)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0)
        by_sql(world, port=elsewhere.getsockname()[1])
        run, _ = world.sync()
        assert (run.state, run.error_code) == ("failed", "credentials")
        assert "lead elsewhere" in run.error
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
    for statement in (
        "UPDATE credentials SET aim = NULL",
        "SELECT envelope FROM credentials",
        "SELECT * FROM aimed_credentials(gen_random_uuid(), gen_random_uuid())",
    ):
        refused = pytest.raises(ConfigError, match="permission denied")
        with refused, world.cli.inside() as (tx, _, _name):
            tx.execute(text(statement))


def test_a_login_that_is_led_elsewhere_past_the_command_line_sends_none_of_its_tokens(world, shell):
    api = Api()
    shop = OAuthWorld(world, api, 3)
    shop.apply()
    assert shop.sync("c0").error is None
    asked = len(api.asked)
    by_sql(world, parameters={"port": api.port, "site": "elsewhere"})
    assert shop.sync("c0").error_code == "credentials"
    assert len(api.asked) == asked
    shop.rotate("client_secret", shop.issuer.client[1], shell)  # who did it may know this one
    assert shop.sync("c1").error_code == "needs_reauth"
    assert len(api.asked) == asked
    shop.rotate("refresh_token", shop.issuer.refresh, shell)
    assert shop.sync("c2").error is None
    assert shop.sync("c1").error is None
    api.close()


def test_secrets_of_the_version_before_say_nothing_of_where_they_go(world):
    api = Api()
    shop = OAuthWorld(world, api)
    shop.apply()
    world.control.act("UPDATE credentials SET aim = NULL")
    by_sql(world, parameters={"port": api.port, "site": "elsewhere"})
    assert shop.sync().error is None
    aims = world.control.all("SELECT count(DISTINCT aim), count(aim) FROM credentials")
    assert aims == [(1, 2)]  # what a worker stored says it
    api.close()


def test_of_a_manifest_that_comes_along_only_what_leads_elsewhere_counts():
    github = {"manifest": "github", "parameters": {"owner": "a", "repository": "b"}}
    other = {"manifest": "github", "parameters": {"owner": "c", "repository": "d"}}
    example = {"manifest": "example", "parameters": {"base_url": "https://a.example.com"}}
    elsewhere = {"manifest": "example", "parameters": {"base_url": "https://b.example.com"}}
    assert registry.aim("rest", github) == registry.aim("rest", other)
    assert registry.aim("rest", example) != registry.aim("rest", elsewhere)
    assert registry.aim("rest", github) != registry.aim("rest", example)


def test_every_connector_with_secrets_says_where_they_go_or_counts_every_setting():
    for kind in registry.sources() | registry.destinations():
        moved = registry.aim(kind, {"host": "a", "port": 1}) if kind != "rest" else ("a",)
        assert bool(moved) == bool(registry.secret_fields(kind)), kind
    assert registry.aim("singer", {"tap": "a"}) != registry.aim("singer", {"tap": "b"})
