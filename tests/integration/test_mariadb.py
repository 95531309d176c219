"""A MariaDB resource through the whole machine: document, sealed password, worker, refusals."""

import importlib.util
import json

import pytest

from connectors import registry
from schemas.errors import ConfigError
from schemas.runs import RunState
from tests.connectors.conformance.ends import MariadbSource, image, policy

pytestmark = pytest.mark.integration

DOCUMENT = """
account: acme
resources:
  shop: {kind: mariadb, config: CONFIG, secret: {password: {file: shop.pw}}}
  lake: {kind: postgres, config: LAKE, secret: {password: {file: lake.pw}}}
connections:
  shop-to-lake:
    source: shop
    destination: lake
    schedule: manual
    target: {schema: acme}
    streams:
      SHOP.orders: {mode: merge, key: [id], cursor: changed, deletes: hard, key_sweep: 1}
"""


@pytest.mark.full
def test_a_run_reads_mariadb_with_its_sealed_password(world):
    shop = MariadbSource(None, world.directory)
    columns = (("id", "bigint"), ("changed", "timestamp with time zone"), ("note", "text"))
    shop.create("orders", columns)
    shop._act("INSERT INTO orders VALUES (1, NOW(6), 'a'), (2, NOW(6), 'ü'), (3, NOW(6), '')")
    (world.directory / "shop.pw").write_text(shop.secrets["password"])
    (world.directory / "lake.pw").write_text(world.pair.secret("destination")["password"])
    path = world.directory / "doc.yaml"
    path.write_text(
        DOCUMENT.replace("CONFIG", json.dumps(shop.config))
        .replace("LAKE", json.dumps(world.pair.config("destination")))
        .replace("SHOP", shop.schema)
    )
    world.account()
    world.apply_file(path)
    run, streams = world.sync()
    assert run.state is RunState.SUCCEEDED, world.log(run.run_id)
    assert streams["orders"].rows_inserted == 3
    shop.update("orders", 1, "note", "b")
    shop.delete("orders", 2)
    run, streams = world.sync()
    assert (streams["orders"].rows_updated, streams["orders"].rows_deleted) == (1, 1)
    found = world.pair.rows("destination", "SELECT id, note FROM acme.orders ORDER BY id")
    assert [(image(i), n) for i, n in found] == [(r[0], r[2]) for r in shop.rows("orders")]

    shop._act("INSERT INTO orders VALUES (4, NOW(6), 'c')")
    shop._server.forget(shop.schema)
    asked = world.enqueue()
    world.step()
    run = world.run(asked.run_id)
    assert (run.state, run.error_code) == (RunState.FAILED, "credentials")
    assert shop.secrets["password"] not in world.log(asked.run_id)


def test_a_worker_without_the_driver_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    config = {"host": "localhost", "database": "shop", "user": "reader"}
    with pytest.raises(ConfigError, match=r"install syncward\[mariadb\] there"):
        registry.open_source("mariadb", config, {"password": "x"}, policy(tmp_path))
