"""Whoever changes where a resource's secrets are sent has to know them."""

import re

import pytest

from cli.apply import make_so
from connectors import registry
from schemas.errors import ConfigError
from tests.oauth_world import OAuthWorld
from tests.rest_api import Api

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
    assert world.events().count("credential.sealed") == 2


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
    assert shop.versions() == {"client_secret": 1}
    assert shop.count("resource.updated") == 1
    left = shop.world.control.one(
        "SELECT count(*) FROM keystore.dek WHERE purpose = 'credentials' AND unused_since IS NULL"
    )
    assert left == 1
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
