"""URLs are taken apart without judging them, alike in every version of Python."""

import pytest

from schemas.egress import endpoints
from schemas.urls import host_lists, split


@pytest.mark.parametrize(("url", "parts"), [
    ("REDISS+sentinel://me:p@one:1,[::1]:2/0?master=m#x",
     ("rediss+sentinel", "me:p@one:1,[::1]:2", "/0", "master=m", "x")),
    ("postgresql:///db?host=/run", ("postgresql", "", "/db", "host=/run", "")),
    ("file:///k.json", ("file", "", "/k.json", "", "")),
    ("no url at all", ("", "", "no url at all", "", "")),
    ("", ("", "", "", "", "")),
])  # fmt: skip
def test_a_url_falls_into_its_parts(url, parts):
    assert tuple(split(url)) == parts


def test_every_reading_of_the_hosts_counts():
    assert host_lists("postgresql://me:p/w@db:5432/x") == {"me:p", "db:5432"}
    assert host_lists("redis://me:p@ss@cache:1/0") == {"cache:1"}


@pytest.mark.parametrize("password", ["p/w", "p[w", "p]w", "p?w", "p#w", "p@w", "p:w"])
def test_a_service_of_ours_is_known_whatever_its_password_looks_like(password):
    assert ("db.internal", 5433) in endpoints([f"postgresql://me:{password}@db.internal:5433/x"])


def test_addresses_in_a_list_of_sentinels_are_known():
    found = endpoints(["redis+sentinel://me:p@one:26380,two,[fd00::1]:26381/0?master=m"])
    assert found == {("one", 26380), ("two", 26379), ("fd00::1", 26381)}
