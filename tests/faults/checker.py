"""The invariants I1 to I17, read from the databases after whatever was done to the processes.

Each is one function from what is there (and what the run wrote down) to a list of violations;
`INVARIANTS` lists them all. tests/faults/test_checker.py removes a guard for each and sees it red.
"""

import base64
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import quote
from uuid import UUID

from schemas.runs import MOVES, RunState
from tests.faults.history import Event, Facts, History
from tests.faults.opening import opened_logs, opened_outputs

ENDED = {"run.succeeded", "run.failed", "run.cancelled"}
#: After these no worker holds the run.
RELEASED = ENDED | {"run.requeued", "run.awaiting_approval"}
#: Requeued for these reasons, an attempt was handed back and does not count.
HANDED_BACK = {"draining", "lease_lost"}
SERIES_MAX = 1_500
JAIN_MIN = 0.95
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_LABEL = re.compile(r'\w+="((?:[^"\\]|\\.)*)"')


def i1_every_slot_has_one_ledger_row(history: History, facts: Facts) -> list[str]:
    """Each slot of a schedule's window is in the ledger exactly once, with a row or counted by the
    row after it (`missed`), and nothing else is."""
    kept: dict[UUID, list[Any]] = defaultdict(list)
    for slot in history.slots:
        kept[slot.connection_id].append(slot)
    bad = []
    for schedule in history.schedules:
        if schedule.connection_id not in facts.windows:
            continue
        name, every = schedule.connection_id, timedelta(seconds=schedule.interval_s)
        expected, end = facts.windows[name]
        for slot in kept[name]:
            if not expected - every / 2 <= slot.scheduled_for < end - every / 2:
                if facts.windows[name][0] <= slot.scheduled_for < end:
                    bad.append(f"{name}: slot {slot.scheduled_for} is there twice, or is none")
                continue
            passed = round((slot.scheduled_for - expected) / every)
            if passed != slot.missed:
                bad.append(
                    f"{name}: {passed} slots before {slot.scheduled_for}, {slot.missed} kept"
                )
            expected = slot.scheduled_for + every
        if round((end - expected) / every):
            bad.append(f"{name}: the ledger ends before {expected}, the window at {end}")
    return bad


def i2_every_run_ends_in_one_history_row(history: History, facts: Facts) -> list[str]:
    """Whatever was asked for (slot, operator, event) is one row: ended, or still live (see I8)."""
    there = Counter(run.run_id for run in history.runs)
    there.update(run.run_id for run in history.active)
    there.update(run.again_run_id for run in history.active if run.again_run_id)
    asked = {slot.run_id for slot in history.slots if slot.outcome != "skipped"}
    asked |= {e.target_id for e in history.events if e.action == "run.queued"} | facts.asked
    lost = [f"run {run} is lost" for run in asked - set(there)]
    return lost + [f"run {run} is there {n} times" for run, n in there.items() if n > 1]


def i3_rows_arrive_exactly_once(history: History, _: Facts) -> list[str]:
    """Commits of a stream follow each other without gap, each from the cursor before it; both
    sides hold the same rows equally often."""
    bad = [
        f"{s.connection_id} {s.name}: {s.missing} rows missing, {s.surplus} too many"
        for s in history.streams
        if s.missing or s.surplus
    ]
    last: dict[tuple[UUID, str], int] = {}
    for commit in history.commits:
        stream = (commit.connection_id, commit.stream)
        if commit.generation != last.get(stream, commit.generation - 1) + 1:
            bad.append(f"{stream}: generation {commit.generation} follows {last[stream]}")
        if commit.cursor_from is not None and commit.cursor_from != commit.cursor_before:
            bad.append(f"{stream}: generation {commit.generation} does not begin where it stood")
        last[stream] = commit.generation
    return bad


def i4_fences_never_decrease(history: History, _: Facts) -> list[str]:
    """Each start of a connection has a larger fence; a destination's commits never go back."""
    bad = []
    highest: dict[str, int] = {}
    for event in history.events:
        if event.action == "run.started" and event.detail["fence"]:
            subject, fence = str(event.detail["subject"]), int(event.detail["fence"])
            if fence <= highest.get(subject, 0):
                bad.append(f"{subject}: fence {fence} follows {highest[subject]}")
            highest[subject] = fence
    written: dict[tuple[UUID, str], int] = {}
    for commit in history.commits:
        stream = (commit.connection_id, commit.stream)
        if commit.fence < written.get(stream, 0):
            bad.append(f"{stream}: wrote under fence {commit.fence} after {written[stream]}")
        written[stream] = commit.fence
    return bad


def i5_runs_of_one_connection_never_overlap(history: History, _: Facts) -> list[str]:
    """Between two starts of a connection something ends; and its commits do not interleave."""
    bad = []
    running: dict[str, UUID] = {}
    for event in history.events:
        subject = str(event.detail.get("subject"))
        if event.action == "run.started":
            if subject in running:
                bad.append(f"{subject}: {event.target_id} starts while {running[subject]} runs")
            running[subject] = event.target_id
        elif event.action in RELEASED and running.get(subject) == event.target_id:
            del running[subject]
    seen: dict[UUID, list[UUID]] = defaultdict(list)
    for commit in history.commits:
        order = seen[commit.connection_id]
        if order and order[-1] == commit.run_id:
            continue
        if commit.run_id in order:
            bad.append(f"{commit.connection_id}: {commit.run_id} commits after {order[-1]} did")
        order.append(commit.run_id)
    return bad


def i6_caps_hold_at_every_instant(history: History, facts: Facts) -> list[str]:
    """In the order of the audit stream, no account, resource or instance is ever over its cap.

    What a dispatch counted as free had ended before it, so its number in the stream is smaller:
    a cap that this finds broken was broken.
    """
    caps: dict[object, int] = {
        row.id: row.runs_max
        for table, key in (("account_queues", "account_id"), ("resource_queues", "resource_id"))
        for row in history.rows(f"SELECT {key} AS id, runs_max FROM {table}")
    }
    caps["instance"] = facts.runs_max
    ends = {str(s.connection_id): {s.source_id, s.destination_id} for s in history.schedules}
    busy: dict[UUID, set[object]] = {}
    load: Counter[object] = Counter()
    bad = []
    for event in history.events:
        if event.action == "run.dispatched":
            subject = str(event.detail["subject"])
            held = {"instance", event.account_id, *ends.get(subject, set())}
            busy[event.target_id] = held
            load.update(held)
            bad += [
                f"{what}: {load[what]} runs at once at {event.at}, {caps[what]} allowed"
                for what in held
                if load[what] > caps.get(what, load[what])
            ]
        elif event.action in RELEASED:
            load.subtract(busy.pop(event.target_id, ()))
    return bad


def i7_only_the_owner_writes(history: History, _: Facts) -> list[str]:
    """A worker that moves a run holds it; rows are written under a fence that their run drew."""
    bad = []
    for run, events in history.of_runs.items():
        holder = None
        for event in events:
            if event.action == "run.started":
                holder = event.detail["worker"]
            elif event.action in RELEASED:
                if event.principal.startswith("worker:") and event.principal != f"worker:{holder}":
                    bad.append(f"run {run}: {event.action} by {event.principal}, held by {holder}")
                holder = None
    drawn = {(e.target_id, e.detail["fence"]) for e in history.events if e.action == "run.started"}
    bad += [
        f"{commit.connection_id} {commit.stream}: {commit.run_id} wrote with fence {commit.fence}"
        for commit in history.commits
        if (commit.run_id, commit.fence) not in drawn
    ]
    cursors = history.rows("SELECT connection_id, stream, fence FROM cursors")
    fences = {
        (str(e.detail["subject"]), e.detail["fence"])
        for e in history.events
        if e.action == "run.started"
    }
    return bad + [
        f"{c.connection_id} {c.stream}: its cursor carries fence {c.fence}, which nobody drew"
        for c in cursors
        if (str(c.connection_id), c.fence) not in fences
    ]


def i8_everything_drains(history: History, facts: Facts) -> list[str]:
    """After the faults every run ends, within the bound."""
    bad = [f"run {run.run_id} is stuck: {run.state} ({run.error_code})" for run in history.active]
    if facts.drain_bound is not None:
        if facts.drained_after is None:
            bad.append(f"not drained within {facts.drain_bound}")
        elif facts.drained_after > facts.drain_bound:
            bad.append(f"drained after {facts.drained_after}, allowed {facts.drain_bound}")
    return bad


def i9_killed_runs_are_recovered_in_time(history: History, facts: Facts) -> list[str]:
    """What a killed worker held goes on within its lease and two ticks (plus outages): p99."""
    times = sorted(recoveries(history, facts))
    if not times:
        return []
    p99 = times[max(0, -(-len(times) * 99 // 100) - 1)]
    allowed = facts.lease + 2 * facts.tick + facts.slack
    return (
        [f"recovered after {p99} (p99 of {len(times)}), allowed {allowed}"] if p99 > allowed else []
    )


def recoveries(history: History, facts: Facts) -> Iterator[timedelta]:
    """How long each run of a killed worker stood still, outages left out."""
    for kill in facts.kills:
        for events in history.of_runs.values():
            for started, released in holds(events):
                end = released.at if released else history.now
                if started.detail["worker"] == kill.worker_id and started.at <= kill.at < end:
                    yield end - kill.at - facts.disturbed(kill.at, end)


def holds(events: Sequence[Event]) -> Iterator[tuple[Event, Event | None]]:
    """Pair each start of a run with what released it, if anything did."""
    started: Event | None = None
    for event in events:
        if event.action == "run.started":
            started = event
        elif event.action in RELEASED and started is not None:
            yield started, event
            started = None
    if started is not None:
        yield started, None


def i10_attempts_are_starts_minus_drains(history: History, _: Facts) -> list[str]:
    """A drain does not cost an attempt, everything else that began does."""
    bad = []
    for run in history.runs:
        events = history.of_runs[run.run_id]
        starts = sum(e.action == "run.started" for e in events)
        back = sum(e.action == "run.requeued" and e.reason in HANDED_BACK for e in events)
        if run.attempt != starts - back:
            bad.append(f"run {run.run_id}: attempt {run.attempt}, {starts} starts, {back} drains")
    return bad


def i11_cancels_are_heard_in_time(history: History, facts: Facts) -> list[str]:
    """From the request to the end of the run, outages left out."""
    bad = []
    for run, events in history.of_runs.items():
        asked = next((e for e in events if e.action == "run.cancel_requested"), None)
        if asked is None:
            continue
        ended = next((e.at for e in events if e.action in ENDED and e.seq > asked.seq), None)
        took = (ended or history.now) - asked.at
        took -= facts.disturbed(asked.at, ended or history.now)
        if ended is None or took > facts.cancel_bound + facts.slack:
            bad.append(f"run {run}: cancelled at {asked.at}, ended {ended} ({took})")
    return bad


def i12_every_move_is_audited(history: History, _: Facts) -> list[str]:
    """Each change of state has an event in its transaction, is legal, and no event was altered."""
    audited = {(event.xid, event.target_id) for event in history.events}
    bad = []
    state: dict[UUID, str | None] = {}
    for move in history.moves:
        what = f"run {move.run_id}: {move.before} -> {move.after}"
        if (move.x, move.run_id) not in audited:
            bad.append(f"{what} without an event")
        if move.before is None:
            legal = move.after == RunState.QUEUED and move.run_id not in state
        else:
            to = [move.after] if move.after else [s for s in RunState if s in _FINAL]
            legal = any(s in MOVES[RunState(move.before)] for s in to)
            legal = legal and state.get(move.run_id, move.before) == move.before
        if not legal:
            bad.append(f"{what} is no legal move from {state.get(move.run_id)}")
        state[move.run_id] = move.after
    altered = history.rows(
        "SELECT seq FROM audit.event WHERE leaf <> audit.leaf(at, account_id, class, action, "
        "target_kind, target_id, login, client, body)"
    )
    return bad + [f"event {event.seq} was altered" for event in altered]


_FINAL = frozenset(state for state, moves in MOVES.items() if not moves)


def i13_equal_backlogs_are_served_equally(history: History, facts: Facts) -> list[str]:
    """Jain's index over accounts of equal weight, counted while all of them had runs waiting."""
    served = turns(history, facts)
    total = served.total()
    if not facts.equals or total < facts.turns_min * len(facts.equals):
        return []  # too few turns under contention to say anything
    index = total**2 / (len(facts.equals) * sum(n**2 for n in served.values()))
    return [f"Jain's index {index:.3f}: {served}"] if index < JAIN_MIN else []


def turns(history: History, facts: Facts) -> Counter[UUID | None]:
    """Count each account's dispatches in transactions that left all accounts a backlog."""
    waiting: dict[UUID | None, set[UUID]] = defaultdict(set)
    served: Counter[UUID | None] = Counter()
    by_transaction: dict[int, list[Event]] = defaultdict(list)
    for event in history.events:
        by_transaction[event.xid].append(event)
    for events in by_transaction.values():
        before = all(waiting[account] for account in facts.equals)
        sent = [e for e in events if e.action == "run.dispatched"]
        for event in events:
            if event.action in {"run.queued", "run.requeued"}:
                waiting[event.account_id].add(event.target_id)
            elif event.action == "run.dispatched" or event.action in ENDED:
                waiting[event.account_id].discard(event.target_id)
        if before and all(waiting[account] for account in facts.equals):
            served.update(e.account_id for e in sent if e.account_id in facts.equals)
    return served


def i14_no_secret_leaves(history: History, facts: Facts) -> list[str]:
    """No form of a secret is in logs, errors, events, outputs or the queue's files.

    Records are searched as they are stored and as an operator opens them.
    """
    texts = {
        "run_logs": "SELECT l::text AS said FROM run_logs l",
        "api_calls": "SELECT c::text AS said FROM api_calls c",
        "runs.error": "SELECT error AS said FROM runs WHERE error IS NOT NULL",
        "active_runs.error": "SELECT error AS said FROM active_runs WHERE error IS NOT NULL",
        "run_streams.error": "SELECT error AS said FROM run_streams WHERE error IS NOT NULL",
        "run_outputs": "SELECT o::text AS said FROM run_outputs o",
        "audit.event": "SELECT body AS said FROM audit.event",
    }
    places = {
        name: "\n".join(row.said for row in history.rows(query)).encode()
        for name, query in texts.items()
    }
    places |= {str(path): path.read_bytes() for path in facts.files if path.is_file()}
    bad: list[str] = []
    for name, opener in (("run_logs", opened_logs), ("run_outputs", opened_outputs)):
        said, lost = opener(history, facts.keyring)
        places[f"{name}, opened"] = "\n".join(said).encode()
        if lost:
            bad.append(f"{name}: {lost} records do not open: nobody can say what they hold")
    return bad + [
        f"{place}: holds {what}"
        for place, content in places.items()
        for what, secret in facts.secrets.items()
        if any(form in content for form in _forms(secret))
    ]


def _forms(secret: str) -> set[bytes]:
    raw = secret.encode()
    return {raw, quote(secret, safe="").encode(), base64.b64encode(raw), raw.hex().encode()}


def i15_nothing_is_left_behind(history: History, _: Facts) -> list[str]:
    """No lease without a run, no transaction left open, no lock held, on any server."""
    bad = [
        f"lease of run {row.run_id} is left" for row in history.rows("SELECT run_id FROM leases")
    ]
    sessions = (
        "SELECT a.application_name, a.state, (SELECT count(*) FROM pg_locks l WHERE l.pid = a.pid "
        "AND l.locktype <> 'virtualxid') FROM pg_stat_activity a "
        "WHERE datname = current_database() AND application_name LIKE 'syncward%' "
        "AND pid <> pg_backend_pid()"
    )
    for server in (history.control, *history.destinations):
        bad += [
            f"{name} is left {state} with {locks} locks"
            for name, state, locks in server.execute(sessions.encode()).fetchall()
            if locks or state not in {"idle", None}
        ]
        prepared = server.execute("SELECT gid FROM pg_prepared_xacts").fetchall()
        bad += [f"prepared transaction {gid} is left" for (gid,) in prepared]
    return bad


def i16_series_are_bounded(history: History, facts: Facts) -> list[str]:
    """No label holds an id or a name of a tenant's thing; few series in all."""
    names = {
        row.name
        for table in ("accounts", "connections", "resources")
        for row in history.rows(f"SELECT name FROM {table}")
    }
    series = {
        line.rsplit(" ", 1)[0]
        for scrape in facts.scrapes
        for line in scrape.splitlines()
        if line.startswith("syncward_")
    }
    bad = [
        f"{one}: a label of an unbounded set"
        for one in series
        for value in _LABEL.findall(one)
        if _UUID.search(value) or value in names
    ]
    return bad + ([f"{len(series)} series"] if len(series) > SERIES_MAX else [])


def i17_every_dispatch_is_answered(history: History, facts: Facts) -> list[str]:
    """However many messages are lost: a dispatch is claimed or taken back within its deadline."""
    bad = []
    allowed = facts.dispatch_deadline + 2 * facts.tick + facts.slack
    for run, events in history.of_runs.items():
        numbers = [e.detail["dispatch"] for e in events if e.action == "run.dispatched"]
        if len(numbers) != len(set(numbers)):
            bad.append(f"run {run}: a dispatch number was used twice: {numbers}")
        waits = RELEASED | {"run.started"}
        for event in events:
            if event.action != "run.dispatched":
                continue
            answer = next((e.at for e in events if e.seq > event.seq and e.action in waits), None)
            end = answer or history.now
            waited = end - event.at - facts.disturbed(event.at, end)
            if waited > allowed:
                bad.append(f"run {run}: dispatch {event.detail['dispatch']} waited {waited}")
    return bad


Invariant = Callable[[History, Facts], list[str]]

#: Number -> the function that finds violations of it.
INVARIANTS: dict[str, Invariant] = {
    "I1": i1_every_slot_has_one_ledger_row,
    "I2": i2_every_run_ends_in_one_history_row,
    "I3": i3_rows_arrive_exactly_once,
    "I4": i4_fences_never_decrease,
    "I5": i5_runs_of_one_connection_never_overlap,
    "I6": i6_caps_hold_at_every_instant,
    "I7": i7_only_the_owner_writes,
    "I8": i8_everything_drains,
    "I9": i9_killed_runs_are_recovered_in_time,
    "I10": i10_attempts_are_starts_minus_drains,
    "I11": i11_cancels_are_heard_in_time,
    "I12": i12_every_move_is_audited,
    "I13": i13_equal_backlogs_are_served_equally,
    "I14": i14_no_secret_leaves,
    "I15": i15_nothing_is_left_behind,
    "I16": i16_series_are_bounded,
    "I17": i17_every_dispatch_is_answered,
}


def check(history: History, facts: Facts) -> dict[str, list[str]]:
    """Return what is violated, by invariant; nothing if all hold."""
    found = {name: invariant(history, facts) for name, invariant in INVARIANTS.items()}
    return {name: bad for name, bad in found.items() if bad}


def evidence(history: History, facts: Facts) -> dict[str, int]:
    """Count what there was to judge: an invariant over nothing says nothing."""
    actions = Counter(event.action for event in history.events)
    return {
        "slots": len(history.slots),
        "runs": len(history.runs),
        "starts": actions["run.started"],
        "dispatches": actions["run.dispatched"],
        "commits of rows": len(history.commits),
        "moves": len(history.moves),
        "cancels of running runs": actions["run.cancel_requested"],
        "recoveries after a kill": len(list(recoveries(history, facts))),
        "drains": sum(e.reason in HANDED_BACK for e in history.events),
        "turns under contention": turns(history, facts).total(),
        "log lines opened": len(opened_logs(history, facts.keyring)[0]),
    }
