"""Lines wait in the worker while they cannot be stored: in order, bounded, none gone unsaid."""

from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest

from schemas.errors import TransientError
from storage.logs import LogLine
from workers import run_log
from workers.run_log import LogWriter, RunLog


class Store:
    """Takes lines, or is away."""

    def __init__(self) -> None:
        self.kept: list[LogLine] = []
        self.away = False

    def __call__(self, lines):
        if self.away:
            raise TransientError("away")
        self.kept += lines


@pytest.fixture
def store():
    return Store()


def line(run_id: UUID, text: str) -> LogLine:
    return LogLine(run_id, uuid4(), datetime.now(UTC), "info", None, text)


def numbers_add_up(lines: list[LogLine]) -> bool:
    """Each series counts on from line to line, given-up ones included, as the reader checks it."""
    reached: dict[bytes, int] = {}
    for one in lines:
        if one.number - reached.get(one.series, 0) - 1 - one.gap != 0:
            return False
        reached[one.series] = one.number
    return True


def test_lines_that_could_not_be_written_come_before_later_ones(store):
    writer = LogWriter(store)
    store.away = True
    writer.add(line(run := uuid4(), "first"))
    with pytest.raises(TransientError):
        writer.flush()
    writer.add(line(run, "second"))
    store.away = False
    writer.flush()
    assert [x.message for x in store.kept] == ["first", "second"]
    assert [x.number for x in store.kept] == [1, 2]


def test_of_too_many_lines_the_oldest_go_and_one_of_each_run_says_so(store, monkeypatch):
    monkeypatch.setattr(run_log, "LINES_KEPT_MAX", 100)
    writer = LogWriter(store)
    store.away = True
    runs = [uuid4(), uuid4()]
    for n in range(500):
        writer.add(line(runs[n % 2], f"line {n}"))
        if n % 60 == 0:
            with pytest.raises(TransientError):
                writer.flush()
    store.away = False
    writer.flush()
    assert len(store.kept) <= 100 + 2
    assert store.kept[-1].message == "line 499"
    gone = [x for x in store.kept if "could not be stored in time" in x.message]
    assert {x.run_id for x in gone} == set(runs)
    assert sum(x.gap + 1 for x in gone) + len(store.kept) - len(gone) == 500
    assert numbers_add_up(store.kept)


def test_a_second_attempt_has_numbers_of_its_own(store):
    writer = LogWriter(store)
    run = uuid4()
    for _ in range(2):
        writer.add(line(run, "begins"))
        writer.add(line(run, "ends"))
        with writer.taken(run) as mine:
            store(mine)
    assert [x.number for x in store.kept] == [1, 2, 1, 2]
    assert [x.last for x in store.kept] == [False, True, False, True]
    assert store.kept[0].series != store.kept[2].series
    assert numbers_add_up(store.kept)


def test_a_run_that_says_too_much_is_cut_off_with_a_word(store, monkeypatch):
    monkeypatch.setattr(run_log, "LOG_LINES_MAX", 10)
    writer = LogWriter(store)
    said = RunLog(writer, uuid4(), uuid4())
    for n in range(50):
        said.info(f"line {n}")
    writer.flush()
    assert [x.message for x in store.kept[:2]] == ["line 0", "line 1"]
    assert len(store.kept) == 10
    assert store.kept[-1].message == "more than 10 lines; the rest is not kept"
