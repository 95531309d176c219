"""Statements of the sealer: nobody without the key makes one, or changes one."""

from uuid import UUID

import pytest

from audit import statement
from crypto import signing
from schemas.audit import AuditAction

LOG = UUID(int=7)
DETAIL: statement.Detail = {"before": "a", "after": "b", "size": 3, "lost_root": None}


@pytest.fixture
def signer(tmp_path):
    signing.init(tmp_path / "audit" / "signer.json")
    return signing.load(tmp_path / "audit" / "signer.json")


def said(signer):
    return statement.signed(signer, LOG, AuditAction.SIGNER_ROTATED, DETAIL)


def test_a_statement_is_accepted_with_the_key_that_signed_it(signer):
    assert statement.is_signed(LOG, "signer.rotated", said(signer), signer.public)


@pytest.mark.parametrize("change", [
    {"after": "c"}, {"size": 4}, {"more": "x"}, {"signature": ""}, {"signature": None},
    {"signature": "— somebody AAAA\n"},
])  # fmt: skip
def test_a_changed_statement_is_not(signer, change):
    assert not statement.is_signed(LOG, "signer.rotated", {**said(signer), **change}, signer.public)


def test_a_statement_counts_for_its_log_its_action_and_its_key_only(signer, tmp_path):
    signing.init(tmp_path / "other" / "signer.json")
    other = signing.load(tmp_path / "other" / "signer.json")
    assert not statement.is_signed(UUID(int=8), "signer.rotated", said(signer), signer.public)
    assert not statement.is_signed(LOG, "audit.pruned", said(signer), signer.public)
    assert not statement.is_signed(LOG, "signer.rotated", said(signer), other.public)
    assert not statement.is_signed(LOG, "signer.rotated", DETAIL, signer.public)


def test_no_signature_an_unknown_key_and_a_forgery_are_three_things(signer, tmp_path):
    signing.init(tmp_path / "other" / "signer.json")
    other = signing.load(tmp_path / "other" / "signer.json")
    good = said(signer)
    assert statement.signers(LOG, "signer.rotated", good, signer.public) == [signer.public[0]]
    assert statement.signers(LOG, "signer.rotated", good, other.public) == []
    for bad in ({**DETAIL}, {**DETAIL, "signature": ""}, {**good, "after": "x"}):
        with pytest.raises(ValueError, match=r"signed|forged"):
            statement.signers(LOG, "signer.rotated", bad, signer.public)
