"""What SYNCWARD_AUDIT_ANCHORS may say, and what it may not."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from schemas import anchors
from schemas.anchors import FileAnchor, S3Anchor, SyslogAnchor
from schemas.profiles import all_reasons, refusals
from schemas.settings import Settings

S3 = "s3://bucket/a/b?endpoint=https://s3.example.com&region=eu-1&retain_days=400"
SYSLOG = "syslog+tls://log.example.com?ca=/etc/ca.crt"
FILE = "file:///mnt/one/a%20b.anchor"


def test_each_kind_is_read_with_its_options():
    found = anchors.parse(f"{FILE}\n {SYSLOG}&cert=/c&key=/k&name=c {S3}&mode=GOVERNANCE&ca=/ca")
    assert found.reasons == ()
    assert found.anchors == (
        FileAnchor(Path("/mnt/one/a b.anchor")),
        SyslogAnchor("log.example.com", 6514, Path("/etc/ca.crt"), Path("/c"), Path("/k"), "c"),
        S3Anchor("bucket", "a/b", "https://s3.example.com", "eu-1", 400, "GOVERNANCE", Path("/ca")),
    )  # fmt: skip
    assert [one.kind for one in found.anchors] == ["file", "syslog", "s3"]


@pytest.mark.parametrize(("uri", "why"), [
    ("", "names no anchor"),
    (" ".join([FILE] * 9), "9 anchors; 8 are the most"),
    ("ftp://x/y", "an unknown kind"),
    ("/var/log/x", "an unknown kind"),
    ("syslog://x", "an unknown kind"),
    ("file://host/x", "three slashes"),
    ("file:relative", "three slashes"),
    ("file:///a/../b", "plain absolute path"),
    ("file:///a/", "plain absolute path"),
    ("file:///a?fsync=off", "does not know; there are: none"),
    ("file:///a#b", "write %23"),
    ("syslog+tls://h", "ca= is missing"),
    ("syslog+tls://?ca=/x", "write syslog+tls://host"),
    ("syslog+tls://h?ca=x", "ca= must be an absolute path"),
    ("syslog+tls://h?ca=/x&cert=/y", "cert= and key= go together"),
    ("syslog+tls://h?ca=/x&ca=/y", "there twice"),
    ("syslog+tls://h?ca=/x&verify=off", "does not know"),
    ("syslog+tls://user:secret@h?ca=/x", "a login does not belong"),
    ("syslog+tls://h:99999?ca=/x", "not a URI"),
    (f"{S3}&secret=x", "does not know"),
    (S3.replace("bucket", "KEY:SECRET@bucket"), "a login does not belong"),
    (S3.replace("https://", "https://u:p@"), "without a login"),
    (S3.replace("https:", "http:"), "only a store on this host"),
    (S3.replace("https:", "ftp:"), "endpoint= must be"),
    (S3.replace("400", "0"), "from 1 to"),
    (S3.replace("400", "-1"), "from 1 to"),
    (S3.replace("400", "٣"), "from 1 to"),
    (f"{S3}&mode=NONE", "COMPLIANCE or GOVERNANCE"),
    ("s3://bucket", "endpoint=, region=, retain_days= is missing"),
])  # fmt: skip
def test_what_cannot_be_used_is_named_by_its_number_and_never_quoted(uri, why):
    (reason,) = anchors.parse(uri).reasons
    assert why in reason
    assert "secret" not in reason.lower()
    with pytest.raises(ValidationError, match="audit_anchors"):
        Settings(audit_anchors=uri)


def test_every_reason_is_told_at_once():
    found = anchors.parse(f"ftp://x {FILE} s3://b")
    assert [r.partition(":")[0] for r in found.reasons] == ["anchor 1", "anchor 3"]
    assert len(found.anchors) == 1


def sealer(**changes: object) -> Settings:
    return Settings.model_validate({
        "profile": "production", "audit_signing_key": "/etc/syncward/signer.json",
        "database_url": "postgresql://s:p@db.example.com/x?sslmode=verify-full",
        "audit_anchors": f"{FILE} {SYSLOG}", **changes,
    })  # fmt: skip


def test_production_takes_two_anchors_at_two_places():
    assert all_reasons(sealer(), "sealer") == []


@pytest.mark.parametrize(("changes", "why"), [
    ({"audit_anchors": FILE}, "at least two anchors"),
    ({"audit_anchors": f"{FILE} file:///mnt/one/other"}, "anchors 1 and 2 are at the same place"),
    ({"audit_anchors": f"{FILE} {SYSLOG} {SYSLOG}&name=x"}, "anchors 2 and 3 are at the same"),
    ({"audit_anchors": f"{FILE} {S3} {S3}&mode=GOVERNANCE"}, "anchors 2 and 3 are at the same"),
    ({"audit_anchors": f"{FILE} " + S3.replace("https://s3.example.com", "http://127.0.0.1:9000")},
     "anchor 2: the link is not encrypted"),
    ({"audit_signing_key": "/srv/syncward/audit/k.json", "data_dir": "/srv/syncward"},
     "the key is in the data directory"),
])  # fmt: skip
def test_production_refuses(changes, why):
    (reason,) = all_reasons(sealer(**changes), "sealer")
    assert why in reason
    assert reason.startswith("SYNCWARD_AUDIT_")
    assert refusals(sealer(**changes, profile="development"), "sealer") == []
    assert refusals(sealer(**changes), "worker") == []


def test_what_a_sealer_needs_is_named_together():
    bare = Settings.model_validate({"profile": "production"})
    assert [r.split()[0] for r in all_reasons(bare, "sealer")] == [
        "SYNCWARD_DATABASE_URL", "SYNCWARD_AUDIT_SIGNING_KEY", "SYNCWARD_AUDIT_ANCHORS",
    ]  # fmt: skip


def test_anchors_are_services_of_our_own():
    own = sealer(audit_anchors=f"{FILE} {SYSLOG} {S3}").link_policy().own
    assert {("log.example.com", 6514), ("s3.example.com", 443)} <= own
