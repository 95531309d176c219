"""What a document would change, what that means for the data, and making it so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from sqlalchemy import Connection as Tx

from cli import credentials
from cli.context import Cli
from cli.document import Document, ResourceEntry, SecretSource
from cli.show import plain
from connectors import registry
from crypto.fingerprint import matches
from crypto.keyring import Keyring
from scheduler.due import next_time, shortest_gap
from schemas.accounts import Account, Connection, ConnectionSpec, Resource
from schemas.errors import ConfigError, NotFound
from schemas.ids import new_id
from schemas.mistakes import meant
from schemas.plans import check_interval, plan
from schemas.schedules import Schedule
from schemas.secret import Secret
from schemas.streams import StreamSpec
from storage import connections, resources

Verb = Literal["create", "update", "unchanged"]

#: Settings of a stream that decide which rows are in its table and how they look: another value
#: reads it from the beginning (a tombstone lets `deletes` decide about rows that are there, too).
_READ_ANEW = {"mode", "key", "cursor", "tombstone", "columns", "mask", "where"}

#: Longer values of a resource's settings are not shown by `diff`.
_SHOWN_MAX = 60


@dataclass(frozen=True, slots=True)
class Change:
    """One thing of the document: what would happen to it, in sentences."""

    verb: Verb
    what: str  # "resource shop", "connection shop-to-lake"
    details: tuple[str, ...] = ()


def next_slot(schedule: Schedule, plan_name: str, now: datetime) -> datetime | None:
    """Return the first slot of a new schedule; ConfigError if the plan forbids its pace."""
    gap = shortest_gap(schedule, now)
    if gap is not None:
        check_interval(plan(plan_name), gap)
    return next_time(schedule, now, now)


@dataclass(frozen=True, slots=True)
class Applying:
    """One pass over a document; with `write` False nothing is changed."""

    cli: Cli
    tx: Tx
    account: Account
    base: Path  # secret files are relative to the document
    now: datetime
    write: bool
    keyring: Keyring


def run(applying: Applying, document: Document, specs: dict[str, ConnectionSpec]) -> list[Change]:
    """Compare, and with `write` make it so. Idempotent: a second pass changes nothing."""
    known = {r.name: r for r in resources.listing(applying.tx)}
    wanted = [_wanted(applying, name, entry) for name, entry in document.resources.items()]
    changes = [_resource(applying, one, known.get(one.name)) for one in wanted]
    after = {r.name: r for r in resources.listing(applying.tx)}
    if not applying.write:  # pretend: names of the document count as there
        after |= {n: known.get(n) or _imagined(applying, n) for n in document.resources}
    existing = {c.spec.name: c for c in connections.listing(applying.tx)}
    changes += [
        _connection(applying, spec, existing.get(spec.name), after) for spec in specs.values()
    ]
    return changes


def _imagined(applying: Applying, name: str) -> Resource:
    account = applying.account
    return Resource(new_id(), account.account_id, name, "", {}, {}, 0, applying.now, applying.now)


@dataclass(frozen=True, slots=True, repr=False)
class _Wanted:
    """A resource of the document: checked, and its secrets read before anything is locked."""

    name: str
    entry: ResourceEntry
    config: dict[str, object]
    secrets: Mapping[str, Secret]


def _wanted(applying: Applying, name: str, entry: ResourceEntry) -> _Wanted:
    policy = applying.cli.settings.link_policy()
    try:
        config = registry.validate_config(entry.kind, entry.config, policy)
    except ConfigError as error:
        raise ConfigError(f"resource {name}: {error.public}") from None
    return _Wanted(name, entry, config, _secrets(applying, name, entry))


def _resource(applying: Applying, one: _Wanted, known: Resource | None) -> Change:
    name, entry, config, wanted = one.name, one.entry, one.config, one.secrets
    if known is not None and applying.write:
        resources.lock(applying.tx, name)
        known = resources.get(applying.tx, name)
    if known is None:
        if applying.write:
            _create_resource(applying, name, entry, config, wanted)
        return Change(
            "create",
            f"resource {name}",
            tuple(f"{field}: sealed from {_origin(entry, field)}" for field in wanted),
        )
    if known.kind != entry.kind:
        raise ConfigError(
            f"resource {name} is of kind {known.kind} and stays so; "
            f"use another name for {entry.kind}"
        )
    details = [
        _setting(key, known.config.get(key), config.get(key))
        for key in sorted({*config, *known.config})
        if config.get(key) != known.config.get(key)
    ]
    limit = entry.runs_max if entry.runs_max != known.runs_max else None
    renewed = registry.renewed_fields(entry.kind)
    moved = bool(details) and _moved(entry.kind, known.config, config)
    stored = resources.fingerprints(applying.tx, known.resource_id, renewed)
    # elsewhere goes what was given now, no newer version that who gives it may not know
    fresh = {f: s for f, s in wanted.items() if moved or not _same(s, stored.get(f, []))}
    forget = resources.check_aim(known, wanted, moved=moved, renewed=renewed)
    if applying.write:
        if details:
            _update(applying, known, config, forget)
        for field, secret in fresh.items():
            version = known.secret_versions.get(field, 0) + 1
            _store(applying, known, field, version, secret, revives=not forget)
        if limit is not None:
            resources.limit_runs(
                applying.tx, applying.account, known, limit, applying.cli.principal
            )
    if limit is not None:
        details.append(f"runs_max: {known.runs_max} becomes {limit}")
    why = "for where it goes now" if moved else "it differs"
    details += [f"{field}: sealed again, {why}" for field in fresh]
    details += [f"{field}: forgotten, it is not sent elsewhere" for field in sorted(forget)]
    return Change("update" if details else "unchanged", f"resource {name}", tuple(details))


def _update(
    applying: Applying, known: Resource, config: dict[str, object], forget: frozenset[str]
) -> None:
    cli, tx = applying.cli, applying.tx
    resources.update_config(tx, applying.account, known, config, cli.principal)
    if forget:
        with cli.keystore.beside(tx) as keys:
            resources.forget(tx, keys, known, forget)


def _moved(kind: str, before: Mapping[str, object], after: Mapping[str, object]) -> bool:
    """Say whether secrets would be sent elsewhere; what cannot be told is taken for a yes."""
    try:
        return registry.aim(kind, before) != registry.aim(kind, after)
    except (ConfigError, ValueError):  # of another version, or its manifest is gone
        return True


def _same(secret: Secret, stored: Sequence[bytes]) -> bool:
    return any(matches(secret.reveal().encode(), one) for one in stored)


def _origin(entry: ResourceEntry, field: str) -> str:
    source = entry.secret[field]
    return source.file if isinstance(source, SecretSource) else source


def _secrets(applying: Applying, name: str, entry: ResourceEntry) -> dict[str, Secret]:
    fields = registry.secret_fields(entry.kind)
    unknown = sorted(set(entry.secret) - set(fields))
    if unknown:
        raise ConfigError(
            f"resource {name}: {entry.kind} has no secret {', '.join(unknown)}; "
            f"it has {', '.join(fields)}"
        )
    for field, source in entry.secret.items():
        if isinstance(source, str) and source not in {"stdin", "prompt"}:
            raise ConfigError(
                f"resource {name}: secret {field} must not stand in the document; "
                "write {file: PATH}, stdin or prompt"
            )
    return {
        field: credentials.read(
            f"resource {name}: {field}", _origin(entry, field), base=applying.base
        )
        for field in entry.secret
    }


def _create_resource(
    applying: Applying,
    name: str,
    entry: ResourceEntry,
    config: dict[str, object],
    wanted: Mapping[str, Secret],
) -> None:
    resource_id = new_id()
    resources.create(
        applying.tx,
        applying.account,
        resource_id=resource_id,
        name=name,
        kind=entry.kind,
        config=config,
        runs_max=entry.runs_max or applying.cli.settings.resource_runs_max,
        principal=applying.cli.principal,
    )
    made = resources.get(applying.tx, name)
    for field, secret in wanted.items():
        _store(applying, made, field, 1, secret)


def _store(
    applying: Applying,
    known: Resource,
    field: str,
    version: int,
    secret: Secret,
    *,
    revives: bool = True,  # not where what is forgotten has to be authorised first
) -> None:
    credentials.store(
        applying.cli,
        applying.tx,
        applying.account,
        applying.keyring,
        resource_id=known.resource_id,
        field=field,
        version=version,
        secret=secret,
        revives=revives,
    )


def _connection(
    applying: Applying,
    spec: ConnectionSpec,
    known: Connection | None,
    ends: dict[str, Resource],
) -> Change:
    for role in (spec.source, spec.destination):
        if role not in ends:
            there = f"there are {', '.join(sorted(ends)) or 'none'}"
            raise NotFound(
                f"connection {spec.name}: there is no resource {role}; "
                f"{meant(role, ends, else_=there)}"
            )
    source, destination = ends[spec.source], ends[spec.destination]
    due = next_slot(spec.schedule, applying.account.plan, applying.now)
    if known is None:
        if applying.write:
            connections.create(
                applying.tx,
                applying.account,
                spec,
                source=source,
                destination=destination,
                next_due_at=due,
                principal=applying.cli.principal,
            )
        details = (
            str(spec.schedule),
            *(f"{s.name}: read from the beginning" for s in spec.streams),
        )
        return Change("create", f"connection {spec.name}", details)
    details = tuple(_differences(known.spec, spec))
    if details and applying.write:
        connections.update(
            applying.tx,
            applying.account,
            known,
            spec,
            source=source,
            destination=destination,
            next_due_at=due,
            principal=applying.cli.principal,
        )
    return Change("update" if details else "unchanged", f"connection {spec.name}", details)


def _differences(old: ConnectionSpec, new: ConnectionSpec) -> Sequence[str]:
    """Say what differs and what that means for the data."""
    lines = []
    if old.schedule != new.schedule:
        lines.append(f"schedule: {old.schedule} becomes {new.schedule}")
    if old.pause_after != new.pause_after:
        lines.append(f"pause_after: {_times(old.pause_after)} becomes {_times(new.pause_after)}")
    if (old.source, old.destination) != (new.source, new.destination):
        lines.append("source or destination changes: every stream is read from the beginning")
    if old.target != new.target:
        lines.append(
            f"target schema {new.target.schema_name}: every stream is read from the beginning "
            f"into new tables; those in {old.target.schema_name} stay"
        )
    lines += [
        f"{name} changes"
        for name in ("description", "parameters")
        if getattr(old, name) != getattr(new, name)
    ]
    before = {s.name: s for s in old.streams}
    for stream in new.streams:
        lines += _stream_differences(before.pop(stream.name, None), stream)
    lines += [f"{name}: no longer read; its table stays" for name in before]
    return lines


def _times(pause_after: int | None) -> str:
    return "never" if pause_after is None else f"{pause_after} failed runs in a row"


def _stream_differences(old: StreamSpec | None, new: StreamSpec) -> list[str]:
    if old is None:
        return [f"{new.name}: new, read from the beginning"]
    changed = [f for f in StreamSpec.model_fields if getattr(old, f) != getattr(new, f)]
    if not changed:
        return []
    anew = _READ_ANEW | ({"deletes"} if new.tombstone is not None else set())
    then = "is read from the beginning" if anew & set(changed) else "goes on where it is"
    verb = "changes" if len(changed) == 1 else "change"
    return [f"{new.name}: {', '.join(changed)} {verb}; it {then}"]


def _setting(key: str, old: object, new: object) -> str:
    """Say how a clear setting of a resource changes; long ones only that they do."""
    shown = ["not set" if value is None else plain(value) for value in (old, new)]
    if any(isinstance(value, dict | list) or len(str(value)) > _SHOWN_MAX for value in (old, new)):
        return f"{key} changes"
    return f"{key}: {shown[0]} becomes {shown[1]}"
