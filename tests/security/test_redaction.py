"""T13 and T14: whatever an exception says, no secret leaves a worker; no text slows it down."""

import io
import json
import logging
import time
from typing import Any
from uuid import uuid4

import dramatiq
import psycopg
import pytest
from psycopg import sql

from cli import credentials
from schemas.audit import Principal
from schemas.errors import ConfigError
from schemas.jobs import QUEUE, Job
from schemas.limits import LOG_MESSAGE_MAX, RAW_LINES_MAX
from schemas.log_lines import Formatter, bind, unbind
from schemas.redaction import MASK, REDACTOR
from schemas.runs import RunKind, RunOptions, RunState
from storage import audit_tail, logs, resources, runs
from storage.metrics import REDACTIONS
from storage.runs import Subject
from tests import leaks
from tests.leaks import forms_of, hits
from workers import actors
from workers.enqueue import JobQueue, open_broker, open_client

pytestmark = pytest.mark.integration

ODD = 'P@ss w:0rd/%2f"\\é+&x'
ROW = "bob-of-the-row@example.org"
HEADERS = "{'authorization': 'Bearer tok-9f8e7d6c5b', 'x-api-key': 'key-1a2b3c4d'}"


@pytest.fixture
def process_log(request):
    """What a worker would write to stderr."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(Formatter(getattr(request, "param", "json")))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield written
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def odd(world):
    """A connection whose source login has a password with every character that is special."""
    session = world.pair.session("source")
    old = world.pair.logins["reader"]
    change = sql.SQL("ALTER ROLE reader PASSWORD {}")
    session.execute(change.format(sql.Literal(ODD)))
    world.pair.logins["reader"] = ODD
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: replace}"})
    forget_all(world)
    yield world
    session.execute(change.format(sql.Literal(old)))
    world.pair.logins["reader"] = old


def forget_all(world) -> None:
    """A worker knows only what it unseals; here the CLI's part ran in the same process."""
    for password in world.pair.logins.values():
        while REDACTOR.text(password) != password:
            REDACTOR.forget(password)


def view_that_raises(world, body: str) -> None:
    world.pair.source(
        "DROP TABLE IF EXISTS t",
        f"CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $f$ BEGIN {body}; "
        "RETURN 1; END $f$",
        "CREATE OR REPLACE VIEW t AS SELECT f() AS id",
    )


def cli_answers(shell, run_id) -> str:
    """What an operator sees about a run, in both shapes."""
    said = []
    for words in (
        ("run", "show", str(run_id)), ("run", "logs", str(run_id)), ("run", "list"),
        ("run", "output", str(run_id)), ("run", "explain", str(run_id)),
        ("connection", "show", "shop-to-lake"), ("resource", "show", "shop"), ("audit", "tail"),
    ):  # fmt: skip
        for flags in ((), ("--json",)):
            code, out, err = shell(*words, *flags, "-A", "acme")
            assert code == 0, (words, err)
            said += [out, err]
    return "\n".join(said)


def debug_lines(world, run_id) -> list[str]:
    return [x.message or "" for x in world.lines(run_id) if x.stored.level == "debug"]


@pytest.fixture
def everywhere(odd, shell, process_log):
    """Return what reads all that a run has left behind."""
    return lambda run_id: everything(odd, shell, process_log, run_id)


def everything(world, shell, process_log, run_id) -> str:
    client = open_client(world.cli.settings.redis_url.get_secret_value())
    found = [
        leaks.tables(world.control),
        "".join(debug_lines(world, run_id)),  # a secret that is split over lines
        leaks.redis(client),
        process_log.getvalue(),
        cli_answers(shell, run_id),
    ]
    client.close()
    return "\n".join(found)


def test_the_search_finds_what_is_planted_in_every_form(world):
    world.account()
    assert hits(leaks.tables(world.control), ODD) == []
    for form, written in forms_of(ODD).items():
        world.control.act("UPDATE accounts SET company = :planted", planted=f"x {written} y")
        assert form in hits(leaks.tables(world.control), ODD)


def test_a_source_that_quotes_the_password_in_every_form_leaks_it_nowhere(odd, shell, process_log):
    quoted = " | ".join(forms_of(ODD).values())
    view_that_raises(
        odd,
        f"RAISE EXCEPTION USING MESSAGE = $m$ask {quoted} now$m$, HINT = $m${ODD}$m$, "
        f"DETAIL = $m$Failing row contains ({ROW}, {ODD})$m$, TABLE = $m${ODD}$m$",
    )
    before = REDACTIONS.labels("value")._value.get()
    run, _ = odd.sync()
    assert (run.state, run.error_code) == (RunState.FAILED, "streams")
    text = everything(odd, shell, process_log, run.run_id)
    assert hits(text, ODD) == []
    assert ROW not in text
    (line,) = debug_lines(odd, run.run_id)
    assert line.startswith("RaiseException: ask ")
    assert line.count(MASK) > 20
    assert REDACTIONS.labels("value")._value.get() > before + 20


def raises_nested(monkeypatch, say) -> None:
    """Let the driver fail as libraries do: the secret in the innermost of three exceptions."""
    connect_really = psycopg.connect

    def innermost(password: str) -> None:
        error = OSError(say(password))
        error.add_note(f"headers {HEADERS}")
        raise error

    def middle(password: str) -> None:
        try:
            innermost(password)
        except OSError as error:
            raise ValueError(f"conninfo password={password} row ({ROW})") from error

    def connect(**options: Any) -> psycopg.Connection:
        if options["user"] != "reader":
            return connect_really(**options)
        try:
            middle(str(options["password"]))
        except ValueError as error:
            dsn = f"postgresql://reader:{options['password']}@db/shop"
            raise RuntimeError(f"pool for {dsn}") from error
        raise AssertionError

    monkeypatch.setattr("connectors.postgres.link.psycopg.connect", connect)


def test_three_nested_exceptions_leak_nothing_and_are_in_the_runs_log_masked(
    odd, shell, process_log, monkeypatch
):
    with monkeypatch.context() as patched:
        raises_nested(patched, lambda password: " ".join(forms_of(password).values()))
        run, _ = odd.sync()
    assert (run.state, run.error_code) == (RunState.FAILED, "internal")
    assert run.error == "Internal error; see the run's log."
    text = everything(odd, shell, process_log, run.run_id)
    assert hits(text, ODD) == []
    for value in ("tok-9f8e7d6c5b", "key-1a2b3c4d"):
        assert value not in text
    lines = "".join(debug_lines(odd, run.run_id))
    for kind in ("RuntimeError: ", "ValueError: ", "OSError: "):
        assert kind in lines
    assert f"postgresql://{MASK}@db/shop" in lines
    log = process_log.getvalue()
    assert "run_crashed" in log
    assert "RuntimeError" in log
    assert "pool for" not in log


def test_a_secret_split_over_two_lines_of_a_log_is_masked(everywhere, odd, monkeypatch):
    for lines, before in ((1, 0), (1, 3), (1, len(ODD)), (RAW_LINES_MAX, 9)):
        start = lines * LOG_MESSAGE_MAX - before - len("OSError: ") - 200
        text = "." * start + (ODD + "." * 40) * 9 + "." * 99

        with monkeypatch.context() as patched:
            raises_nested(patched, lambda _, text=text: text)
            run, _ = odd.sync()
        assert hits(everywhere(run.run_id), ODD) == []
        found = debug_lines(odd, run.run_id)
        assert len(found) == min(lines + 1, RAW_LINES_MAX)
        assert MASK in found[-1] or lines == RAW_LINES_MAX
        assert [part for part in (ODD[:6], ODD[-6:], ODD[4:10]) if part in "".join(found)] == []


def test_secrets_side_by_side_are_masked_wherever_a_chunk_ends(everywhere, odd, monkeypatch):
    with monkeypatch.context() as patched:
        raises_nested(patched, lambda password: f"{password}." * 1_500)
        run, _ = odd.sync()
    assert hits(everywhere(run.run_id), ODD) == []
    _, _, text = "".join(debug_lines(odd, run.run_id)).partition("OSError: ")
    assert set(text.partition("headers")[0].strip()) == {"*", "."}


def test_a_table_named_like_the_password_is_masked_in_the_answer_of_discover(
    odd, shell, process_log
):
    odd.pair.source(
        sql.SQL("CREATE TABLE {} (id int, {} text)")
        .format(sql.Identifier(ODD), sql.Identifier(f"col {ODD}"))
        .as_string()
    )
    with odd.cli.inside() as (tx, account, _name):
        found = resources.get(tx, "shop")
        asked = runs.enqueue(
            tx,
            Subject(found.resource_id, account.account_id, found.resource_id),
            RunKind.DISCOVER,
            RunOptions(),
            Principal("operator", "t"),
        )
    odd.step()
    assert odd.run(asked.run_id).state is RunState.SUCCEEDED
    assert f"public.{MASK}" in leaks.tables(odd.control)
    assert hits(everything(odd, shell, process_log, asked.run_id), ODD) == []


def test_a_worker_forgets_what_it_unsealed_when_the_run_has_ended(odd):
    run, _ = odd.sync()
    assert run.state is RunState.SUCCEEDED
    assert REDACTOR.text(f"is {ODD} known?") == f"is {ODD} known?"


def test_a_dead_letter_holds_ids_whatever_was_raised(valkey, process_log):
    valkey.flush()
    client = open_client(valkey.url)
    broker, queue = open_broker(client), JobQueue(open_client(valkey.url))

    def refuse(_job: Job) -> None:
        with REDACTOR.holder() as holder:
            holder.know(ODD)
            raise RuntimeError(f"postgresql://reader:{ODD}@db {ODD} {ROW}")

    actors.register(broker, refuse)
    worker = dramatiq.Worker(broker, queues={QUEUE}, worker_timeout=50, worker_threads=1)
    worker.start()
    job = Job(run_id=uuid4(), dispatch=7)
    queue.send(job)
    deadline = time.monotonic() + 10
    while client.zcard(f"syncward:{QUEUE}.XQ") == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker.stop(timeout=2_000)
    (stored,) = client.hvals(f"syncward:{QUEUE}.XQ.msgs")
    message = json.loads(stored)
    text = leaks.redis(client) + process_log.getvalue()
    queue.close()
    broker.close()
    client.close()
    assert message["args"] == [str(job.run_id), 7]
    assert message["kwargs"] == {}
    assert set(message["options"]) <= {"redis_message_id"}
    assert hits(text, ODD) == []
    assert ROW not in text
    assert "RuntimeError" in process_log.getvalue()


@pytest.mark.parametrize("process_log", ["people", "json"], indirect=True)
def test_process_logs_mask_messages_fields_and_what_libraries_say(process_log):
    logger = logging.getLogger("workers.test")
    with REDACTOR.holder() as holder:
        holder.know(ODD)
        bind(run_id=uuid4(), note=f"x{ODD}")
        logger.warning("said %s", ODD)
        logger.warning("event", extra={"reason": ODD, "all": {"a": [ODD, {ODD}]}, "token": "t1"})
        logger.warning("event", extra={"odd": ValueError(ODD), "b": ODD.encode()})
        logging.getLogger("dramatiq.x").warning(f"template {ODD}")  # noqa: G004 - as libraries do
        unbind()
    text = process_log.getvalue()
    assert hits(text, ODD) == []
    assert "t1" not in text
    assert len(text.splitlines()) == 4
    assert text.count(MASK) >= 9


def test_the_cli_masks_what_it_has_read_in_its_errors_and_shows_no_traceback(
    odd, shell, monkeypatch, tmp_path
):
    (tmp_path / "secret").write_text(ODD)
    secret = credentials.read("password", "secret", base=tmp_path)

    def fail(*_args: object, **_more: object) -> None:
        raise KeyError(f"password {secret.reveal()} of {ROW}")

    monkeypatch.setattr("storage.accounts.resolve", fail)
    for flags in ((), ("--json",)):
        code, out, err = shell("run", "list", *flags)
        assert code == 1
        assert err.startswith("syncward: internal error (KeyError at ")
        assert len(err.splitlines()) == 1
        assert hits(out + err, ODD) == []
        assert ROW not in out + err
        assert not flags or json.loads(out)["error"]["code"] == "internal"
    code, out, err = shell("run", "show", "x", ODD)  # usage repeats what was typed
    assert (code, MASK in err) == (2, True)
    assert hits(out + err, ODD) == []

    def refuse(*_args: object, **_more: object) -> None:
        raise ConfigError(f"resource shop: {secret.reveal()} is not what it should be")

    monkeypatch.setattr("storage.accounts.resolve", refuse)
    code, out, err = shell("run", "list", "--json")
    assert (code, MASK in err, MASK in out) == (1, True, True)
    assert hits(out + err, ODD) == []
    forget_all(odd)


def test_a_hostile_line_of_10_mb_holds_up_no_log(process_log):
    from workers.run_log import LogWriter, RunLog

    stored: list[logs.LogLine] = []
    writer = LogWriter(stored.extend)
    run_log = RunLog(writer, uuid4(), uuid4())
    hostile = "password=\"' ://a:b@ eyJabcde.Bearer %25\\\\ " * 250_000
    assert len(hostile) > 10_000_000
    with REDACTOR.holder() as holder:
        holder.know(ODD)
        for work in (
            lambda: run_log.info(hostile),
            lambda: run_log.raw([hostile]),
            lambda: logging.getLogger("workers.test").warning("event", extra={"reason": hostile}),
        ):
            taken = []
            for _ in range(4):  # the best of them: the machine has other work
                start = time.thread_time()
                work()
                taken.append(time.thread_time() - start)
            assert min(taken) < 0.1
    writer.flush()
    assert max(len(line.message) for line in stored) <= LOG_MESSAGE_MAX
    assert len(process_log.getvalue()) < 800_000


def test_reading_a_runs_log_is_an_audit_event(odd, shell):
    run, _ = odd.sync()
    assert shell("run", "logs", str(run.run_id), "-A", "acme")[0] == 0
    with odd.cli.transaction() as tx:
        actions = [e.action for e in audit_tail.newest(tx, audit_tail.Filters(), 1_000)]
    assert "logs.read" in actions
