"""Ranges at the same time, read from a standby: it lends its snapshot, too."""

from contextlib import closing
from threading import Barrier, Thread

import pytest

from connectors import registry
from schemas.records import Ranges
from schemas.streams import StreamSpec
from tests.connectors.test_cursor_xmin import Own, running
from tests.world import LOOSE

pytestmark = [pytest.mark.integration, pytest.mark.full]

ROWS = 1_000


@pytest.mark.parametrize("key", ["PRIMARY KEY", ""])
def test_a_standby_lends_its_snapshot(tmp_path, key):
    own = Own(tmp_path / "pg")
    with running(own):
        own.act(
            f"CREATE TABLE t (id int {key}, v text)",
            f"INSERT INTO t SELECT n, repeat('v', 100) FROM generate_series(1, {ROWS}) n",
            "VACUUM ANALYZE t",
        )
    copy = own.copied_to(tmp_path / "copy")
    (copy.data / "standby.signal").touch()
    copy.cluster._own(copy.data / "standby.signal")
    with running(copy):
        assert copy.act("SELECT pg_is_in_recovery()") == [(True,)]
        config = {
            "host": copy.cluster.host, "port": copy.cluster.port, "database": "postgres",
            "user": "postgres", "sslmode": "disable",
        }  # fmt: skip
        spec = StreamSpec.model_validate({"name": "public.t", "mode": "replace", "range_rows": 200})
        secret, read = {"password": copy.cluster.password}, list[int]()
        meeting = Barrier(2, timeout=30)

        def lane(batches) -> None:
            for batch in batches:
                for number, _ in enumerate(batch.chunks):
                    if number == 0 and batch is batches[0]:
                        meeting.wait()  # both are being read
                read.append(batch.rows())

        with closing(registry.open_source("postgres", config, secret, LOOSE)) as source:
            ranges = Ranges(spec.range_rows, at_once=2)
            with source.extract(spec, None, source.wires[0], ranges=ranges) as batches:
                *parts, end = batches
                assert end.part is not None
                assert end.part.is_end
                assert len(parts) > 2
                lanes = [Thread(target=lane, args=(parts[n::2],)) for n in (0, 1)]
                for thread in lanes:
                    thread.start()
                for thread in lanes:
                    thread.join()
    assert len(read) == len(parts)
    assert sum(read) == ROWS
