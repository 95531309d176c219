"""`syncward doctor crypto|tls|disk`: what is wrong with keys, links and disks, on real ones."""

import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from cli.checks import AREAS
from cli.checks.crypto import Keys
from cli.checks.disk import Disks, _swaps, encrypted
from cli.checks.tls import Links
from crypto import keyring as keyrings
from crypto.roots import RootStatus
from schemas.health import LinkHealth, SecretsHealth
from tests.protected import PASSWORD, protect
from tests.tls_proxy import TlsProxy, certificate

pytestmark = pytest.mark.integration


def wrong(shell, *areas: str) -> dict[str, str]:
    code, out, _ = shell("doctor", *areas, "--json")
    answer = json.loads(out)
    assert PASSWORD not in out
    found = {f"{c['area']}.{c['name']}": c["wrong"] for c in answer["checks"] if c["wrong"]}
    assert (code, answer["ok"]) == ((1, False) if found else (0, True))
    return found


@pytest.fixture
def sound(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": "{mode: replace}"})
    return world


# ── keys ────────────────────────────────────────────────────────────────────────────────────────


def test_keys_are_asked_in_earnest(sound, shell):
    keys = sound.directory / "keys"
    assert wrong(shell, "crypto") == {}
    document = json.loads((keys / "operator.json").read_text())
    for root in document["roots"]:
        root["created_at"] = (datetime.now(UTC) - timedelta(days=400)).isoformat()
    (keys / "operator.json").write_text(json.dumps(document))
    sound.control.act("UPDATE keystore.dek SET state = 'decrypt_only'")
    sound.control.act("UPDATE credentials SET short = true")
    found = wrong(shell, "crypto")
    assert set(found) == {
        "crypto.root_age", "crypto.rotation", "crypto.short_secrets",
    }  # fmt: skip
    assert found["crypto.root_age"] == "credentials: 400 days; records: 400 days"
    assert found["crypto.rotation"] == "2 data keys are still to replace"
    assert found["crypto.short_secrets"] == "2 resources: acme/lake, acme/shop"


def test_a_secret_that_was_made_longer_is_no_finding_any_more(sound, shell):
    sound.control.act("UPDATE credentials SET short = true")
    sound.control.act(
        "INSERT INTO credentials (resource_id, field, version, account_id, envelope, fingerprint) "
        "SELECT resource_id, field, version + 1, account_id, envelope, fingerprint FROM credentials"
    )
    assert set(wrong(shell, "crypto")) == {"crypto.stored_secrets"}  # no event says so


def test_a_keyring_of_another_installation_or_with_loose_permissions_is_found(
    sound, shell, monkeypatch
):
    operator, _ = keyrings.init(sound.directory / "other")
    monkeypatch.setenv("SYNCWARD_KEYRING", str(operator))
    assert set(wrong(shell, "crypto")) == {"crypto.root_in_use"}
    operator.chmod(0o644)
    assert "others can read it" in wrong(shell, "crypto")["crypto.keyring"]
    operator.chmod(0o600)
    operator.parent.chmod(0o777)
    assert "others can replace files" in wrong(shell, "crypto")["crypto.keyring"]
    monkeypatch.delenv("SYNCWARD_KEYRING")
    assert "is not set" in wrong(shell, "crypto")["crypto.keyring"]


# ── links ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def production(world, tmp_path, admin, shell, monkeypatch):
    with protect(world, tmp_path, admin) as made:
        for name, value in made.of("o").items():
            monkeypatch.setenv(f"SYNCWARD_{name.upper()}", str(value))
        monkeypatch.setenv("SYNCWARD_PROFILE", "production")
        monkeypatch.setenv("SYNCWARD_KEYRING", str(world.directory / "keys" / "operator.json"))
        yield made
    del shell


def test_every_link_is_tried_and_its_certificate_read(production, shell):
    code, out, _ = shell("doctor", "tls", "--json")
    checks = {c["name"]: c for c in json.loads(out)["checks"]}
    found = {name: c["wrong"] for name, c in checks.items() if c["wrong"]}
    assert code == 1
    # The proxy of this test ends TLS before the server, whose certificate lasts for an hour.
    assert found == {
        "encrypted": "control database: something between ends TLS",
        "certificates": "control database: in 0 days; Redis: in 0 days",
        "resources": "2 resources have an sslmode below verify-full: acme/lake, acme/shop",
    }
    assert checks["encrypted"]["note"] == "control database TLSv1.3; Redis TLSv1.3"
    body = production.world.control.one("SELECT body FROM audit.event ORDER BY seq DESC LIMIT 1")
    assert '"reason":"doctor tls"' in str(body)


def test_plain_links_are_found_where_they_lead_out_or_production_wants_them_closed(
    production, shell, monkeypatch
):
    settings = production.world.cli.settings
    monkeypatch.setenv("SYNCWARD_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("SYNCWARD_REDIS_URL", settings.redis_url.get_secret_value())
    found = wrong(shell, "tls", "redis")
    assert found["tls.encrypted"] == "control database: in the clear; Redis: in the clear"
    assert "not encrypted" in found["redis.reachable"]
    assert "SYNCWARD_REDIS_URL: the link to Redis is not encrypted" in found["tls.settings"]
    assert "sslmode=verify-full" in found["tls.settings"]
    monkeypatch.setenv("SYNCWARD_PROFILE", "development")
    assert wrong(shell, "tls") == {}


def test_a_kms_is_tried_like_every_other_link(production, shell, monkeypatch, tmp_path):
    files = certificate(tmp_path, "localhost")
    keyring = "vault://localhost:{}/transit/x?token=/none&ca=" + str(files[0])
    cluster = production.world.control.cluster
    with TlsProxy((cluster.host, cluster.port), files, begin="at_once") as proxy:
        monkeypatch.setenv("SYNCWARD_KEYRING", keyring.format(proxy.port))
        assert "KMS: in 0 days" in wrong(shell, "tls")["tls.certificates"]
        other = certificate(tmp_path, "elsewhere.example.com")[0]
        monkeypatch.setenv(
            "SYNCWARD_KEYRING", keyring.format(proxy.port).replace(str(files[0]), str(other))
        )
        assert "KMS: the certificate of localhost" in wrong(shell, "tls")["tls.links"]
    monkeypatch.setenv("SYNCWARD_KEYRING", keyring.format(1))
    assert "KMS: localhost:1" in wrong(shell, "tls")["tls.links"]


def test_a_certificate_for_another_name_is_found(production, shell, monkeypatch, tmp_path):
    files = certificate(tmp_path, "elsewhere.example.com")
    cluster = production.world.control.cluster
    with TlsProxy((cluster.host, cluster.port), files) as proxy:
        monkeypatch.setenv(
            "SYNCWARD_DATABASE_URL",
            f"postgresql://o:{PASSWORD}@localhost:{proxy.port}/x?sslmode=verify-full"
            f"&sslrootcert={files[0]}",
        )
        found = wrong(shell, "tls")
    assert "is not good" in found["tls.links"]
    monkeypatch.setenv("SYNCWARD_DATABASE_URL", f"postgresql://o:{PASSWORD}@localhost:1/x")
    assert "cannot be reached" in wrong(shell, "tls")["tls.links"]
    monkeypatch.delenv("SYNCWARD_DATABASE_URL")
    assert "is not set" in wrong(shell, "tls")["tls.configured"]


def test_production_wants_the_halves_of_keys_apart_and_the_keystore_too(production, shell):
    found = wrong(shell, "crypto")
    assert set(found) == {"crypto.split", "crypto.keystore"}
    worker_file = production.world.directory / "keys" / "worker.json"
    assert str(worker_file) in found["crypto.split"]
    os.unlink(worker_file)  # noqa: PTH108 - one call
    assert set(wrong(shell, "crypto")) == {"crypto.keystore"}


# ── disks ───────────────────────────────────────────────────────────────────────────────────────


def test_the_disks_of_this_host_are_asked_in_earnest(production, shell, monkeypatch):
    del production
    found = {name for name in wrong(shell, "disk") if name != "disk.encryption"}
    assert found <= {"disk.swap", "disk.core_files", "disk.space"}  # as this machine is
    monkeypatch.setenv("SYNCWARD_DISK_ENCRYPTION_ATTESTED", "Ada, 2026-11-01")
    assert "disk.encryption" not in wrong(shell, "disk")
    text = shell("doctor", "disk")[1]
    assert "ok     disk.encryption (attested, not seen by doctor: Ada, 2026-11-01)" in text


def kernel(root: Path, name: str, uuid: str | None = None, *, of: tuple[str, ...] = ()) -> Path:
    """Lay out a block device as the kernel shows it."""
    device = root / name
    (device / "slaves").mkdir(parents=True)
    if uuid is not None:
        (device / "dm").mkdir()
        (device / "dm" / "uuid").write_text(uuid)
    for part in of:
        (device / "slaves" / part).symlink_to(root / part)
    return device


def test_a_device_is_encrypted_if_all_it_lies_on_is(tmp_path):
    kernel(tmp_path, "8:1")
    kernel(tmp_path, "253:0", "CRYPT-LUKS2-0123-data", of=("8:1",))
    kernel(tmp_path, "253:1", "LVM-volume", of=("253:0",))
    kernel(tmp_path, "253:2", "LVM-spread", of=("253:0", "8:1"))
    kernel(tmp_path, "253:3", "LVM-plain", of=("8:1",))
    found = [encrypted(os.makedev(*where), tmp_path)
             for where in ((8, 1), (253, 0), (253, 1), (253, 2), (253, 3), (0, 45))]  # fmt: skip
    assert found == [False, True, True, False, False, None]


def test_swap_in_memory_is_no_finding_and_a_file_is():
    table = "Filename Type Size Used Priority\n/dev/zram0 partition 1 0 100\n/none file 1 0 -2\n"
    assert _swaps(table) == ("/none",)


# ── by the facts alone ──────────────────────────────────────────────────────────────────────────

NOW = datetime.now(UTC)
ID = UUID(int=1)
ROOT = RootStatus("credentials", ID, NOW, "active", can_wrap=True, can_unwrap=False, fingerprint="")
STORED = SecretsHealth({"credentials": ID}, 0, 0, ())
KEYS = Keys(production=True, roots=(ROOT,), stored=STORED)
LINKS = Links(
    (LinkHealth("Redis", version="TLSv1.3", expires_at=NOW + timedelta(days=90)),), (), ()
)
DISKS = Disks(
    production=True, free={"/d": 1 << 40}, plain=(), unknown=(), database_here=True, attested=None,
    swaps=(), cores=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("area", "facts", "name"),
    [
        ("crypto", replace(KEYS, broken="self-test: wrong"), "self_test"),
        ("crypto", replace(KEYS, opens_credentials=True), "split"),
        ("crypto", replace(KEYS, apart=False), "keystore"),
        ("crypto", replace(KEYS, stored=replace(STORED, rewrap=3)), "rotation"),
        ("tls", replace(LINKS, tried=(LinkHealth("Redis", "is away"),)), "links"),
        ("tls", replace(LINKS, tried=(LinkHealth("Redis"),)), "encrypted"),
        ("tls", replace(LINKS, weak=tuple("abcdefg")), "resources"),
        ("disk", replace(DISKS, free={"/d": 1 << 20}), "space"),
        ("disk", replace(DISKS, plain=("/d",)), "encryption"),
        ("disk", replace(DISKS, unknown=("/d",)), "encryption"),
        ("disk", replace(DISKS, database_here=False), "encryption"),
        ("disk", replace(DISKS, swaps=("/dev/sda2",)), "swap"),
        ("disk", replace(DISKS, cores="the limit of core files is not 0"), "core_files"),
    ],
)
def test_facts_that_are_wrong_are_found(area, facts, name):
    assert [check.name for check in AREAS[area].checks if check.wrong(facts)] == [name]


@pytest.mark.parametrize(("area", "facts"), [("crypto", KEYS), ("tls", LINKS), ("disk", DISKS)])
def test_facts_that_are_right_are_not(area, facts):
    assert [check.name for check in AREAS[area].checks if check.wrong(facts)] == []


@pytest.mark.parametrize("area", ["crypto", "disk"])
def test_development_is_spared_what_only_production_needs(area):
    facts = {
        "crypto": replace(KEYS, production=False, opens_credentials=True, apart=False),
        "disk": replace(DISKS, production=False, plain=("/d",), swaps=("/s",), cores="not 0"),
    }[area]
    assert [check.name for check in AREAS[area].checks if check.wrong(facts)] == []
