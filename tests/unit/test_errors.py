"""The failure tables: every SQLSTATE and every libpq text has its answer, every code its line."""

import ast
import re
from pathlib import Path

import psycopg
import pytest
from psycopg import errors as pg

from connectors.postgres import errors
from connectors.postgres.errors import (
    AT_SOURCE,
    CLASSES,
    STATES,
    TEXTS,
    Kind,
    answer,
    answer_to_text,
)
from connectors.postgres.link import PostgresConfig, explain
from schemas.errors import ConfigError, CredentialsError, SyncwardError, TransientError
from schemas.failures import FAILURES, PAUSING, Who
from schemas.guards import Guard

ROOT = Path(__file__).parent.parent.parent
CONFIG = PostgresConfig(host="db.example.com", database="shop", user="reader")
#: Codes of commands; no run ends with them.
OF_COMMANDS = {"not_found", "conflict", "start_refused", "unknown_run", "error"} | {
    "keyring",
    "selftest",
}

KNOWN_STATES = sorted(
    {
        str(getattr(c, "sqlstate", None))
        for c in vars(pg).values()
        if isinstance(c, type) and isinstance(getattr(c, "sqlstate", None), str)
    }
)
WHO = {Kind.CONFIG: Who.PERSON, Kind.CREDENTIALS: Who.PERSON, Kind.TRANSIENT: Who.TIME}
TYPE = {
    Kind.CONFIG: ConfigError,
    Kind.CREDENTIALS: CredentialsError,
    Kind.TRANSIENT: TransientError,
}


def test_every_state_that_the_driver_knows_has_a_class_with_an_answer():
    assert len(KNOWN_STATES) > 250
    assert {state[:2] for state in KNOWN_STATES} <= set(CLASSES)


@pytest.mark.parametrize("role", ["source", "destination"])
@pytest.mark.parametrize("state", [*KNOWN_STATES, "00000", "01000", "ZZ999"])
def test_a_state_becomes_an_error_of_ours_that_says_who_can_act(state, role):
    raised = pg.lookup(state) if state in KNOWN_STATES else psycopg.OperationalError
    error = raised("row (1, secret-word)")
    error.sqlstate = state
    found = explain(error, CONFIG, role)
    assert found is not None
    known = answer(state, role)
    assert type(found) is TYPE[known.kind]
    assert found.code == known.code
    assert FAILURES[found.code].who is WHO[known.kind]
    assert found.public.startswith("db.example.com:5432/shop: ")
    assert "secret-word" not in found.public
    assert not re.search(r"[{}]", found.public)


def test_single_states_belong_to_classes_and_say_something_else_than_them():
    for state, (_, one) in {**AT_SOURCE, **STATES}.items():
        assert state[:2] in CLASSES
        if len(state) == 5 and state in STATES:
            assert one is not CLASSES[state[:2]][1], state


@pytest.mark.parametrize(
    ("state", "role", "code"),
    [
        ("28P01", "source", "credentials"),
        ("40P01", "destination", "deadlock"),
        ("40003", "destination", "serialization"),
        ("25006", "destination", "read_only"),
        ("25006", "source", "writes_at_source"),
        ("22012", "source", "data_refused"),
        ("23514", "destination", "constraint"),
        ("23514", "source", "raised_there"),
        ("XX002", "source", "corrupted"),
        ("XX000", "source", "server_bug"),
        ("53400", "source", "server_limit"),
        ("P0001", "destination", "raised_there"),
    ],
)
def test_the_narrowest_answer_of_the_right_side_wins(state, role, code):
    assert answer(state, role).code == code


FATAL = 'connection failed: connection to server at "127.0.0.1", port 5432 failed: FATAL:  '


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (FATAL + 'password authentication failed for user "x"', "credentials"),
        (FATAL + 'role "x" is not permitted to log in', "credentials"),
        (FATAL + 'role "x" does not exist', "credentials"),
        (FATAL + 'no pg_hba.conf entry for host "10.0.0.1", no encryption', "tls_required"),
        (FATAL + 'no pg_hba.conf entry for host "10.0.0.1", SSL encryption', "not_let_in"),
        (FATAL + 'database "x" does not exist', "no_database"),
        (FATAL + "sorry, too many clients already", "too_many_connections"),
        (FATAL + 'too many connections for role "x"', "too_many_connections"),
        (FATAL + "the database system is starting up", "server_restarting"),
        (FATAL + "terminating connection due to administrator command", "connection_lost"),
        (FATAL + "unsupported startup parameter in options: search_path", "pooler"),
        (FATAL + "Passwort-Authentifizierung für Benutzer »x« fehlgeschlagen", "refused_at_login"),
        ("failed to resolve host 'x': [Errno -2] Name or service not known", "no_host"),
        ("failed to resolve host 'x': [Errno -3] Temporary failure in name resolution", "dns"),
        ("server does not support SSL, but SSL was required", "tls_missing"),
        ("SSL error: certificate verify failed: self-signed certificate", "tls_refused"),
        ("connection to server failed: Connection refused", "connection_refused"),
        ("connection timeout expired", "timeout"),
        ("connection failed: Network is unreachable", "unreachable"),
        ("consuming input failed: SSL SYSCALL error: EOF detected", "connection_lost"),
        ("SSL connection has been closed unexpectedly", "connection_lost"),
        ("server closed the connection unexpectedly", "connection_lost"),
        ("consuming input failed: Connection reset by peer", "connection_lost"),
        ("consuming input failed: Connection timed out", "timeout"),
        ("something that nobody has seen yet", "connection_lost"),
    ],
)
def test_what_libpq_says_without_a_state_is_told_apart(text, code):
    assert answer_to_text(text).code == code
    found = explain(psycopg.OperationalError(text), CONFIG, "source")
    assert found is not None
    assert found.code == code


def test_a_broken_tls_link_is_retried_and_a_refused_certificate_is_not():
    lost = explain(
        psycopg.OperationalError("SSL SYSCALL error: EOF detected"), CONFIG, "destination"
    )
    assert isinstance(lost, TransientError)
    refused = explain(
        psycopg.OperationalError("SSL error: certificate verify failed"), CONFIG, "destination"
    )
    assert isinstance(refused, ConfigError)


def test_names_in_a_message_are_not_taken_for_its_meaning():
    text = 'connection to server at "certificate.password authentication failed", port 1 failed: '
    assert answer_to_text(text + "Connection refused").code == "connection_refused"


def test_a_misuse_of_the_driver_is_our_bug_and_stays_one():
    assert explain(psycopg.ProgrammingError("secret-word"), CONFIG, "source") is None
    assert explain(psycopg.DataError("secret-word"), CONFIG, "source") is None


# ── codes ───────────────────────────────────────────────────────────────────────────────────────


def codes_in(tree: ast.AST) -> set[str]:
    """Literal codes: keyword arguments, class attributes, and the second value of an Outcome."""
    found = set()
    constants = {
        ast.unparse(line.targets[0]): getattr(line.value, "value", None)
        for line in getattr(tree, "body", ())
        if isinstance(line, ast.Assign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in {"code", "error_code"}:
            found.add(getattr(node.value, "value", constants.get(ast.unparse(node.value))))
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "code":
                    found.add(getattr(line.value, "value", None))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Outcome" and node.args[1:]:
            found.add(getattr(node.args[1], "value", None))
    return {code for code in found if isinstance(code, str)}


def codes_of_the_program() -> set[str]:
    files = [
        path
        for folder in ("connectors", "crypto", "scheduler", "schemas", "storage", "workers")
        for path in (ROOT / folder).rglob("*.py")
    ]
    found = {code for path in files for code in codes_in(ast.parse(path.read_text()))}
    reap = (ROOT / "storage" / "reap.py").read_text()
    return found | set(re.findall(r"error_code = '(\w+)'", reap)) | {guard.value for guard in Guard}


def test_every_code_of_the_program_has_its_line_and_every_line_its_code():
    of_postgres = {one.code for one in errors.all_answers()}
    assert codes_of_the_program() | of_postgres == set(FAILURES) | OF_COMMANDS


def test_a_code_of_postgres_means_one_thing():
    kinds: dict[str, set[Kind]] = {}
    for one in errors.all_answers():
        kinds.setdefault(one.code, set()).add(one.kind)
    assert {code for code, found in kinds.items() if len(found) > 1} == set()


def test_only_what_would_repeat_at_once_pauses_at_once():
    assert {"credentials", "unsealable", "lost_leases", "needs_reauth"} == PAUSING


def test_every_error_class_says_who_can_act():
    def below(parent: type[SyncwardError]) -> set[type[SyncwardError]]:
        return {parent, *(c for child in parent.__subclasses__() for c in below(child))}

    of_ours = {c for c in below(SyncwardError) if c.__module__ == "schemas.errors"}
    for one in of_ours:
        assert one.code in {*FAILURES, *OF_COMMANDS}, one
    assert len(TEXTS) > 10
