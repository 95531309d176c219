"""Masked columns: neither their plaintext nor the key reaches the destination."""

import hashlib
import hmac
import re
import struct
from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql
from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from cli.leak_search import dump, files_below, search
from connectors import masking, registry
from crypto import keyring as keyrings
from crypto.canary import make_canary
from crypto.kms import file
from crypto.pseudonyms import TOKEN_LENGTH, Pseudonyms
from embedded.postgres import Cluster
from schemas.errors import SyncwardError
from schemas.ids import new_id
from schemas.records import Batch, Column, StreamShape, WireFormat
from schemas.streams import StreamSpec
from storage import accounts, keystore
from storage.engine import transaction
from tests.world import LOOSE, OPERATOR
from workers import pseudonyms
from workers.pseudonyms import PseudonymKeys

TOKEN = re.compile(r"[0-9a-f]{32}")


# ── what a document may say ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("spec", "match"), [
    ({"mask": {"id": "redact"}}, "hmac only"),
    ({"mask": {"id": "truncate(3)"}}, "hmac only"),
    ({"mask": {"at": "hmac"}, "cursor": "at"}, "cannot be masked"),
    ({"mask": {"gone": "hmac"}, "tombstone": "gone", "deletes": "soft"}, "cannot be masked"),
    ({"mask": {"v": "truncate(0)"}}, "hmac, redact or"),
    ({"mask": {"v": "md5"}}, "hmac, redact or"),
    ({"mask": {"v": "hmac"}, "columns": {"exclude": ["v"]}}, "masked"),
])  # fmt: skip
def test_masks_that_cannot_work_are_refused(spec, match):
    with pytest.raises(ValidationError, match=match):
        StreamSpec(name="a.b", mode="merge", key=("id",), **spec)


def test_masks_that_are_not_set_are_not_written_so_that_older_workers_read_the_stream():
    plain = StreamSpec(name="a.b", mode="replace").model_dump(mode="json")
    assert not {"mask", "columns", "where"} & set(plain)
    whole = StreamSpec(name="a.b", mode="replace", mask={"v": "hmac"}, where="v = 1",
                       columns={"exclude": ["w"]})  # fmt: skip
    assert {"mask", "columns", "where"} <= set(whole.model_dump(mode="json"))
    assert StreamSpec.model_validate_json(whole.model_dump_json()) == whole


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────


def test_a_token_is_the_documented_hmac_and_of_a_fixed_length():
    ours = Pseudonyms(bytes(range(32)), "k")
    key = hmac.new(bytes(range(32)), b"syncward/pseudonyms/v1", hashlib.sha512).digest()
    wanted = hmac.new(key, "ü".encode(), hashlib.sha256).hexdigest()[:32]
    assert ours.token("ü".encode()).decode() == wanted
    assert len(ours.token(b"")) == len(ours.token(b"x" * 100_000)) == TOKEN_LENGTH
    assert bytes(range(32)).hex() not in repr(ours)


@given(st.text(), st.integers(1, 9))
def test_truncate_keeps_the_first_characters_of_any_text(text, count):
    cut = masking.mask_of(f"truncate({count})", None)
    assert cut(text.encode()).decode() == text[:count]


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────

_fields = st.lists(st.none() | st.binary(max_size=40), min_size=3, max_size=3)


def _binary(rows: list[list[bytes | None]]) -> bytes:
    out = b"PGCOPY\n\xff\r\n\x00" + struct.pack(">ii", 0, 3) + b"ext"
    for row in rows:
        out += struct.pack(">h", len(row))
        for field in row:
            out += struct.pack(">i", -1) if field is None else struct.pack(">i", len(field)) + field
    return out + struct.pack(">h", -1)


def _cut(whole: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = 0
    for size in sizes:
        yield whole[at : at + size]
        at += size
    yield whole[at:]


def _batch(chunks: Iterator[bytes], type_: str = "text") -> Batch:
    columns = tuple(Column(name, type_ if name == "b" else "bytea") for name in "abc")
    return Batch(
        StreamShape(columns), WireFormat.PG_BINARY, chunks, lambda: 0, None, None, full=True
    )


MASKED_B = StreamSpec(name="a.b", mode="replace", mask={"b": "redact"})


@given(st.lists(_fields), st.lists(st.integers(0, 60)))
def test_only_the_masked_field_changes_however_the_stream_is_cut(rows, sizes):
    batch = masking.masked(_batch(_cut(_binary(rows), sizes)), MASKED_B, None)
    wanted = [[a, None if b is None else masking.REDACTED, c] for a, b, c in rows]
    assert b"".join(batch.chunks) == _binary(wanted)


@given(st.lists(_fields, min_size=1), st.data())
def test_a_stream_that_is_cut_off_is_an_error(rows, data):
    whole = _binary(rows)
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    batch = masking.masked(_batch(iter([part])), MASKED_B, None)
    with pytest.raises(SyncwardError, match="not whole"):
        b"".join(batch.chunks)


def test_a_masked_column_that_did_not_come_as_text_is_refused():
    with pytest.raises(SyncwardError, match="did not come as text"):
        masking.masked(_batch(iter(()), "integer"), MASKED_B, None)


# ── on real databases ────────────────────────────────────────────────────────────────────────────

SECRETS = ("Gwendolyn-Abernathy-7731", "zürich-straße-geheim-88", "4929123456781234")
STREAM = (
    "{mode: merge, key: [email], mask: {email: hmac, copy: hmac, card: hmac, note: redact, "
    "street: truncate(3), tags: hmac}}"
)


def _make_people(world) -> None:
    name, street, card = SECRETS
    world.pair.source(
        "CREATE TABLE people (email text PRIMARY KEY, copy varchar(90), card bigint, note text, "
        "street text, tags text[], plain int)",
        sql.SQL("INSERT INTO people VALUES ({0}, {0}, {1}, {0}, {2}, ARRAY[{0}, NULL], 1)").format(
            name, int(card), street
        ),
        "INSERT INTO people (email, plain, street) VALUES ('second', 2, '日本語テキスト')",
    )


@pytest.fixture
def people(world):
    _make_people(world)
    world.apply({"public.people": STREAM})
    return world


def _there(world, columns: str) -> list[tuple[object, ...]]:
    return world.pair.rows("destination", f"SELECT {columns} FROM acme.people ORDER BY plain")


@pytest.mark.integration
def test_every_mask_does_what_it_says_and_null_stays_null(people):
    run, streams = people.sync()
    assert run.state == "succeeded", people.log(run.run_id)
    assert streams["people"].rows_loaded == 2
    first, second = _there(people, "email, copy, card, note, street, tags, plain")
    assert all(TOKEN.fullmatch(str(first[i])) for i in (0, 1, 2, 5))
    assert first[3:5] == ("[redacted]", "zür")
    assert first[6] == 1
    assert first[0] == first[1] != first[2]  # the same value, whatever its column and its type
    assert second[1:6] == (None, None, None, "日本語", None)
    types = people.pair.rows("destination", "SELECT DISTINCT format_type(atttypid, atttypmod) "
        "FROM pg_attribute WHERE attrelid = 'acme.people'::regclass AND attnum > 0 "
        "AND attname <> ALL ('{plain,_syncward_synced_at}')")  # fmt: skip
    assert types == [("text",)]


@pytest.mark.integration
def test_a_merge_by_a_masked_key_finds_the_same_rows_again(people):
    people.sync()
    people.pair.source(
        "UPDATE people SET plain = 3 WHERE plain = 1",
        "DELETE FROM people WHERE plain = 2",
        "INSERT INTO people (email, plain) VALUES ('x', 4)",
    )
    before = _there(people, "email")[0]
    run, streams = people.sync()
    assert run.state == "succeeded", people.log(run.run_id)
    done = streams["people"]
    assert (done.rows_inserted, done.rows_updated, done.rows_unchanged) == (1, 1, 0)
    assert (*before, 3) in _there(people, "email, plain")


@pytest.mark.integration
def test_keys_that_are_swept_are_masked_too(people):
    spec = STREAM.replace("}}", "}, cursor: xmin, deletes: hard, key_sweep: 1}")
    people.apply({"public.people": spec})
    people.sync()
    people.pair.source("DELETE FROM people WHERE plain = 2")
    run, streams = people.sync()
    assert run.state == "succeeded", people.log(run.run_id)
    assert streams["people"].rows_deleted == 1
    assert [row[0] for row in _there(people, "plain")] == [1]


@pytest.mark.integration
def test_an_integer_its_text_and_any_session_setting_have_the_same_token(world):
    world.pair.source(
        "CREATE TABLE one (id int PRIMARY KEY, a int, b text, c timestamptz, d float8)",
        "INSERT INTO one VALUES (1, 42, '42', '2026-01-02 03:04:05+00', 0.1)",
    )
    world.apply({"public.one": "{mode: replace, mask: {a: hmac, b: hmac, c: hmac, d: hmac}}"})
    world.sync()
    before = world.pair.rows("destination", "SELECT a, b, c, d FROM acme.one")
    assert before[0][0] == before[0][1]
    database = world.pair.names["source"]
    for setting in (
        "datestyle = 'German, DMY'", "timezone = 'Asia/Tokyo'", "extra_float_digits = -9",
    ):  # fmt: skip
        world.pair.source(f"ALTER ROLE reader IN DATABASE {database} SET {setting}")
    run, _ = world.sync(full_refresh=True)
    assert run.state == "succeeded"
    assert world.pair.rows("destination", "SELECT a, b, c, d FROM acme.one") == before


@pytest.mark.integration
def test_a_mask_that_is_added_later_reads_everything_again(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text)", "INSERT INTO t VALUES (1, 'clear')"
    )
    by_xmin = "{mode: merge, key: [id], cursor: xmin"
    world.apply({"public.t": by_xmin + "}"})
    world.sync()
    world.apply({"public.t": by_xmin + ", mask: {v: hmac}}"})
    world.sync()
    ((value,),) = world.pair.rows("destination", "SELECT v FROM acme.t")
    assert TOKEN.fullmatch(value)


@pytest.mark.integration
def test_a_replaced_table_whose_own_key_is_redacted_is_told_apart_by_its_rows(people):
    people.apply({"public.people": "{mode: replace, mask: {email: redact}}"})
    people.sync()
    run, streams = people.sync()
    assert run.state == "succeeded", people.log(run.run_id)
    assert streams["people"].rows_unchanged == 2
    assert {row[0] for row in _there(people, "email")} == {"[redacted]"}


@pytest.fixture
def lake(tmp_path, logins) -> Iterator[Cluster]:
    """A server for the destination alone, which logs every statement."""
    started = Cluster(tmp_path / "lake", durable=False, guard_parent=True).start()
    with psycopg.connect(
        host=started.host, port=started.port, user=started.superuser, password=started.password,
        dbname="postgres", autocommit=True,
    ) as session:  # fmt: skip
        session.execute("ALTER SYSTEM SET log_statement = 'all'")
        session.execute("ALTER SYSTEM SET log_parameter_max_length = -1")
        session.execute("SELECT pg_reload_conf()")
        session.execute(
            sql.SQL("CREATE ROLE writer LOGIN PASSWORD {}").format(sql.Literal(logins["writer"]))
        )
        session.execute("CREATE DATABASE lake OWNER writer")
        yield started
    started.stop()


@pytest.mark.integration
@pytest.mark.parametrize("masked", [True, False])
def test_nothing_that_the_destination_saw_holds_a_masked_value(world, lake, masked):
    """Its data directory with the WAL and its log; without masks the search finds all of it."""
    world.pair.changes["destination"] = {
        "host": lake.host, "port": lake.port, "database": "lake",
    }  # fmt: skip
    _make_people(world)
    deleting = STREAM.replace("}}", "}, cursor: xmin, deletes: hard, key_sweep: 1}")
    without = "{mode: merge, key: [email], cursor: xmin}"
    world.apply({"public.people": deleting if masked else without})
    for statement in ("SELECT 1", "UPDATE people SET plain = 9 WHERE plain = 1",
                      "DELETE FROM people WHERE plain = 2"):  # fmt: skip
        world.pair.source(statement)
        run, _ = world.sync()
        assert run.state == "succeeded", world.log(run.run_id)
    with psycopg.connect(
        host=lake.host, port=lake.port, user=lake.superuser, password=lake.password,
        dbname="lake", autocommit=True,
    ) as session:  # fmt: skip
        ((rows,),) = session.execute("SELECT count(*) FROM acme.people").fetchall()
        session.execute("CHECKPOINT")
    assert rows == (1 if masked else 2)
    assert b"COPY" in lake.log_path.read_bytes()
    stored = world.control.one("SELECT wrapped FROM keystore.dek LIMIT 1")
    assert stored
    found = search([*files_below(lake.root, "lake"), dump(lake, "lake")], SECRETS)
    assert found.bytes > 10_000_000
    assert {hit.secret for hit in found.hits} == (set() if masked else set(range(len(SECRETS))))


@pytest.mark.integration
def test_the_key_reaches_neither_the_destination_nor_the_control_database(world, lake, monkeypatch):
    """A key that the test chose is searched in every form."""
    chosen = "Chosen-Key-Of-Pseudonyms-0123456"
    world.pair.changes["destination"] = {
        "host": lake.host, "port": lake.port, "database": "lake",
    }  # fmt: skip
    monkeypatch.setattr(pseudonyms, "new_dek", lambda: (new_id(), chosen.encode()))
    _make_people(world)
    world.apply({"public.people": STREAM})
    run, _ = world.sync()
    assert run.state == "succeeded", world.log(run.run_id)
    control = dump(world.control.cluster, world.control.database)
    found = search([*files_below(lake.root, "lake"), dump(lake, "lake"), control], [chosen])
    assert found.bytes > 10_000_000
    assert found.hits == []


# ── the key ──────────────────────────────────────────────────────────────────────────────────────


def _of(world, account: str) -> Pseudonyms:
    with world.cli.transaction() as tx:
        account_id = accounts.get(tx, account).account_id
    return PseudonymKeys.of_worker(world.deps).of(account_id)


@pytest.mark.integration
def test_an_account_has_one_key_and_another_account_another(world):
    world.account()
    world.account("other")
    ours, again, theirs = _of(world, "acme"), _of(world, "acme"), _of(world, "other")
    assert ours.token(b"v") == again.token(b"v") != theirs.token(b"v")
    assert world.control.one("SELECT count(*) FROM keystore.dek WHERE purpose = 'pseudonyms'") == 2
    made = [event for event in world.events() if event == "keys.created"]
    assert len(made) == 2


@pytest.mark.integration
def test_the_key_survives_a_new_root_of_credentials_and_new_data_keys(people):
    people.sync()
    before = _there(people, "email, copy, card, tags")
    upkeep = people.key_upkeep()
    worker_file = people.directory / "keys" / "worker.json"
    operator_file = people.directory / "keys" / "operator.json"
    root = file.add_root(operator_file, worker_file, "credentials")
    keyring = keyrings.load(str(operator_file))
    with people.cli.transaction() as tx:
        added = keystore.RootOffer(
            root, "credentials", "file",
            lambda: make_canary(keyring, "credentials"),
        )  # fmt: skip
        assert keystore.add_root(tx, tx, added, OPERATOR)
        (known,) = [r for r in keystore.roots(tx) if r.root_id == root]
        keystore.activate(tx, tx, known, OPERATOR)
        keystore.replace(tx, tx, None, OPERATOR)
    upkeep.look()
    wrapped_by = people.control.all(
        "SELECT root_id, state FROM keystore.dek WHERE purpose = 'pseudonyms'"
    )
    assert wrapped_by == [(root, "active")]
    run, streams = people.sync(full_refresh=True)
    assert run.state == "succeeded", people.log(run.run_id)
    assert streams["people"].rows_unchanged == 2
    assert _there(people, "email, copy, card, tags") == before


@pytest.mark.integration
def test_a_key_that_does_not_open_is_not_replaced(people):
    people.sync()
    people.control.act("UPDATE keystore.dek SET wrapped = '\\x00' || substr(wrapped, 2) "
                       "WHERE purpose = 'pseudonyms'")  # fmt: skip
    run, streams = people.sync()
    assert run.state == "failed"
    assert "key of pseudonyms cannot be opened" in streams["people"].error
    assert people.control.one("SELECT count(*) FROM keystore.dek WHERE purpose = 'pseudonyms'") == 1


@pytest.mark.integration
def test_shredding_the_account_destroys_the_key(world):
    world.account()
    _of(world, "acme")
    with world.cli.transaction() as tx:
        account_id = accounts.get(tx, "acme").account_id
        keystore.shred_account(tx, account_id)
        assert keystore.pending(tx, []).rewrap == 0
    assert world.control.one("SELECT count(*) FROM keystore.dek") == 0


@pytest.mark.integration
def test_only_workers_are_given_the_wrapped_key(world):
    world.account()
    with (
        transaction(world.control.engine("operator")) as tx,
        pytest.raises(DBAPIError, match="denied"),
    ):
        tx.execute(text("SELECT * FROM keystore.pseudonym_key(gen_random_uuid())"))


@pytest.mark.integration
def test_a_keystore_apart_keeps_the_key(apart):
    apart.account()
    assert _of(apart, "acme").token(b"v") == _of(apart, "acme").token(b"v")
    assert apart.control.one("SELECT count(*) FROM keystore.dek WHERE purpose = 'pseudonyms'") == 0


@pytest.mark.integration
def test_rows_for_other_connectors_are_masked_by_the_same_rules(pair):
    pair.source(
        "CREATE TABLE r (id int PRIMARY KEY, v text, n int)",
        "INSERT INTO r VALUES (1, 'ü', 42), (2, NULL, NULL)",
    )
    stream = StreamSpec(name="public.r", mode="replace", mask={"v": "hmac", "n": "hmac"})
    ours = Pseudonyms(bytes(range(32)), "k")
    source = registry.open_source("postgres", pair.config("source"), pair.secret("source"), LOOSE)
    rows = []
    with source.extract(stream, None, WireFormat.ROWS) as batches:
        for batch in batches:
            groups = masking.masked(batch, stream, ours.token).groups
            rows += [row for group in groups for row in group.rows]
    source.close()
    tokens = [ours.token(text.encode()).decode() for text in ("ü", "42")]
    assert sorted(rows) == [(1, *tokens), (2, None, None)]
