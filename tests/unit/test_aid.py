"""What a connector may ask for: who wants it gets it, and outside of a worker it refuses."""

import pytest

from connectors import registry, sources
from schemas.aid import UNAIDED, Aid
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError

_MODULE = """
{aided}
CONFIG, SECRET_FIELDS = None, ()
def open_source(*given):
    return given
"""


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Two connectors: one that wants aid, one that knows of none."""
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
    (tmp_path / "aided_one.py").write_text(_MODULE.format(aided="AIDED = True"))
    (tmp_path / "lone_one.py").write_text(_MODULE.format(aided=""))
    return lambda kind, *aid: registry.open_source(kind, {}, {}, LinkPolicy(), *aid)


def test_a_source_that_wants_aid_gets_it_and_no_other(opened):
    mine = Aid()
    assert opened("aided_one", mine)[3] is mine
    assert opened("aided_one")[3] is UNAIDED
    assert len(opened("lone_one", mine)) == 3


def test_outside_of_a_worker_nothing_is_exchanged_that_would_be_lost():
    asked: list[object] = []

    def exchange(stored: object) -> dict[str, str]:
        asked.append(stored)
        return {}

    with pytest.raises(ConfigError, match="only a worker can store what is new"):
        UNAIDED.secrets.renewed({"token": "old"}, exchange)
    assert not asked
