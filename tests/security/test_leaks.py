"""One test for each way in which a library shows a secret, and rules that keep them closed."""

import ast
import importlib
import logging
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from psycopg import sql
from pydantic import BaseModel, PostgresDsn, ValidationError  # noqa: TID251 - shown to leak
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from connectors.postgres.link import PostgresConfig
from schemas.errors import SyncwardError
from schemas.log_lines import Formatter
from schemas.redaction import MASK, REDACTOR
from schemas.runs import RunState
from schemas.settings import Settings
from storage.engine import open_engine, transaction
from tests import leaks
from tests.leaks import hits

ROOT = Path(__file__).parent.parent.parent
PACKAGES = (
    *("cli", "connectors", "crypto", "embedded", "scheduler", "schemas", "storage", "workers"),
)
ODD = 'P@ss w:0rd@/%2f"\\é?x#y'
ROW = "bob-of-the-row@example.org"


def fragments(secret: str) -> list[str]:
    """What a parser that splits at @ : / ? # would quote, and the whole."""
    return [part for part in re.split(r"[@:/?#]", secret) if len(part) > 2] + [secret]


def as_logged(error: BaseException) -> str:
    """The line that a process writes about this error."""
    info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("workers.x", logging.ERROR, __file__, 1, "crashed", (), info)
    return Formatter("json").format(record)


# ── a DSN with an odd password ──────────────────────────────────────────────────────────────────


@pytest.mark.integration
def test_an_odd_password_of_the_control_database_is_in_no_error(control):
    bare = make_url(control.url)
    for changes in ({"host": "no-such-host.invalid"}, {"port": 1}, {}, {"database": "no_such"}):
        url = bare.set(password=ODD, **changes).render_as_string(hide_password=False)
        engine = open_engine(url, "operator", pool_size=1)
        with pytest.raises(SyncwardError) as caught, transaction(engine):
            pass
        engine.dispose()
        said = caught.value.public + as_logged(caught.value)
        assert [part for part in fragments(ODD) if part in said] == []
        assert hits(said, ODD) == []


@pytest.mark.integration
def test_an_odd_password_that_is_not_encoded_in_the_url_is_refused_without_a_part_of_it():
    for url in (f"postgresql://dev:{ODD}@127.0.0.1:1/x", f"postgres//dev:{ODD}@h/x"):
        try:
            engine = open_engine(url, "operator", pool_size=1)
            with transaction(engine):
                raise AssertionError
        except SyncwardError as error:
            said = error.public + as_logged(error)
        assert [part for part in fragments(ODD) if part in said] == []


@pytest.mark.integration
def test_an_odd_password_of_a_source_is_in_no_error(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    old, world.pair.logins["reader"] = world.pair.logins["reader"], ODD
    try:
        world.apply({"public.t": "{mode: replace}"})
        REDACTOR.forget(ODD)
        world.control.act("UPDATE credentials SET aim = NULL")  # it is sent wherever it is told to
        for config in ("{}", '{"host": "no-such-host.invalid"}', '{"port": 1}'):
            world.control.act(
                "UPDATE resources SET config = config || CAST(:c AS jsonb) WHERE name = 'shop'",
                c=config,
            )
            run, _ = world.sync()
            assert run.error
            said = run.error + world.log(run.run_id)
            assert [part for part in fragments(ODD) if part in said] == []
            if run.state is not RunState.FAILED:
                world.control.act("DELETE FROM active_runs")
            world.control.act("UPDATE schedules SET state = 'active', state_reason = NULL")
    finally:
        world.pair.logins["reader"] = old


# ── psycopg and SQLAlchemy ──────────────────────────────────────────────────────────────────────


@pytest.mark.integration
def test_a_session_shows_its_password_on_request_only(world):
    with world.pair.connect("source") as session:
        assert session.info.password, "the leak is there: hence the ban below"
        assert session.info.password not in repr(session) + str(session.info) + session.info.dsn


@pytest.mark.integration
def test_parameters_and_details_of_the_control_database_are_in_no_error(world):
    world.account("one")
    engine = world.control.engine("operator")
    with pytest.raises(SyncwardError) as caught, transaction(engine) as tx:
        tx.execute(
            text("INSERT INTO accounts (id, name, company, plan) SELECT id, name, :c, plan "
                 "FROM accounts"),
            {"c": ROW},
        )  # fmt: skip
    assert caught.value.__cause__ is not None
    assert ROW not in caught.value.public + as_logged(caught.value)
    with pytest.raises(SQLAlchemyError) as raw, engine.begin() as tx:
        tx.execute(text("SELECT CAST(:c AS int) FROM nowhere_at_all"), {"c": ROW})
    assert ROW not in str(raw.value), "hide_parameters"


@pytest.mark.integration
def test_what_a_driver_says_of_rows_is_masked_even_in_the_runs_log(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, email text)",
        f"INSERT INTO t VALUES (1, '{ROW}')",
        f"CREATE TABLE texts AS SELECT '{ROW}'::text AS email",
        "CREATE VIEW u AS SELECT email::int AS id FROM texts",
    )
    world.apply({"public.t": "{mode: merge, key: [id]}", "public.u": "{mode: replace}"})
    world.sync()
    world.pair.session("destination").execute("CREATE UNIQUE INDEX ON acme.t (email)")
    world.pair.source(f"INSERT INTO t VALUES (2, '{ROW}')")
    run, streams = world.sync()
    assert run.state is RunState.FAILED
    assert {stream.state for stream in streams.values()} == {"failed"}
    assert ROW not in leaks.tables(world.control) + str(streams) + str(run)
    log = world.log(run.run_id)
    assert f"invalid input syntax for type integer: {MASK}" in log
    assert f"DETAIL:{MASK}" in log


@pytest.mark.integration
def test_no_secret_is_a_parameter_that_a_postgres_logs(world):
    """With every statement and every parameter logged, as a server does unless told not to."""
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    names = (world.control.database, *world.pair.names.values())
    admin = world.pair.session("source")
    for name in names:
        for setting, value in (
            ("log_statement", "all"), ("log_parameter_max_length", "-1"),
            ("log_parameter_max_length_on_error", "-1"), ("log_min_duration_statement", "0"),
        ):  # fmt: skip
            admin.execute(
                sql.SQL("ALTER DATABASE {} SET {} = {}").format(
                    sql.Identifier(name), sql.Identifier(setting), sql.Literal(value)
                )
            )
    log = world.pair.cluster.log_path
    before = log.stat().st_size
    world.control.disconnect()
    world.deps.heartbeat.drop_link()
    world.apply({"public.t": "{mode: replace}"})
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED
    with world.pair.connect("source") as session:
        session.execute("SELECT %s::text", ("planted-parameter",))
    with log.open("rb") as file:
        file.seek(before)
        said = file.read().decode("utf-8", "replace")
    assert "planted-parameter" in said, "the search must see parameters"
    assert "INSERT INTO run_logs" in said
    for password in world.pair.logins.values():
        assert hits(said, password) == []


# ── pydantic, httpx, tracebacks ─────────────────────────────────────────────────────────────────


def models() -> list[type[BaseModel]]:
    for package in PACKAGES:
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if not module.name.startswith("storage.migrations"):
                importlib.import_module(module.name)
    found, waiting = [], [BaseModel]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.__module__.split(".")[0] in PACKAGES:
                found.append(kind)
    return found


def test_no_model_of_ours_quotes_what_it_was_given():
    assert len(models()) > 10
    assert [m.__name__ for m in models() if not m.model_config.get("hide_input_in_errors")] == []
    with pytest.raises(ValidationError) as caught:
        PostgresConfig.model_validate({"host": "h", "database": "d", "user": [ODD]})
    assert hits(str(caught.value), ODD) == []
    with pytest.raises(ValidationError) as caught:
        Settings(worker_threads=ODD)
    assert hits(str(caught.value), ODD) == []


def test_a_postgres_dsn_of_pydantic_would_show_its_password():
    """The leak is there: hence the ban in pyproject.toml."""
    assert "hunter2" in str(PostgresDsn("postgresql://u:hunter2@h/x"))
    project = (ROOT / "pyproject.toml").read_text()
    for banned in ("pydantic.PostgresDsn", "traceback.format_exc", "rich.traceback.install"):
        assert f'"{banned}".msg' in project


def test_what_httpx_says_of_urls_and_headers_is_masked():
    headers = {"X-Api-Key": "key-1a2b3c", "Cookie": "sid=tok-9f8e", "Authorization": "Token t-77"}
    request = httpx.Request("GET", "https://u:p%40ss@h/x?access_token=abc-123&n=1", headers=headers)
    with pytest.raises(httpx.HTTPStatusError) as caught:
        httpx.Response(401, request=request).raise_for_status()
    raw = f"{caught.value} {request.headers!r} {request.headers.raw!r}"
    shown = REDACTOR.text(raw)
    for value in ("p%40ss", "abc-123", "key-1a2b3c", "tok-9f8e", "t-77"):
        assert value in raw, "the leak is there"
        assert value not in shown
        assert value not in as_logged(caught.value)


def test_the_loggers_of_libraries_say_warnings_only():
    code = (
        "from schemas.log_lines import log_to_stderr; import httpx, logging; "
        "log_to_stderr('people'); "
        "t = httpx.MockTransport(lambda request: httpx.Response(200)); "
        "httpx.Client(transport=t).get('https://u:hunter2@h/?token=abc-123'); "
        "logging.getLogger('planted').info('heard')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "heard" in ended.stderr
    assert "hunter2" not in ended.stderr
    assert "abc-123" not in ended.stderr


def test_a_traceback_has_no_values_of_variables():
    def fail(password: str) -> None:
        local = {"password": password, "headers": f"x-{password}"}
        raise ValueError(local)

    with pytest.raises(ValueError, match="P@ss") as caught:
        fail(ODD)
    line = as_logged(caught.value)
    assert "test_leaks.py" in line
    assert hits(line, ODD) == []


# ── rules over the source ───────────────────────────────────────────────────────────────────────

#: Where the words of an exception that others wrote may be read, and why.
READERS = {
    ("cli/parameters.py", "convert"): "the ValueError is our own, of parse_duration",
    ("storage/engine.py", "_explain"): "42501 of our own database, whose functions are ours",
    ("connectors/postgres/link.py", "explain"): "looked at, never shown",
    ("connectors/postgres/link.py", "_object"): "only what the server's own code said, by file",
    ("storage/engine.py", "_unreachable"): "looked at, never shown",
    ("connectors/postgres/column_types.py", "is_too_large"): "looked at, never shown",
    ("connectors/postgres/refusals.py", "refused_line"): "only the number of a line",
    ("connectors/postgres/refusals.py", "_copied_column"): "only a column's name that we know",
    ("connectors/postgres/refusals.py", "next_care"): "looked at, never shown",
    ("connectors/mariadb/link.py", "_explain"): "only the number",
    ("connectors/files/layout.py", "fitted"): "only a column of our own",
    ("connectors/rest/manifest.py", "_unknown"): "the ValueError is our own, of rest.text",
    ("connectors/rest/turning.py", "path_of"): "the ValueError is our own, of rest.text",
    ("connectors/rest/tokens.py", "filled_endpoint"): "the ValueError is our own, of rest.text",
    ("workers/quotas.py", "_reason"): "looked at, never shown",
    ("workers/causes.py", "_text"): "goes masked to the run's sealed log",
}
_WORDS = {"args", "message_primary", "message_detail", "message_hint", "context", "__notes__"}


def exceptions_named(function: ast.AST) -> set[str]:
    """Names that hold an exception here: `except X as name`, and annotated parameters."""
    names = {n.name for n in ast.walk(function) if isinstance(n, ast.ExceptHandler) and n.name}
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and node.annotation is not None:
            kind = ast.unparse(node.annotation)
            if re.search(r"(Error|Exception)\b", kind) and "SyncwardError" not in kind:
                names.add(node.arg)
    return names


def ours(function: ast.AST) -> set[str]:
    """Names that hold only errors whose words we wrote."""
    kinds = {"SyncwardError", "ConfigError", "TransientError", "StartRefused", "NotFound"}
    kinds |= {"Conflict", "LeaseLost", "GuardTripped", "CredentialsError", "Draining"}
    return {
        node.name
        for node in ast.walk(function)
        if isinstance(node, ast.ExceptHandler)
        and node.name
        and node.type is not None
        and {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} <= kinds
    }


def words_read(function: ast.AST) -> list[str]:
    """Return the expressions that turn an exception into its words."""
    names = exceptions_named(function) - ours(function)
    found: list[ast.AST] = []
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Name(id="str" | "repr" | "format" | "print"), args=args):
                found += [a for a in args if isinstance(a, ast.Name) and a.id in names]
            case ast.FormattedValue(value=ast.Name(id=name)) if name in names:
                found.append(node)
            case ast.BinOp(op=ast.Mod(), right=right):
                used = {n.id for n in ast.walk(right) if isinstance(n, ast.Name)}
                found += [node] if used & names else []
            case ast.Attribute(attr=attr) if attr in _WORDS:
                root = node.value
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(root, ast.Name) and root.id in names | {"diag"}:
                    found.append(node)
    return [ast.unparse(node) for node in found]


def readers(source: str) -> set[str]:
    """Name the outermost functions that read the words of an exception."""
    tree = ast.parse(source)
    holders: list[ast.Module | ast.ClassDef] = [tree]
    holders += [node for node in tree.body if isinstance(node, ast.ClassDef)]
    functions = [n for holder in holders for n in holder.body if isinstance(n, ast.FunctionDef)]
    return {f.name for f in functions if words_read(f)}


def sources() -> list[Path]:
    return sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def test_the_words_of_an_exception_are_read_in_named_places_only():
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in sources()
        for name in readers(path.read_text(encoding="utf-8"))
    }
    assert found == set(READERS)


@pytest.mark.parametrize(
    "body",
    ["str(e)", "f'{e}'", "'%s' % e", "repr(e)", "e.args", "print(e)", "e.diag.message_detail"],
)
def test_the_rule_sees_every_way_to_read_them(body):
    source = f"def f():\n    try:\n        g()\n    except psycopg.Error as e:\n        {body}\n"
    assert readers(source) == {"f"}
    assert readers(source.replace("psycopg.Error", "ConfigError")) == set()


def test_nothing_asks_a_session_for_its_password_or_shows_local_variables():
    banned = re.compile(
        r"\.info\.password|show_locals|capture_locals|PostgresDsn|hide_password=False"
        r"|logger\.exception|format_exception\(|print_exc"
    )
    assert banned.search("session.info.password")
    found = {
        (str(path.relative_to(ROOT)), match.group())
        for path in sources()
        for match in banned.finditer(path.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_engines_hide_parameters():
    """But for those of the embedded servers, which get none."""
    found = {
        str(path.relative_to(ROOT)): ast.unparse(node)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "create_engine"
        and "hide_parameters=True" not in ast.unparse(node)
    }
    assert set(found) <= {"cli/dev.py"}


def test_psycopg_is_asked_to_connect_by_fields_only():
    """A conninfo string would be parsed by libpq, whose errors quote parts of the password."""
    calls = [
        (str(path.relative_to(ROOT)), ast.unparse(node))
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func) in ("psycopg.connect", "psycopg.Connection.connect")
        and node.args
    ]
    assert calls == []
