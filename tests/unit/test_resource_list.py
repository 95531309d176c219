"""Where a resource is, as `resource list` shows it: something true for every kind."""

import pytest

from cli.resources import _address


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"host": "db.example.com", "port": 5432, "database": "shop"}, "db.example.com:5432/shop"),
        ({"host": "db.example.com", "database": "shop"}, "db.example.com/shop"),
        ({"host": "db.example.com"}, "db.example.com"),
        ({"path": "/data/x.sqlite"}, "/data/x.sqlite"),
        ({"manifest": "stripe", "parameters": {}}, "stripe"),
        ({"connector": "tap-jsonl==1.0", "settings": {}}, "tap-jsonl==1.0"),
        ({}, "-"),
    ],
)
def test_the_place_of_a_resource_is_what_its_kind_has_of_it(config, shown):
    assert _address(config) == shown
