"""T8: no secret is found in what an installation leaves behind, and the search can find one."""

from base64 import b64encode

import pytest

from cli import leak_search
from cli.leak_search import Place
from tests.security import canary

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_one_canary_of_each_fate_leaves_no_trace_and_the_planted_control_is_found(tmp_path):
    verdict = canary.run(len(canary.FATES), leak=False, root=tmp_path)
    assert verdict.leaks == []
    assert verdict.control == frozenset(canary.PLACES)


@pytest.mark.full
def test_fifty_canaries_leave_no_trace(tmp_path):
    verdict = canary.run(50, leak=False, root=tmp_path)
    assert verdict.leaks == []
    assert verdict.control == frozenset(canary.PLACES)


@pytest.mark.full
def test_a_leaked_canary_is_found_wherever_it_lies(tmp_path):
    verdict = canary.run(len(canary.FATES), leak=True, root=tmp_path)
    assert not verdict.good
    found = {leak.split(" in ")[1].replace("/", " ").split(" ")[0] for leak in verdict.leaks}
    assert found == set(canary.PLACES)


@pytest.mark.parametrize("form", sorted(leak_search.forms("p ä'ss\"w/rd+")))
@pytest.mark.parametrize("before", [0, 1, 2, 1_000])
def test_every_form_is_found_in_the_middle_of_other_bytes(form, before):
    secret = "p ä'ss\"w/rd+"  # noqa: S105 - made up
    content = b"x" * before + leak_search.forms(secret)[form] + b"y" * 1_000
    searched = leak_search.search([Place("somewhere", (content,))], ["another one", secret])
    assert {hit.secret for hit in searched.hits} == {1}


def test_a_secret_across_two_pieces_of_a_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(leak_search, "_PIECE", 64)
    (tmp_path / "file").write_bytes(b"x" * 60 + b"correct-horse-battery" + b"y" * 60)
    searched = leak_search.search(
        leak_search.files_below(tmp_path, "files"), ["correct-horse-battery"]
    )
    assert {(hit.place, hit.form) for hit in searched.hits} >= {("files/file", "raw")}


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r\n ", b"\\n", b"\\r\\n", b"%0D%0A"], ids=repr)
@pytest.mark.parametrize("width", [64, 76, 7])
def test_base64_that_is_broken_into_lines_is_found(end, width):
    secret = "a-correct-horse-and-a-battery-that-is-a-staple"  # noqa: S105 - made up
    written = b64encode(b"x" * 31 + secret.encode() + b"y" * 99)
    content = end.join(written[i : i + width] for i in range(0, len(written), width))
    searched = leak_search.search([Place("mail", (b"-- ", content))], ["another one", secret])
    assert {(hit.secret, hit.form) for hit in searched.hits} == {(1, "base64 +1")}
    assert leak_search.search([Place("mail", (content[::-1],))], [secret]).hits == []


@pytest.mark.parametrize(
    "written",
    ["'it''s-a-\"secret\"-é'", "IT'S-A-\"SECRET\"-É", "it's-a-\"secret\"-\\303\\251",
     "69:74:27:73:2d:61:2d:22:73:65:63:72:65:74:22:2d:c3:a9",
     "it%2527s-a-%2522secret%2522-%25C3%25A9",
     "it's-a-\"\"secret\"\"-é"],
)  # fmt: skip
def test_what_databases_shells_and_resolvers_make_of_a_secret_is_found(written):
    searched = leak_search.search([Place("log", (written.encode(),))], ['it\'s-a-"secret"-é'])
    assert len(searched.hits) == 1
