"""What sealing costs: a field, the credentials of a run, and a million keys wrapped again.

python -m benchmarks.crypto [--quick] [--json]
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from uuid import uuid4

from sqlalchemy import text

from benchmarks.control import PRINCIPAL, Bench
from benchmarks.report import Case, document, show
from cli import dev
from crypto import keyring as keyrings
from crypto.cache import KeyCache
from crypto.canary import make_canary
from crypto.envelope import Context
from crypto.kms import file
from crypto.opening import open_envelope
from crypto.roots import Keyring, Sealed, WrapContext
from crypto.seal import new_dek, seal
from crypto.selftest import selftest
from crypto.streams import open_stream, seal_stream
from crypto.unseal import unseal_credentials
from storage import keystore
from storage.engine import open_engine, transaction
from storage.keystore import Keystore, RootOffer
from workers.key_upkeep import KeyUpkeep

FIELD_BUDGET_US = 60.0
RUN_BUDGET_MS = 1.0
REWRAP_BUDGET_S = 300.0
SELFTEST_BUDGET_MS = 1_000.0

FIELD = os.urandom(200)


def each(rounds: int, times: int, act: Callable[[], object]) -> float:
    """Return the median over rounds of the seconds that one act takes."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(times):
            act()
        found.append((time.perf_counter() - started) / times)
    return median(found)


def credential(keyring: Keyring, resource: Context) -> Sealed:
    dek_id, dek = new_dek()
    wrap = WrapContext(resource.account_id, "credentials", dek_id)
    wrapped = keyring.wrap("credentials", dek, wrap)
    return Sealed(wrapped, wrap, seal(dek, dek_id, FIELD, resource), resource)


def rewrap_seconds(root: Path, count: int) -> tuple[float, float]:
    """Rotate the root of credentials of a real keystore and have a worker wrap so many keys again.

    Returns seconds by the clock and of this process: they differ by the database, and where others
    work beside.
    """
    bench = Bench(root)
    try:
        engine = open_engine(bench.url, "worker", pool_size=2)
        store = Keystore(engine)
        files = [bench.instance.keyring_dir / name for name in ("operator.json", "worker.json")]
        worker = keyrings.load(str(files[1]))
        _known(store, worker)
        _fill(store, worker, count)
        made = file.add_root(files[0], files[1], "credentials")
        worker.reload()
        worker.prefer(made)
        _known(store, worker)
        operator = open_engine(bench.url, "operator", pool_size=1)  # workers turn no roots
        with transaction(operator) as tx:
            (fresh,) = [one for one in keystore.roots(tx) if one.root_id == made]
            keystore.activate(tx, tx, fresh, PRINCIPAL)
        operator.dispose()
        bench.act("VACUUM ANALYZE keystore.dek", "CHECKPOINT")
        upkeep = KeyUpkeep(worker, store, dev.settings(bench.instance), PRINCIPAL)
        started, used = time.perf_counter(), time.process_time()
        upkeep.look()
        took, of_cpu = time.perf_counter() - started, time.process_time() - used
        with store.transaction() as keys:
            left = [one.keys for one in keystore.counts(keys) if one.root_id == made]
        assert left == [count]
        engine.dispose()
        return took, of_cpu
    finally:
        bench.close()


def _known(store: Keystore, keyring: Keyring) -> None:
    root_id = keyring.active_root("credentials")
    offer = RootOffer(
        root_id, "credentials", keyring.scheme, lambda: make_canary(keyring, "credentials")
    )
    with store.transaction() as tx:
        keystore.add_root(tx, tx, offer, PRINCIPAL)


def _fill(store: Keystore, keyring: Keyring, count: int) -> None:
    contexts = [WrapContext(uuid4(), "credentials", uuid4()) for _ in range(count)]
    items = [(os.urandom(32), context) for context in contexts]
    wrapped = keyring.wrap_many("credentials", items)
    with store.transaction() as keys:
        keys.execute(
            text("SELECT keystore.put_key(:id, :account, 'credentials', :root, :blob, NULL)"),
            [
                {"id": c.dek_id, "account": c.account_id, "root": w.root_id, "blob": w.blob}
                for c, w in zip(contexts, wrapped, strict=True)
            ],
        )


def measure(files: tuple[Path, Path], *, quick: bool) -> tuple[list[Case], dict[str, str]]:
    rounds, times, keys = (3, 500, 2_000) if quick else (9, 5_000, 50_000)
    operator, worker = (keyrings.load(str(path)) for path in files)
    context = Context(uuid4(), "resource", uuid4(), "password", 1)
    dek_id, dek = new_dek()
    envelope = seal(dek, dek_id, FIELD, context)
    run = [
        credential(operator, Context(context.account_id, "resource", uuid4(), "password", 1))
        for _ in range(2)
    ]
    cache = KeyCache(worker)
    unseal_credentials(cache, run)
    cold = each(rounds, 200, lambda: unseal_credentials(worker, run))
    block = os.urandom(1024 * 1024)
    sealed = list(seal_stream(dek, dek_id, [block] * 16, context))
    stream = each(3, 1, lambda: [len(p) for p in open_stream(dek, dek_id, sealed, context)])
    rewrap, rewrap_cpu = (
        s * 1_000_000 / keys for s in rewrap_seconds(files[0].parent.parent / "instance", keys)
    )
    us, ms = 1e6, 1e3
    cases = [
        Case(
            "seal_field",
            us * each(rounds, times, lambda: seal(dek, dek_id, FIELD, context)),
            FIELD_BUDGET_US, "us of 200 bytes",
        ),
        Case(
            "open_field",
            us * each(rounds, times, lambda: open_envelope(dek, dek_id, envelope, context)),
            FIELD_BUDGET_US, "us of 200 bytes",
        ),
        Case(
            "open_run_credentials",
            ms * each(rounds, times // 2, lambda: unseal_credentials(cache, run)),
            RUN_BUDGET_MS, "ms, keys cached",
        ),
        Case(
            "rewrap_1m",
            rewrap,
            REWRAP_BUDGET_S, f"s, 1 worker, from {keys:,}",
        ),
        Case(
            "self_test", ms * each(3, 3, lambda: selftest(worker)), SELFTEST_BUDGET_MS, "ms"
        ),
    ]  # fmt: skip
    return cases, {
        "open_run_credentials_without_cache_ms": f"{ms * cold:.2f}",
        "rewrap_1m_processor_seconds": f"{rewrap_cpu:.0f}",
        "open_stream_mb_per_second": f"{16 * 1.048576 / stream:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, 2,000 keys")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        files = keyrings.init(Path(directory) / "keys")
        cases, beside = measure(files, quick=arguments.quick)
    found = {**document(cases, cryptography=version("cryptography")), "beside": beside}
    show(found, cases, as_json=arguments.json)


if __name__ == "__main__":
    main()
