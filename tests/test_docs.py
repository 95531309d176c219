"""Everything an operator can meet is documented in one place, and the page tells the truth."""

import importlib
import json
import re
import tomllib
from dataclasses import fields, replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from uuid import UUID, uuid4

import click
import pytest
from prometheus_client import REGISTRY

from cli.checks import AREAS
from cli.document import ConnectionEntry, Document, ResourceEntry
from cli.main import syncward
from connectors import registry, sources
from connectors.portable import Kind, kind_of
from connectors.postgres.errors import AT_SOURCE, CLASSES, STATES, TEXTS, answer
from connectors.row_groups import BYTES_MAX, ROWS_MAX
from scheduler.cluster import families, key_ages
from schemas.aid import Aid
from schemas.audit import (
    AuditAction,
    AuditEvent,
    FieldChange,
    Principal,
    TargetKind,
    audit_class,
)
from schemas.audit_body import REASON_MAX, body_of
from schemas.audit_details import DETAILS
from schemas.egress import LinkPolicy
from schemas.failures import FAILURES, PAUSING, Who
from schemas.guards import Guard
from schemas.plans import PLANS
from schemas.records import Destination, LoadRequest, Source, WireFormat
from schemas.runs import MOVES, Rule
from schemas.settings import Settings
from schemas.streams import Guards, StreamSpec, format_duration
from storage.gauges import ConnectionGauges, Gauges

ROOT = Path(__file__).parent.parent
METRIC_MODULES = (
    "workers.metrics", "scheduler.metrics", "audit.metrics", "storage.audit", "storage.metrics",
)  # fmt: skip
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def table(text: str, header: str) -> list[list[str]]:
    """Return the cells of the table whose header line begins like this."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_every_setting_is_documented_with_its_default_and_meaning():
    documented = [tuple(row) for row in table(page("settings.md"), "| Variable")]
    actual = []
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = format_duration(default) if isinstance(default, timedelta) else str(default)
        shown = "unset" if default is None else shown
        actual.append((f"`SYNCWARD_{name.upper()}`", f"`{shown}`", field.description))
    assert documented == actual


def process_metrics() -> dict[str, tuple[str, str]]:
    for module in METRIC_MODULES:
        importlib.import_module(module)
    found = {}
    for family in REGISTRY.collect():
        if family.name.startswith("syncward_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found[name] = (family.type, family.documentation)
    return found


def cluster_metrics() -> dict[str, tuple[str, str]]:
    reading = Gauges({}, 0, 0, {}, {}, 0, 0, 0, 0, 1, {}, 0, 0, 0, 0, 0, 0)
    shown = [*families(reading, ConnectionGauges()), key_ages({})]
    return {f.name: (f.type, f.documentation) for f in shown}


def test_every_metric_is_documented_with_name_type_and_help():
    documented = {
        row[0].strip("`"): (row[1], row[4]) for row in table(page("metrics.md"), "| Metric")
    }
    assert documented == process_metrics() | cluster_metrics()


def test_the_labels_of_every_process_metric_are_documented():
    documented = {row[0].strip("`"): row[2] for row in table(page("metrics.md"), "| Metric")}
    for module in METRIC_MODULES:
        for metric in vars(importlib.import_module(module)).values():
            if hasattr(metric, "_labelnames"):
                names = [n for n in documented if n.removesuffix("_total") == metric._name]
                assert [documented[n] for n in names] == [", ".join(metric._labelnames)]


def test_every_audit_action_is_documented_with_its_class():
    documented = {row[0].strip("`"): row[1] for row in table(page("audit.md"), "| Action")}
    assert documented == {a.value: audit_class(a).value for a in AuditAction}


def test_the_detail_of_every_audit_action_is_documented():
    documented = {row[0].strip("`"): row[3] for row in table(page("audit.md"), "| Action")}
    assert documented == {
        action.value: ", ".join(f"`{name}`" for name in model.model_fields) or "-"
        for action, model in DETAILS.items()
    }


def test_the_fields_of_a_body_are_documented():
    documented = {row[0].strip("`") for row in table(page("audit.md"), "| Field")}
    event = AuditEvent(
        AuditAction.RUN_QUEUED, TargetKind.RUN, UUID(int=1),
        Principal("operator", "x", request="r"), reason="x", run_id=UUID(int=1),
        change=(FieldChange("x", None, "y"),),
    )  # fmt: skip
    assert documented == set(json.loads(body_of(event, {}, "x")))
    assert f"{REASON_MAX:,} characters" in page("audit.md")


def test_every_audit_action_is_emitted_somewhere():
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("audit", "cli", "scheduler", "storage", "workers")
        for path in (ROOT / folder).rglob("*.py")
    )
    assert [a.name for a in AuditAction if f"AuditAction.{a.name}" not in code] == []


def test_the_drawing_of_states_has_exactly_the_legal_moves():
    drawn = set(re.findall(r"^    (\w+) --> (\w+)", page("states.md"), re.MULTILINE))
    assert drawn == {(a.value, b.value) for a, moves in MOVES.items() for b in moves}


def test_every_rule_of_run_explain_is_documented_in_its_order():
    documented = [row[0].strip("`") for row in table(page("states.md"), "| Rule")]
    assert documented == [rule.value for rule in Rule]


def test_every_connector_is_documented_in_its_roles():
    documented = {row[0].strip("`"): row[1:] for row in table(page("connectors.md"), "| Connector")}
    sources, destinations = registry.sources(), registry.destinations()
    assert set(documented) == sources | destinations
    for name, (source, destination, secrets, _) in documented.items():
        assert (source == "yes", destination == "yes") == (name in sources, name in destinations)
        assert secrets == ", ".join(f"`{field}`" for field in registry.secret_fields(name))


@pytest.mark.parametrize("name", sorted(registry.sources() | registry.destinations()))
def test_every_setting_of_a_connector_is_documented(name):
    pages = {row[0].strip("`"): row[4] for row in table(page("connectors.md"), "| Connector")}
    text = page(pages[name].partition("](")[2].rstrip(")"))
    documented = {row[0].strip("`") for row in table(text, "| Setting")}
    role = "sources" if name in registry.sources() else "destinations"
    config = importlib.import_module(f"connectors.{role}.{name}").CONFIG
    assert documented == set(config.model_fields)


def test_every_setting_of_a_stream_is_documented():
    documented = [row[0].strip("`") for row in table(page("streams.md"), "| Stream setting")]
    assert documented == list(StreamSpec.model_fields)


def test_every_guard_is_documented_with_its_default():
    documented = {row[0]: row[1] for row in table(page("streams.md"), "| Guard ")}
    shown = {True: "true"}
    assert documented == {
        f"`{name}`": f"`{shown.get(value, value)}`"
        for name, value in Guards().model_dump(mode="json").items()
    }
    assert set(Guard) <= {name.strip("`") for name in documented}


def protocol_methods() -> set[str]:
    return {n for p in (Source, Destination) for n in vars(p) if not n.startswith("_")}


def test_everything_that_a_connector_owes_is_on_the_page_about_writing_one():
    text = page("writing-connectors.md")
    documented = {row[0].strip("`") for row in table(text, "| Method")}
    assert documented == protocol_methods()
    kinds = {row[0].strip("`"): row[2] for row in table(text, "| Kind")}
    assert set(kinds) == {kind.value for kind in Kind}
    for kind, types in kinds.items():
        assert {kind_of(t) for t in re.findall(r"`([^`]+)`", types)} == {Kind(kind)}
    asked = {row[0].strip("`").split(".")[0] for row in table(text, "| Member")}
    assert asked == {member.name for member in fields(Aid)}
    bounds = f"about {ROWS_MAX:,} rows or {BYTES_MAX >> 20} MiB"
    assert bounds in text


def test_the_connector_on_the_page_works(tmp_path, monkeypatch):
    code = page("writing-connectors.md").split("```python\n")[1].split("```")[0]
    (tmp_path / "numbers_of_the_page.py").write_text(code)
    (tmp_path / "files").mkdir()
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
    policy = LinkPolicy(files_root=tmp_path / "files")
    source = registry.open_source("numbers_of_the_page", {"upto": 3}, {}, policy)
    lake = registry.open_destination("files", {"path": "lake", "format": "jsonl"}, {}, policy)
    spec = StreamSpec(name="all.numbers", mode="append", cursor="n")
    request = LoadRequest(UUID(int=1), UUID(int=2), 1, 1, spec, "acme")
    for fence, expected in ((1, 3), (2, 0)):
        request = replace(request, fence=fence, run_id=uuid4())
        known = lake.claim_stream(request)
        with source.extract(spec, known.cursor, WireFormat.ROWS) as batches:
            assert lake.load(request, next(batches)).rows_inserted == expected


def test_every_check_of_doctor_is_documented_with_why_and_what_to_do():
    documented = [tuple(row) for row in table(page("operations.md"), "| Check")]
    actual = [
        (f"`{area.name}.{check.name}`", check.why, check.do)
        for area in AREAS.values()
        for check in (area.unreachable, *area.checks)
    ]
    assert documented == actual
    names = [name for name, _, _ in documented]
    assert len(names) == len(set(names))


def test_every_reason_of_a_pause_is_explained():
    documented = {row[0].strip("`") for row in table(page("operations.md"), "| Reason")}
    assert documented == PAUSING | {"operator", "failures"}


RETRIED = {
    Who.PERSON: "no",
    Who.TIME: "yes",
    Who.TIME_TOLD: "yes, uncounted",
    Who.APPROVER: "after approval",
    Who.NOBODY: "no",
    Who.US: "no",
}


def test_every_code_of_a_failure_is_documented_with_what_follows_from_it():
    documented = [tuple(row) for row in table(page("errors.md"), "| Code ")]
    actual = [
        (f"`{code}`", str(f.who), RETRIED[f.who], "yes" if f.pauses else "no", f.help)
        for code, f in FAILURES.items()
    ]
    assert documented == actual


@pytest.mark.parametrize(("header", "answers"), [("| Class", CLASSES), ("| SQLSTATE", STATES)])
def test_the_tables_of_states_are_those_of_the_code(header, answers):
    documented = {row[0]: row[1:] for row in table(page("errors.md"), header)}
    single = {state for state in AT_SOURCE if len(state) == len("00000")}
    assert set(documented) == set(answers) | (single if answers is STATES else set())
    for state, (meaning, there, at_source) in documented.items():
        known = {**AT_SOURCE, **answers}[state]
        assert meaning == known[0]
        full = state if len(state) == len("00000") else f"{state}ZZZ"
        assert there == f"`{answer(full, 'destination').code}`"
        assert at_source in {"", f"`{answer(full, 'source').code}`"}
        assert (at_source == "") == (answer(full, "source").code == there.strip("`"))


def test_every_code_without_a_state_is_on_the_page():
    tail = page("errors.md").split("Where there is no SQLSTATE")[1]
    assert {code for _, one in TEXTS for code in [one.code]} <= set(re.findall(r"`(\w+)`", tail))


def commands(group: click.Group = syncward, prefix: str = "syncward") -> list[str]:
    context = click.Context(group)
    found = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        line = f"{prefix} {name}"
        if isinstance(command, click.Group):
            found += commands(command, line)
        else:
            found.append(line)
    return found


def documented_commands() -> set[str]:
    """`syncward run list`, `show` documents two commands of one noun."""
    found = set()
    for row in table(page("cli.md"), "| Command"):
        noun = ""
        for text in re.findall(r"`([^`]+)`", row[0]):
            words = [w for w in text.split() if re.fullmatch(r"[a-z][a-z-]*", w)]
            nested = words[1:3] in (["audit", "key"], ["connection", "schema"])
            length = 4 if nested else 3
            whole = text.startswith("syncward ")
            line = " ".join(words[:length] if whole else [*noun.split(), *words])
            found.add(line)
            noun = " ".join(line.split()[:2])
    return found


def test_every_command_is_documented_and_every_documented_command_exists():
    assert documented_commands() == set(commands())


def options(group: click.Group = syncward) -> set[str]:
    context = click.Context(group)
    found: set[str] = set()
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            found |= options(command)
        elif command is not None:
            found |= {opt for param in command.params for opt in param.opts}
    return found


def test_every_option_that_the_commands_page_names_exists():
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page("cli.md")))
    assert named - options() - {"--dev"} == set()


def test_every_plan_is_named_where_plans_are_chosen():
    for name in PLANS:
        assert name in page("cli.md")


def test_the_readme_is_short_and_leads_with_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    assert text.index("make demo") < text.index("make test") < 1_500


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?://)([^)]+)", path.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        led_to = path.parent / name if name else path
        assert led_to.exists(), target
        if heading and led_to.suffix == ".md":
            assert heading in headings(led_to.read_text(encoding="utf-8")), target


def headings(text: str) -> set[str]:
    """Return the names that links to a page's headings have."""
    titles = re.findall(r"(?m)^#+ (.*)", text)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_dependency_has_its_line():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[<>=;~ ]", requirement)[0] for requirement in wanted}
    text = page("decisions/dependencies.md")
    documented = {
        row[0].strip("`")
        for part in text.split("For development")
        for row in table(part, "| Package")
    }
    assert documented == names


def test_every_decision_is_listed():
    listed = page("decisions/README.md")
    for path in (ROOT / "docs" / "decisions").glob("0*.md"):
        assert path.name in listed


def test_every_key_of_a_document_is_documented():
    text = page("documents.md")
    for header, model in (
        ("| Key |", Document),
        ("| Key of a resource", ResourceEntry),
        ("| Key of a connection", ConnectionEntry),
    ):
        names = [re.findall(r"`([a-z_]+)`", row[0]) for row in table(text, header)]
        assert set(chain(*names)) == set(model.model_fields)


def test_every_page_is_reached_from_the_readme():
    seen, left = set(), [ROOT / "README.md"]
    while left:
        path = left.pop()
        if path in seen or path.suffix != ".md":
            continue
        seen.add(path)
        links = re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text(encoding="utf-8"))
        left += [(path.parent / name).resolve() for name in links]
    assert set(ROOT.glob("docs/*.md")) - seen == set()
