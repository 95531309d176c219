"""No link leads to what the policy forbids, in whatever way the address is written (T28)."""

import json
import socket
import threading
from contextlib import suppress
from dataclasses import replace

import pytest

from connectors.egress import EgressRefused, resolve
from connectors.postgres import link as postgres
from connectors.postgres.link import PostgresConfig
from schemas.egress import LinkPolicy, endpoints, parse_openings
from schemas.errors import ConfigError, SyncwardError, TransientError
from schemas.runs import RunState
from schemas.settings import Settings
from tests.world import LOOSE

PRODUCTION = LinkPolicy()

FORBIDDEN = [
    # this machine
    "127.0.0.1", "127.255.255.254", "::1", "::", "0.0.0.1", "0.1.2.3", "::ffff:127.0.0.1",
    "::ffff:7f00:1", "::127.0.0.1", "::ffff:0:127.0.0.1",
    # metadata and link-local
    "169.254.169.254", "169.254.0.1", "::ffff:169.254.169.254", "fe80::1", "fe80::1%eth0",
    "fd00:ec2::254", "fd20:ce::254", "168.63.129.16", "100.100.100.200", "192.0.0.192",
    # IPv4 inside of IPv6
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "2002:7f00:1::", "2002:a9fe:a9fe::1",
    "2001:0:7f00:1::1",
    # private, carrier, documentation, benchmarks
    "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "192.0.0.8",
    "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
    "fc00::1", "fd12:3456::1", "fec0::1", "2001:db8::1", "2001:2::1", "3fff::1", "100::1",
    "2620:4f:8000::1", "5f00::1",
    # groups and broadcast
    "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "ff02::1", "ff0e::1",
]  # fmt: skip
ALLOWED = [
    "1.1.1.1", "9.255.255.255", "11.0.0.1", "172.15.255.255", "172.32.0.1", "100.63.255.255",
    "100.128.0.1", "169.253.255.255", "168.63.129.15", "192.167.255.255", "223.255.255.255",
    "2606:4700::1", "2a00:1450::1", "::ffff:1.1.1.1",
]  # fmt: skip


def answering(*answers: str):
    return lambda _host, _port: list(answers)


@pytest.mark.parametrize("address", FORBIDDEN)
def test_no_name_leads_to_a_forbidden_address(address):
    with pytest.raises(EgressRefused):
        resolve("shop.example", 5432, PRODUCTION, lookup=answering(address))


@pytest.mark.parametrize("address", ALLOWED)
def test_a_public_address_passes_and_is_what_the_link_goes_to(address):
    pinned = resolve("shop.example", 5432, PRODUCTION, lookup=answering(address))
    assert (pinned.host, pinned.addresses) == ("shop.example", (address,))


@pytest.mark.parametrize("address", FORBIDDEN)
@pytest.mark.parametrize("before", [True, False])
def test_one_forbidden_answer_among_good_ones_is_enough(address, before):
    answers = (address, "1.1.1.1") if before else ("1.1.1.1", address)
    with pytest.raises(EgressRefused):
        resolve("shop.example", 5432, PRODUCTION, lookup=answering(*answers))


def test_every_refusal_reads_the_same():
    own = replace(PRODUCTION, own=frozenset({("shop.example", 5432)}))
    said = set()
    for policy, address in [*((PRODUCTION, a) for a in FORBIDDEN), (own, "1.1.1.1")]:
        with pytest.raises(EgressRefused) as caught:
            resolve("shop.example", 5432, policy, lookup=answering(address))
        said.add((caught.value.public, caught.value.code))
    assert len(said) == 1


WRITTEN = [
    "127.0.0.1", "127.1", "127.0.1", "0x7f.1", "0x7f000001", "2130706433", "017700000001",
    "0177.0.0.1", "0", "localhost", "LOCALHOST", "::1", "[::1]", "::ffff:127.0.0.1",
    "0:0:0:0:0:ffff:7f00:1", "①②⑦.⓪.⓪.①", "127。0。0。1", "\uff11\uff12\uff17.0.0.1", "localhost.",
    "127.0.0.1:5432", "user@127.0.0.1", "127.0.0.1/", "127.0.0.1#", "127.0.0.1 ",
    "ip6-localhost", "::1%lo", "%00127.0.0.1", "127.0.0.1\n", "1.1.1.1,127.0.0.1", "/run",
    "@/run", "127.0.0.1?options=-c", "", "localhost\x00.example",
]  # fmt: skip


class Listener:
    """Counts who connects, over IPv4 and IPv6."""

    def __init__(self) -> None:
        self.accepted = 0
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port = self._sockets[0].getsockname()[1]
        with suppress(OSError):  # a machine without IPv6
            self._sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))
        for one in self._sockets:
            threading.Thread(target=self._accept, args=(one,), daemon=True).start()

    def _accept(self, one: socket.socket) -> None:
        with suppress(OSError):
            while True:
                link, _ = one.accept()
                self.accepted += 1
                link.close()

    def close(self) -> None:
        for one in self._sockets:
            one.close()


@pytest.fixture
def listener():
    made = Listener()
    yield made
    made.close()


def try_to_connect(host: str, port: int, policy: LinkPolicy) -> None:
    config = PostgresConfig.model_construct(
        host=host, port=port, database="shop", user="reader", sslmode="verify-full",
        sslrootcert=None, channel_binding="require",
    )  # fmt: skip
    postgres.connect(config, {"password": "x"}, role="source", session={}, policy=policy)


@pytest.mark.integration
def test_no_way_to_write_loopback_sends_a_packet_there(listener):
    """Past the check of the resource's fields, with the resolver that workers have."""
    for host in WRITTEN:
        with pytest.raises(SyncwardError) as caught:
            try_to_connect(host, listener.port, PRODUCTION)
        assert isinstance(caught.value, ConfigError | TransientError), host
        assert caught.value.code in {"egress_refused", "config", "no_host", "dns"}, host
    assert listener.accepted == 0
    with pytest.raises(SyncwardError):
        try_to_connect("127.1", listener.port, replace(LOOSE, tls_required=False))
    assert listener.accepted > 0, "the listener counts, and 127.1 does lead there"


@pytest.mark.integration
def test_a_name_server_that_changes_its_mind_changes_nothing(cluster):
    """DNS rebinding: the second answer would be forbidden, and nobody asks for it."""
    asked = []

    def rebinding(host: str, _port: int) -> list[str]:
        asked.append(host)
        return [cluster.host] if len(asked) == 1 else ["169.254.169.254"]

    config = PostgresConfig(
        host="rebinding.example", port=cluster.port, database="postgres",
        user=cluster.superuser, sslmode="disable",
    )  # fmt: skip
    secret = {"password": cluster.password}
    link = postgres.connect(
        config, secret, role="source", session={}, policy=LOOSE, lookup=rebinding
    )
    assert (link.info.host, link.info.hostaddr) == ("rebinding.example", cluster.host)
    link.close()
    assert asked == ["rebinding.example"]
    with pytest.raises(EgressRefused):
        postgres.connect(config, secret, role="source", session={}, policy=LOOSE, lookup=rebinding)


@pytest.mark.integration
def test_a_link_goes_on_to_the_next_of_the_checked_addresses(cluster):
    both = answering("127.0.0.99", cluster.host)
    config = PostgresConfig(
        host="shop.example", port=cluster.port, database="postgres",
        user=cluster.superuser, sslmode="disable",
    )  # fmt: skip
    link = postgres.connect(
        config, {"password": cluster.password}, role="source", session={}, policy=LOOSE,
        lookup=both,
    )  # fmt: skip
    assert link.info.hostaddr == cluster.host
    link.close()


# ── openings and our own services ────────────────────────────────────────────────────────────


def allowed(address: str, port: int, openings: str) -> bool:
    held = replace(PRODUCTION, allow=parse_openings(openings))
    try:
        resolve("shop.example", port, held, lookup=answering(address))
    except EgressRefused:
        return False
    return True


def test_an_opening_lets_its_range_and_port_through_and_nothing_beside_them():
    assert allowed("10.1.2.3", 5432, "10.0.0.0/8")
    assert allowed("::ffff:10.1.2.3", 5432, "10.0.0.0/8")
    assert allowed("10.1.2.3", 5432, "192.168.0.0/16, 10.1.2.3/32:5432")
    assert allowed("fd12::7", 5432, "[fd12::/32]:5432")
    assert not allowed("10.1.2.3", 5433, "10.1.2.3/32:5432")
    assert not allowed("10.1.2.4", 5432, "10.1.2.3/32:5432")
    assert not allowed("fd13::7", 5432, "[fd12::/32]:5432")


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "169.254.169.254", "168.63.129.16", "fe80::1", "fd00:ec2::254",
                "64:ff9b::a00:1", "2002:a00:1::1", "224.0.0.1", "100.100.100.200", "::"],
)  # fmt: skip
def test_no_opening_reaches_loopback_metadata_or_hidden_addresses(address):
    assert not allowed(address, 5432, "0.0.0.0/0, ::/0")


@pytest.mark.parametrize("wrong", ["10.0.0.1/8", "ten", "10.0.0.0/8:0", "10.0.0.0/8:99999", "/8"])
def test_a_range_that_is_none_stops_the_start(wrong):
    with pytest.raises(ValueError, match="write a range"):
        Settings(egress_allow=wrong)


def test_our_own_services_are_found_in_every_setting_that_holds_a_url():
    settings = Settings.model_validate({
        "profile": "production",
        "database_url": "postgresql://a:b@db.internal/x?host=db2.internal&host=db3.internal:6000",
        "redis_url": "rediss+sentinel://u:p@one:26379,two/0?master=m",
        "keyring": "vault://kms.internal/transit/name?token=/run/token",
        "keystore_url": "postgresql://a:b@keys.internal:5433/keys",
        "metrics_host": "10.0.0.9", "metrics_port": 9100,
    })  # fmt: skip
    assert settings.link_policy().own == {
        ("db.internal", 5432), ("db2.internal", 5432), ("db3.internal", 6000),
        ("one", 26379), ("two", 26379), ("kms.internal", 8200), ("keys.internal", 5433),
        ("10.0.0.9", 9100),
    }  # fmt: skip
    assert endpoints(["file:///etc/keyring.json", "postgresql:///x?host=/run"]) == frozenset()


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("postgresql://u:p@/db?host=pg1,pg2&port=5432,5433", {("pg1", 5432), ("pg2", 5433)}),
        ("postgresql://u:p@/db?host=pg1,pg2&port=6000", {("pg1", 6000), ("pg2", 6000)}),
        ("postgresql://u:p@/db?host=pg1,pg2,pg3&port=,6000,", {
            ("pg1", 5432), ("pg2", 6000), ("pg3", 5432),
        }),
        ("postgresql://u:p@/db?host=/run,pg2&port=1,2", {("pg2", 2)}),
        ("postgresql://u:p@/db?hostaddr=10.0.0.1,fd00::1&port=1,2", {
            ("10.0.0.1", 1), ("fd00::1", 2),
        }),
        ("postgresql://u@pg1:5432,pg2:5433/db", {("pg1", 5432), ("pg2", 5433)}),
        ("postgresql://u@pg1/db?port=6000", {("pg1", 5432), ("pg1", 6000)}),
        ("postgresql://u@pg1:6000/db?host=pg2", {("pg1", 6000), ("pg2", 6000)}),
        ("postgresql://u@:6000/db?host=pg2", {("pg2", 6000)}),
        ("postgresql://u@/db?host=a:1&host=b:2", {("a", 1), ("b", 2)}),
        ("postgresql://u@p%671/db", {("pg1", 5432)}),
        ("postgresql+psycopg://u@[fd00::1]:6000,pg2/db", {("fd00::1", 6000), ("pg2", 5432)}),
        ("redis://u@one:1/0?db=1", {("one", 1)}),
    ],
)  # fmt: skip
def test_hosts_and_ports_of_a_list_belong_together_as_libpq_reads_them(url, own):
    assert endpoints([url]) == own


def test_ports_that_do_not_fit_the_hosts_are_all_ours_at_each():
    found = endpoints(["postgresql://u@/db?host=a,b,c&port=1,2"])
    assert found == {(host, port) for host in "abc" for port in (1, 2)}


def test_a_service_that_moves_is_asked_for_at_every_link_and_without_an_answer_nothing_passes():
    at = [("10.0.0.9", 6379)]

    def itself(host: str, _port: int) -> list[str]:
        return [host]

    def where() -> list[tuple[str, int]]:
        if not at:
            raise TransientError("nobody says")
        return at

    policy = replace(PRODUCTION, allow=parse_openings("10.0.0.0/8"), moving=where)

    def rule(host: str) -> str | None:
        try:
            resolve(host, 6379, policy, lookup=itself)
        except EgressRefused as refused:
            return refused.rule
        return None

    assert (rule("10.0.0.9"), rule("10.0.0.8")) == ("own_service", None)
    at[0] = ("10.0.0.8", 6379)  # a failover
    assert (rule("10.0.0.9"), rule("10.0.0.8")) == (None, "own_service")
    at.clear()
    with pytest.raises(TransientError) as caught:
        rule("10.0.0.8")
    assert "nobody" not in caught.value.public


def test_an_own_service_is_recognised_by_address_under_any_name_and_only_at_its_port():
    names = {"db.internal": ["8.8.4.4"], "alias.example": ["8.8.4.4"], "v6.example": ["2a00::1"]}
    policy = replace(PRODUCTION, own=frozenset({("db.internal", 5432)}))

    def lookup(host: str, _port: int) -> list[str]:
        return names[host]

    for host in ("db.internal", "alias.example"):
        with pytest.raises(EgressRefused) as caught:
            resolve(host, 5432, policy, lookup=lookup)
        assert caught.value.rule == "own_service"
        assert resolve(host, 5433, policy, lookup=lookup).port == 5433
    assert resolve("v6.example", 5432, policy, lookup=lookup).addresses == ("2a00::1",)
    names["db.internal"] = ["2a00::1"]  # a failover
    with pytest.raises(EgressRefused):
        resolve("v6.example", 5432, policy, lookup=lookup)


def test_an_opening_never_opens_an_own_service_in_production():
    own = frozenset({("10.0.0.5", 5432)})

    def itself(host: str, _port: int) -> list[str]:
        return [host]

    for openings, openable, passes in [
        ("10.0.0.0/8", False, False),
        ("10.0.0.5/32:5432", False, False),
        ("10.0.0.0/8", True, False),
        ("10.0.0.5/32:5432", True, True),
    ]:
        held = replace(PRODUCTION, own=own, own_openable=openable, allow=parse_openings(openings))
        if passes:
            assert resolve("10.0.0.5", 5432, held, lookup=itself).addresses == ("10.0.0.5",)
        else:
            with pytest.raises(EgressRefused):
                resolve("10.0.0.5", 5432, held, lookup=itself)


def test_while_our_own_name_cannot_be_looked_up_nothing_passes_at_its_port():
    policy = replace(PRODUCTION, own=frozenset({("db.internal", 5432)}))

    def lookup(host: str, _port: int) -> list[str]:
        if host == "db.internal":
            raise TransientError("db.internal cannot be looked up", code="dns")
        return ["1.1.1.1"]

    with pytest.raises(TransientError) as caught:
        resolve("shop.example", 5432, policy, lookup=lookup)
    assert "db.internal" not in caught.value.public
    assert resolve("shop.example", 5433, policy, lookup=lookup).addresses == ("1.1.1.1",)


@pytest.mark.integration
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2", "::ffff:127.0.0.1"])
def test_a_service_on_this_machine_has_every_address_of_it(host, listener):
    policy = LinkPolicy(
        loopback=True, own=frozenset({("127.0.0.1", listener.port)}), own_openable=True
    )
    with pytest.raises(EgressRefused) as caught:
        try_to_connect(host, listener.port, policy)
    assert (caught.value.rule, listener.accepted) == ("own_service", 0)


# ── as runs ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def shop(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    return world


def closed(world) -> None:
    """Let the worker have the policy of an installation that opened nothing."""
    settings = world.deps.settings.model_copy(update={"egress_allow": None})
    world.deps = replace(world.deps, policy=settings.link_policy())


@pytest.mark.integration
def test_a_run_to_a_forbidden_address_fails_alike_and_is_audited(shop, valkey, caplog):
    cluster = shop.control.cluster
    closed(shop)
    for host, port, rule in [
        (cluster.host, cluster.port, "own_service"),  # the control database
        ("127.1", valkey.port, "own_service"),
        ("169.254.169.254", 80, "never"),
        ("10.1.2.3", 5432, "private"),
    ]:
        caplog.clear()
        refused_and_audited(shop, caplog, host, port, rule)


def refused_and_audited(shop, caplog, host: str, port: int, rule: str) -> None:
    shop.pair.changes["source"] = {"host": host, "port": port}
    shop.apply({"public.t": "{mode: replace}"})
    with caplog.at_level("WARNING"):
        run, _ = shop.sync()
    assert (run.state, run.error_code) == (RunState.FAILED, "egress_refused")
    assert (run.error or "").removeprefix(f"{host}:{port}: ") == (
        "links to this address are not allowed here; ask whoever runs this installation "
        "(docs/network.md)"
    )
    told = [vars(r) for r in caplog.records if r.getMessage() == "egress_refused"]
    assert [t["rule"] for t in told] == [rule]
    assert rule not in shop.log(run.run_id)
    ((target, body),) = shop.control.all(
        "SELECT target_id, body FROM audit.event WHERE action = 'egress.refused' AND class = 'A' "
        "AND target_id = :run",
        run=run.run_id,
    )
    said = json.loads(body)
    assert (target, said["outcome"], said["reason"]) == (run.run_id, "denied", "egress_refused")


@pytest.mark.integration
def test_testing_a_resource_is_no_port_scanner(shop, shell, listener):
    """An open and a closed port of a forbidden host read the same, and neither is touched."""
    said = set()
    shop.account()
    word = shop.directory / "word"
    word.write_text("hunter2-hunter2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed_port = probe.getsockname()[1]
    shop.deps = replace(shop.deps, policy=replace(shop.deps.policy, loopback=False))
    for name, port in (("open", listener.port), ("shut", closed_port)):
        words = ("host=127.0.0.1", f"port={port}", "database=shop", "user=reader")
        config = [w for s in (*words, "sslmode=disable") for w in ("--set", s)]
        secret = ("--secret-file", f"password={word}")
        made = shell("resource", "create", name, "--kind", "postgres", *secret, *config)
        assert made[0] == 0
        stepping = threading.Timer(0.5, shop.step)
        stepping.start()
        code, _, err = shell("resource", "test", name)
        stepping.join()
        assert (code, "links to this address are not allowed" in err) == (1, True)
        said.add(err.replace(name, "NAME").replace(str(port), "PORT"))
    assert (len(said), listener.accepted) == (1, 0)
