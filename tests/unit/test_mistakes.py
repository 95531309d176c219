"""What people write wrong is named in words, and what `diff` says about data is what happens."""

from pathlib import Path
from uuid import UUID

import pytest

from cli.changes import _stream_differences
from cli.document import load
from connectors import registry
from connectors.files.manifest import definition as definition_of_files
from connectors.postgres.state import definition
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError
from schemas.mistakes import meant
from schemas.records import LoadRequest
from schemas.streams import StreamSpec

LOOSE = LinkPolicy(tls_required=False)
CONNECTION = """account: acme
connections:
  c:
    source: shop
    destination: lake
    schedule: manual
    target: {schema: acme}
    streams:
      public.t: {mode: merge, key: [id]}
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("account: acme\n" + CONNECTION[14:], "", "1: document: must be a mapping"),
        ("schedule: manual", "schedule: 5m", "6: connections.c.schedule: write {every: 5m}"),
        (
            "manual",
            "{evry: 5m}",
            "6: connections.c.schedule.evry: unknown key; did you mean every?",
        ),
        ("{schema: acme}", "acme", "7: connections.c.target: must be a mapping"),
        ("{schema: acme}", "{schema: acme, schma: a}", "schma: unknown key; did you mean schema?"),
        ("key: [id]", "kye: [id]", "public.t.kye: unknown key; did you mean key?"),
        ("key: [id]", "key: id", "public.t.key: must be a list, e.g. [id]"),
        ("key: [id]", "key: [id], zzzz: 1", "unknown key; remove it or correct its spelling"),
        ("mode: merge", "mode: mrge", "must be 'replace', 'append', 'merge' or 'history'"),
        ("public.t", "t", "9: connections.c.streams.t.name: a stream is called SCHEMA.TABLE"),
        ("[id]", "[id], mask: {a: md5}", "public.t.mask.a: write hmac, redact or truncate(N)"),
        ("[id]", "[id], range_rows: many", "public.t.range_rows: must be a whole number"),
        ("[id]", "[id], guards: {flor: 1}", "guards.flor: unknown key; did you mean floor?"),
        ("  c:", "  c c:", "3: connections.c c.[key]: a name has small letters, digits"),
    ],
)
def test_a_mistake_is_named_once_in_words_with_its_line(tmp_path: Path, old, new, said):
    assert CONNECTION.count(old) == 1
    path = tmp_path / "doc.yaml"
    path.write_text(CONNECTION.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path)
    (line,) = caught.value.public.splitlines()
    assert line.startswith(f"{path}:")
    assert said in line


def test_where_a_secret_comes_from_is_said_in_one_line(tmp_path: Path):
    path = tmp_path / "doc.yaml"
    entry = "{kind: postgres, secret: {password: {env: HUNTER2}}}"
    path.write_text(f"account: acme\nresources:\n  shop: {entry}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.public == (
        f"{path}:3: resources.shop.secret: password: write {{file: PATH}}, stdin or prompt"
    )


def test_settings_of_a_resource_are_named_in_words():
    wrong = {"host": "a", "database": "d", "usr": "u", "port": "x"}
    with pytest.raises(ConfigError) as caught:
        registry.validate_config("postgres", wrong, LOOSE)
    assert caught.value.public == (
        "postgres config: port: must be a whole number; user: is missing; "
        "usr: unknown key; did you mean user?; see docs/connectors.md"
    )


def test_a_kind_that_is_none_is_told_all_that_there_are():
    with pytest.raises(ConfigError) as caught:
        registry.validate_config("postgre", {}, LOOSE)
    assert "did you mean postgres?" in caught.value.public
    for kind in registry.sources() | registry.destinations():
        assert kind in caught.value.public


def test_a_near_name_is_suggested_and_a_far_one_is_not():
    assert meant("shop-to-lak", ["shop-to-lake", "x"], else_="see") == "did you mean shop-to-lake?"
    assert meant("other", ["shop-to-lake"], else_="see") == "see"


#: For each setting of a stream another value, and what it needs beside it.
OTHERS: dict[str, object] = {
    "mode": "history", "key": ["a", "b"], "cursor": "a", "overlap": "5m", "drift": "freeze",
    "settle": "90s", "deletes": "hard", "key_sweep": 7, "tombstone": "b", "full_every": 9,
    "range_rows": 500_000, "ranges_at_once": 2, "guards": {"floor": 7},
    "columns": {"exclude": ["z"]}, "mask": {"z": "redact"}, "where": "z > 1", "rejected_max": 5,
}  # fmt: skip


@pytest.mark.parametrize("tombstone", [None, "gone"])
@pytest.mark.parametrize("name", sorted(set(StreamSpec.model_fields) - {"name"}))
def test_diff_says_read_from_the_beginning_where_destinations_do_so(name, tombstone):
    assert set(OTHERS) == set(StreamSpec.model_fields) - {"name"}
    plain = {"name": "public.t", "mode": "merge", "key": ["id"], "cursor": "at", "deletes": "soft"}
    plain |= {"tombstone": tombstone} if tombstone else {}
    old = StreamSpec.model_validate(plain)
    new = StreamSpec.model_validate({**plain, "deletes": "soft", name: OTHERS[name]})
    (line,) = _stream_differences(old, new)
    requests = [
        LoadRequest(UUID(int=1), UUID(int=2), attempt=1, fence=1, stream=spec, target_schema="s")
        for spec in (old, new)
    ]
    before, after = (definition(request) for request in requests)
    assert ("read from the beginning" in line) == (before != after), line
    if tombstone is None and name != "tombstone":  # files take none
        before, after = (definition_of_files(request, "jsonl") for request in requests)
        assert ("read from the beginning" in line) == (before != after), line
