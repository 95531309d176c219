"""Every reason of the production profile, from the settings alone."""

import re
from pathlib import Path

import pytest

from schemas.environment import load_settings
from schemas.errors import StartRefused
from schemas.profiles import DATABASE_NAMES, REDIS_NAMES, all_reasons, leads_out, refusals
from schemas.settings import Settings

PASSWORD = "hunter2-hunter2"  # noqa: S105 - made up, to be looked for in reasons
PLAIN = f"postgresql://w1:{PASSWORD}@db.example.com:5432/syncward"
DATABASE = PLAIN + "?sslmode=verify-full"
REDIS = f"rediss://syncward:{PASSWORD}@redis.example.com:6379/0"
SOUND = {"database_url": DATABASE, "redis_url": REDIS, "keyring": "file:///etc/worker.json"}


def settings(**changes: object) -> Settings:
    return Settings.model_validate({**SOUND, **changes})


@pytest.mark.parametrize("process", ["scheduler", "worker", "operator", "metrics"])
def test_protected_settings_are_not_refused(process):
    assert all_reasons(settings(), process) == []


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("database_url", PLAIN, "sslmode=verify-full"),
        ("database_url", DATABASE.replace("verify-full", "require"), "sslmode=verify-full"),
        ("database_url", DATABASE.replace("verify-full", "verify-ca"), "sslmode=verify-full"),
        ("database_url", DATABASE + "&sslmode=disable", "sslmode=verify-full"),
        (
            "database_url",
            PLAIN + "?pooler=transaction",
            "sslmode=verify-full",
        ),
        ("database_url", DATABASE + "&ssl_min_protocol_version=TLSv1.1", "TLS before 1.2"),
        ("database_url", DATABASE + "&ssl_min_protocol_version=", "TLS before 1.2"),
        ("database_url", DATABASE.replace("w1:", "postgres:"), "no login of its own"),
        ("database_url", DATABASE.replace(f"w1:{PASSWORD}@", ""), "no login of its own"),
        ("database_url", DATABASE.replace("db.example.com:5432", "%2Ftmp"), "a Unix socket"),
        ("database_url", DATABASE + "&host=/var/run/postgresql", "a Unix socket"),
        ("database_url", DATABASE + "&host=a,/tmp", "a Unix socket"),
        ("database_url", DATABASE + "&host=a,%2Ftmp&port=5432,5433", "a Unix socket"),
        ("database_url", DATABASE + "&host=a&host=@abstract", "a Unix socket"),
        ("database_url", DATABASE + "&host=a,,b", "a Unix socket"),
        ("database_url", DATABASE + "&host=,/tmp", "a Unix socket"),
        ("database_url", DATABASE + "&host=", "a Unix socket"),
        ("database_url", DATABASE.replace("db.example.com:5432", "a,%2Ftmp"), "a Unix socket"),
        ("database_url", DATABASE.replace("db.example.com:5432", ":5432"), "a Unix socket"),
        ("database_url", DATABASE + "&user=postgres", "`user`"),
        ("database_url", DATABASE + "&password=x", "`password`"),
        ("database_url", DATABASE + "&dbname=x", "`dbname`"),
        ("database_url", DATABASE + "&hostaddr=127.0.0.1", "`hostaddr`"),
        ("database_url", DATABASE + "&options=-c%20role%3Dpostgres", "`options`"),
        ("database_url", DATABASE + "&passfile=/x&service=evil", "`passfile`, `service`"),
        ("database_url", DATABASE + "&gssencmode=prefer", "`gssencmode`"),
        (
            "database_url",
            DATABASE + "&ssl_max_protocol_version=TLSv1",
            "`ssl_max_protocol_version`",
        ),
        ("database_url", DATABASE + f"&{PASSWORD}=x", "another name"),
        ("database_url", DATABASE + "&SSLMODE=disable", "another name"),
        ("database_url", DATABASE + "&require_auth=none", "require_auth"),
        ("database_url", DATABASE + "&require_auth=", "require_auth"),
        ("database_url", DATABASE + "&require_auth=password", "require_auth"),
        ("database_url", DATABASE + "&require_auth=md5,none", "require_auth"),
        ("database_url", DATABASE + "&require_auth=!scram-sha-256", "require_auth"),
        ("database_url", DATABASE + "&channel_binding=disable", "channel_binding"),
        ("database_url", DATABASE + "&port=1&port=2", "twice"),
        ("keystore_url", DATABASE + "&user=postgres", "`user`"),
        ("database_url", "not a url", "not a URL"),
        ("keystore_url", DATABASE.replace("verify-full", "prefer"), "sslmode=verify-full"),
        ("redis_url", REDIS.replace("rediss:", "redis:"), "not encrypted"),
        ("redis_url", REDIS.replace("rediss:", "redis+sentinel:") + "?master=m", "not encrypted"),
        ("redis_url", "unix://syncward:x@/run/redis.sock", "not encrypted"),
        ("redis_url", REDIS + "?ssl_cert_reqs=none", "not verified"),
        ("redis_url", REDIS + "?ssl_cert_reqs=optional", "not verified"),
        ("redis_url", REDIS + "?ssl_check_hostname=false", "is not checked"),
        ("redis_url", REDIS + "?ssl_check_hostname=n", "is not checked"),
        ("redis_url", REDIS + "?ssl_min_version=769", "TLS before 1.2"),
        ("redis_url", REDIS.replace("syncward:", ":"), "no user of its own"),
        ("redis_url", REDIS.replace("syncward:", "default:"), "no user of its own"),
        ("redis_url", REDIS + "?ssl_ciphers=NULL", "`ssl_ciphers`"),
        ("redis_url", REDIS + "?ssl_exclude_verify_flags=VERIFY_X509_STRICT", "`ssl_exclude_ver"),
        ("redis_url", REDIS + "?connection_class=x", "`connection_class`"),
        ("redis_url", REDIS + "?ssl_ca_data=x", "`ssl_ca_data`"),
        ("redis_url", REDIS + "?retry_on_timeout=1", "`retry_on_timeout`"),
        ("redis_url", REDIS + f"?{PASSWORD}=1", "another name"),
        ("redis_url", REDIS + "?ssl_ca_certs=/a&ssl_ca_certs=/b", "twice"),
        ("redis_url", REDIS.replace("syncward:", ":") + "?username=default&username=x", "twice"),
        ("keyring", "vault+http://kms.example.com/transit", "in the clear"),
    ],
)
def test_what_is_not_protected_is_refused_in_production_only(field, value, reason):
    (found,) = refusals(settings(**{field: value}), "worker")
    assert found.startswith(f"SYNCWARD_{field.upper()}: ")
    assert reason in found
    assert PASSWORD not in found
    assert refusals(settings(**{field: value}, profile="development"), "worker") == []


@pytest.mark.parametrize(
    "value",
    [
        DATABASE + "&pooler=transaction&sslrootcert=system",
        DATABASE + "&host=a,b&port=5432,5433&target_session_attrs=read-write&connect_timeout=3",
        DATABASE.replace("db.example.com:5432", "") + "&host=a:5432&host=b:5433",
        DATABASE + "&sslcert=/c&sslkey=/k&sslpassword=p&sslcrl=/r&sslcrldir=/d",
        DATABASE + "&keepalives=1&keepalives_idle=5&keepalives_interval=5&keepalives_count=2",
        DATABASE + "&require_auth=md5&channel_binding=require&tcp_user_timeout=9000",
        DATABASE + "&require_auth=scram-sha-256,md5&ssl_min_protocol_version=TLSv1.3",
        DATABASE.replace(PASSWORD, "p%40/?w"),
        DATABASE.replace("db.example.com:5432", "[2001:db8::1]:5432"),
    ],
)
def test_a_protected_database_url_of_any_form_is_taken(value):
    assert refusals(settings(database_url=value), "worker") == []


@pytest.mark.parametrize(
    "value",
    [
        REDIS.replace("rediss:", "rediss+sentinel:") + "?master=m&ssl_ca_certs=/ca.crt",
        REDIS + "?ssl_certfile=/c&ssl_keyfile=/k&ssl_password=p&ssl_ca_path=/d&db=1&protocol=3",
        REDIS + "?socket_timeout=9&socket_connect_timeout=9&health_check_interval=9",
        REDIS.replace("rediss:", "rediss+sentinel:")
        + "?master=m&sentinel_username=u&sentinel_password=p",
        REDIS + "?ssl_cert_reqs=required&ssl_check_hostname=True&ssl_min_version=771",
    ],
)
def test_a_protected_redis_url_of_any_form_is_taken(value):
    assert refusals(settings(redis_url=value), "worker") == []


def test_every_name_that_a_url_may_hold_in_production_is_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "profiles.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    for row, names in (
        ("names of control database and keystore", DATABASE_NAMES),
        ("names of Redis", REDIS_NAMES),
    ):
        assert set(re.findall(r"`(\w+)`", rows[row])) == names


@pytest.mark.parametrize(
    ("host", "refused"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True),  # noqa: S104
     ("::", True), ("10.0.0.5", True), ("metrics.example.com", True), ("", True)],
)  # fmt: skip
def test_metrics_for_other_hosts_want_a_token(host, refused):
    open_ = settings(metrics_host=host, metrics_port=9464)
    assert bool(refusals(open_, "scheduler")) == refused
    assert refusals(settings(metrics_host=host), "scheduler") == []  # not served at all
    assert bool(refusals(settings(metrics_host=host), "metrics")) == refused
    with_token = settings(metrics_host=host, metrics_port=9464, metrics_token_file=Path("t"))
    assert refusals(with_token, "scheduler") == []


@pytest.mark.parametrize(
    ("url", "leads"),
    [
        ("postgresql://u@127.0.0.1:5432/x", False),
        ("postgresql://u@127.0.0.1:5432,[::1]:6000/x", False),
        ("postgresql://u@localhost/x?host=127.0.0.1", False),
        ("postgresql://u@localhost/x?host=127.0.0.1,db.example.com", True),
        ("postgresql://u@localhost,db.example.com/x", True),
        ("redis://u@10.0.0.1:6379/0", True),
    ],
)
def test_a_url_leads_out_if_one_of_its_hosts_is_another(url, leads):
    assert leads_out(url) == leads


def test_a_command_is_not_asked_about_a_redis_that_it_does_not_use():
    assert refusals(settings(redis_url="redis://127.0.0.1"), "operator") == []


# ── the environment and dev.env ─────────────────────────────────────────────────────────────────


@pytest.fixture
def dev_env(tmp_path, monkeypatch):
    """A data directory as `up --dev` leaves it, and an environment that says nothing else."""
    (tmp_path / "dev.env").write_text(
        "SYNCWARD_PROFILE=development\n"
        "SYNCWARD_DATABASE_URL=postgresql://a:b@127.0.0.1/x\nSYNCWARD_REDIS_URL=redis://127.0.0.1\n"
    )
    monkeypatch.setenv("SYNCWARD_DATA_DIR", str(tmp_path))
    return monkeypatch


def test_the_default_is_production(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNCWARD_DATA_DIR", str(tmp_path))
    found = load_settings()
    assert (found.profile, found.embedded) == ("production", False)


@pytest.mark.usefixtures("dev_env")
def test_the_servers_of_dev_env_come_with_its_profile():
    found = load_settings()
    assert (found.profile, found.embedded) == ("development", True)


@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL"])
def test_a_forgotten_dev_env_does_not_loosen_the_rules_for_other_servers(dev_env, name):
    dev_env.setenv(f"SYNCWARD_{name}", SOUND[name.lower()])
    assert load_settings().profile == "production"


def test_production_does_not_use_the_servers_of_dev_env(dev_env):
    dev_env.setenv("SYNCWARD_PROFILE", "production")
    assert "embedded servers" in refusals(load_settings(), "scheduler")[0]
    dev_env.setenv("SYNCWARD_DATABASE_URL", DATABASE)
    dev_env.setenv("SYNCWARD_REDIS_URL", REDIS)
    assert refusals(load_settings(), "scheduler") == []


def test_unusable_values_are_told_together_with_everything_else(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNCWARD_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SYNCWARD_LEASE", "soon")
    monkeypatch.setenv("SYNCWARD_WORKER_THREADS", "none")
    monkeypatch.setenv("SYNCWARD_REDIS_URL", "redis://:secret-word@127.0.0.1")
    with pytest.raises(StartRefused) as refused:
        load_settings(process="worker")
    named = [reason.split(":")[0].split(" ")[0] for reason in refused.value.reasons]
    assert named == [
        "SYNCWARD_WORKER_THREADS", "SYNCWARD_LEASE", "SYNCWARD_DATABASE_URL", "SYNCWARD_KEYRING",
        "SYNCWARD_REDIS_URL", "SYNCWARD_REDIS_URL",
    ]  # fmt: skip
    assert "secret-word" not in str(refused.value)
