"""Whether the triggers and grants that protect the audit log are still there.

They keep everybody but the database's owner from changing the log; who takes them away leaves
that to see. Every role may read the catalogs that this asks.
"""

from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, text

from storage.audit import GUARDED_TABLES

_ROLES = "('syncward_scheduler', 'syncward_worker', 'syncward_operator', 'syncward_sealer', 'syncward_auditor')"  # noqa: E501 - one list

#: Bits of pg_trigger.tgtype.
_ROW, _BEFORE, _INSERT, _DELETE, _UPDATE, _TRUNCATE = 1, 2, 4, 8, 16, 32


@dataclass(frozen=True, slots=True)
class _Trigger:
    """All that says what a trigger does, as pg_trigger has it."""

    function: str
    type: int
    when: str = ""
    columns: str = ""
    arguments: str = ""
    deferred: bool = False
    always: bool = False  # also where session_replication_role says otherwise


_NO_CHANGE = _Trigger("audit.deny", _ROW | _BEFORE | _UPDATE | _DELETE, always=True)
_NO_TRUNCATE = _Trigger("audit.deny", _BEFORE | _TRUNCATE, always=True)
_STAMP = _Trigger("audit.stamp", _ROW | _BEFORE | _INSERT)
_KEPT = {"no_change": _NO_CHANGE, "no_truncate": _NO_TRUNCATE}
_NOT_OWNER = "(NOT pg_has_role(CURRENT_USER, 'syncward_owner'::name, 'MEMBER'::text))"

#: Of partitions of audit.event.
_OF_PARTITION = {**_KEPT, "stamp": _STAMP}
#: Of the other tables of the log; one that is not named has none.
_OF_TABLE = {
    "audit.event": {"stamp": replace(_STAMP, always=True)},
    "audit.checkpoint": _KEPT,
    "audit.epoch": {
        **_KEPT,
        "audited_epoch": _Trigger(
            "audit.require_epoch_event", _ROW | _INSERT, when=_NOT_OWNER, deferred=True
        ),
    },
    "audit.log": {"only_forward": _Trigger("audit.only_forward", _ROW | _BEFORE | _UPDATE)},
    "audit.principal": {
        "no_change": replace(_NO_CHANGE, function="audit.only_erase"),
        "no_truncate": _NO_TRUNCATE,
        "audited_erasure": _Trigger("audit.require_erasure", _ROW | _UPDATE, deferred=True),
    },
}
#: Of guarded tables, beside those of `_guards`.
_BESIDE = {
    "public.credentials": {
        "audited_envelope": _Trigger(
            "audit.require_event", _ROW | _UPDATE, columns="envelope", arguments="resource_id",
            when="(old.envelope IS DISTINCT FROM new.envelope)", deferred=True,
        )
    },
    "keystore.root": {"moves": _Trigger("keystore.root_moves", _ROW | _BEFORE | _UPDATE)},
}  # fmt: skip


def _guarded() -> list[str]:
    return [name if "." in name else f"public.{name}" for name in sorted(GUARDED_TABLES)]


def _guards(table: str, *, has_state: bool) -> dict[str, _Trigger]:
    """Return what audit.guard_table makes, and what else the table has."""
    column = GUARDED_TABLES[table.removeprefix("public.")]
    audited = _Trigger(
        "audit.require_event", _ROW | _INSERT | _DELETE, arguments=column, deferred=True
    )
    of_state = replace(
        audited, type=_ROW | _UPDATE, columns="state",
        when="(old.state IS DISTINCT FROM new.state)",
    )  # fmt: skip
    return {
        "audited": audited,
        **({"audited_state": of_state} if has_state else {}),
        "no_truncate": replace(_NO_TRUNCATE, always=False),
        **_BESIDE.get(table, {}),
    }


_RELATIONS = text("""
SELECT c.oid, n.nspname || '.' || c.relname AS name, CAST(CAST(c.oid AS regclass) AS text) AS shown,
  EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid) AS is_partition,
  EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'state'
    AND NOT a.attisdropped) AS has_state
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND (n.nspname = 'audit'
  OR n.nspname || '.' || c.relname = ANY (CAST(:guarded AS text[])))
ORDER BY 2
""")

_TRIGGERS = text("""
SELECT t.tgrelid AS rel, t.tgname AS name, n.nspname || '.' || p.proname AS function, t.tgtype AS type,
  coalesce(substring(pg_get_triggerdef(t.oid) FROM ' WHEN \\((.*)\\) EXECUTE FUNCTION '), '') AS condition,
  coalesce((SELECT string_agg(a.attname, ',' ORDER BY a.attnum) FROM pg_attribute a
    WHERE a.attrelid = t.tgrelid AND a.attnum = ANY (t.tgattr)), '') AS columns,
  encode(t.tgargs, 'escape') AS arguments, t.tgdeferrable, t.tginitdeferred, t.tgenabled AS enabled
FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE NOT t.tgisinternal AND t.tgrelid = ANY (:relations)
ORDER BY 1, 2
""")  # noqa: E501 - one column a line


def _wrong_triggers(tx: Connection) -> list[str]:
    """Return where triggers of the log or of guarded tables are not what migrations made."""
    guarded = _guarded()
    relations = tx.execute(_RELATIONS, {"guarded": guarded}).all()
    there: dict[tuple[int, str], Any] = {
        (row.rel, row.name): row
        for row in tx.execute(_TRIGGERS, {"relations": [one.oid for one in relations]})
    }
    found = []
    for one in relations:
        wanted = _OF_TABLE.get(one.name, {})
        if one.name in guarded:
            wanted = _guards(one.name, has_state=one.has_state)
        elif one.is_partition:
            wanted = _OF_PARTITION
        for name, trigger in wanted.items():
            why = _differs(there.pop((one.oid, name), None), trigger)
            found += [f"trigger {name} of {one.shown} {why}"] if why else []
        extra = [name for rel, name in there if rel == one.oid]
        found += [f"trigger {name} of {one.shown} is none of ours" for name in extra]
    missing_ = set(guarded) - {one.name for one in relations}
    return sorted([*found, *(f"table {name} is missing" for name in missing_)])


def _differs(row: Any, wanted: _Trigger) -> str:  # noqa: ANN401 - a row of pg_trigger
    """Say in which way a trigger is not the wanted one; an empty text if it is."""
    if row is None:
        return "is missing"
    if row.enabled not in {"A"} | (set() if wanted.always else {"O"}):
        return "is disabled" if row.enabled in {"D", "R"} else "is not ENABLE ALWAYS"
    checks = {
        "calls another function": row.function == wanted.function,
        "fires at other times": row.type == wanted.type,
        "has another condition": row.condition == wanted.when,
        "watches other columns": row.columns == wanted.columns,
        "has other arguments": row.arguments.removesuffix(r"\000") == wanted.arguments,
        "is not deferred as it was": (row.tgdeferrable, row.tginitdeferred)
        == (wanted.deferred, wanted.deferred),
    }
    return next((why for why, same in checks.items() if not same), "")


#: Functions that guard the log: SHA-256 (16 hex digits) of what they do, in a form that is the same
#: on every major of Postgres. A test tells the new values when a migration changes one.
FUNCTIONS = {
    "audit.approve_prune": "0cf8f5a6608b2e78",
    "audit.carry_out_prune": "1b71b208b81f8b42",
    "audit.commitment_key_of": "0f4344ea12d3d016",
    "audit.cut": "2e268b9c3f6557ae",
    "audit.deny": "7671108feea237b8",
    "audit.erase_name": "6d758c97e468d628",
    "audit.field": "1d71ecd3bf85056d",
    "audit.guard_table": "a9f6bd8e6ee91553",
    "audit.keep_as_written": "e1fc866f306f631f",
    "audit.lag": "ac672d4a87f9fe4e",
    "audit.leaf": "8161d3dfc0522065",
    "audit.only_erase": "9eb777e415c0aa75",
    "audit.only_forward": "c1bbc9f217523329",
    "audit.principal_id": "1231d6720a892f68",
    "audit.principal_of": "ab521854219ad4a4",
    "audit.prune_event": "4a9ffb1569cb89f5",
    "audit.random_key": "0283395f01de3c09",
    "audit.record_prune": "ebc91de73526382a",
    "audit.request_prune": "79e5fcc4e39b80c2",
    "audit.require_epoch_event": "2c63521afb0a82d1",
    "audit.require_erasure": "468165b73138861a",
    "audit.require_event": "9d9bc3e56b6748bc",
    "audit.seal_partition": "6b136c12808711eb",
    "audit.sealed_within": "2778f44e556eee2d",
    "audit.stamp": "eab0ce71aaa52e0a",
    "audit.withdraw_prune": "5cdda24bae04ee7e",
    "keystore.root_moves": "6fd9af8607c45087",
    "public.drop_partitions": "0736b5ecee9f6b10",
    "public.ensure_partitions": "0ac94b0f836ff54c",
}

_FUNCTIONS = text("""
SELECT n.nspname || '.' || p.proname AS name, left(encode(sha256(convert_to(string_agg(concat_ws(
  E'\\n', pg_get_function_identity_arguments(p.oid), pg_get_function_result(p.oid), l.lanname,
  pg_get_userbyid(p.proowner), p.provolatile, p.prosecdef, p.proisstrict,
  array_to_string(p.proconfig, ';'),
  regexp_replace(coalesce(pg_get_function_sqlbody(p.oid), p.prosrc), '\\s+', ' ', 'g')), E'\\n'
  ORDER BY pg_get_function_identity_arguments(p.oid)), 'UTF8')), 'hex'), 16) AS digest
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang
WHERE n.nspname = 'audit' OR n.nspname = 'public' AND p.proname IN ('ensure_partitions',
  'drop_partitions') OR n.nspname = 'keystore' AND p.proname = 'root_moves'
GROUP BY 1 ORDER BY 1
""")


def functions(tx: Connection) -> dict[str, str]:
    """Return what `FUNCTIONS` must say of this database."""
    return {row.name: row.digest for row in tx.execute(_FUNCTIONS)}


def _wrong_functions(tx: Connection) -> list[str]:
    there = functions(tx)
    return [
        f"function {name} " + (
            "is none of ours" if name not in FUNCTIONS
            else "is missing" if name not in there
            else "is not what it was"
        )
        for name in sorted(there.keys() | FUNCTIONS.keys())
        if there.get(name) != FUNCTIONS.get(name)
    ]  # fmt: skip


_GRANTS = f"""
WITH ours AS (
  SELECT m.oid, m.rolname FROM pg_roles m WHERE NOT m.rolsuper
    AND (m.rolname IN {_ROLES} OR EXISTS (SELECT FROM pg_roles g
      WHERE g.rolname IN {_ROLES} AND pg_has_role(m.oid, g.oid, 'MEMBER')))
    AND NOT pg_has_role(m.oid, 'syncward_owner', 'MEMBER')
), kept AS (
  SELECT i.inhrelid AS rel FROM pg_inherits i WHERE i.inhparent = 'audit.event'::regclass
  UNION ALL SELECT unnest(ARRAY['audit.event', 'audit.checkpoint', 'audit.epoch']::regclass[])
)
SELECT o.rolname || ' may ' || p.name || ' ' || k.rel::regclass::text
FROM ours o CROSS JOIN kept k
CROSS JOIN (VALUES ('UPDATE'), ('DELETE'), ('TRUNCATE')) AS p (name)
WHERE has_table_privilege(o.oid, k.rel, p.name)
  OR (p.name = 'UPDATE' AND has_any_column_privilege(o.oid, k.rel, p.name))
UNION ALL
SELECT o.rolname || ' is a member of pg_write_all_data' FROM ours o
WHERE pg_has_role(o.oid, 'pg_write_all_data', 'MEMBER')
ORDER BY 1
"""  # noqa: S608 - a constant

_OTHERS = """
WITH ours AS (
  SELECT c.oid AS rel, c.relname, c.relkind, n.nspname FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
  WHERE n.nspname = 'audit' AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
    OR n.nspname || '.' || c.relname = ANY (CAST(:guarded AS text[]))
)
SELECT 'rule ' || r.rulename || ' of ' || o.rel::regclass::text || ' is none of ours'
FROM ours o JOIN pg_rewrite r ON r.ev_class = o.rel
UNION ALL
SELECT o.rel::regclass::text || ' is no table' FROM ours o WHERE o.relkind NOT IN ('r', 'p')
UNION ALL
SELECT o.rel::regclass::text || ' hides rows' FROM ours o JOIN pg_class c ON c.oid = o.rel
WHERE c.relrowsecurity AND o.nspname = 'audit' AND o.relname !~ '^event(_[0-9]{6}|_default)?$'
UNION ALL
SELECT 'the setting ' || c.said || ' turns triggers off' FROM pg_db_role_setting s
CROSS JOIN unnest(s.setconfig) AS c (said)
WHERE c.said LIKE 'session_replication_role=%' AND c.said <> 'session_replication_role=origin'
  AND (s.setdatabase = 0 OR s.setdatabase = (SELECT oid FROM pg_database
    WHERE datname = current_database()))
ORDER BY 1
"""

#: Policies of audit.event, exactly: (roles, what they let pass).
_POLICIES = {
    "append": (
        "{syncward_operator,syncward_scheduler,syncward_worker}", "INSERT", None,
        ("(action <> ALL (ARRAY['signer.rotated'::text, 'audit.epoch_started'::text, "
        "'audit.pruned'::text, 'sealer.started'::text, 'audit.heartbeat'::text]))"),
    ),
    "append_of_audit": (
        "{syncward_auditor}", "INSERT", None,
        ("(action = ANY (ARRAY['audit.read'::text, 'audit.verified'::text, "
        "'audit.exported'::text]))"),
    ),
    "append_of_sealer": ("{syncward_sealer}", "INSERT", None, "true"),
    "audit_reads": ("{syncward_auditor,syncward_sealer}", "SELECT", "true", None),
    "operator_reads": ("{syncward_operator}", "SELECT", "true", None),
}  # fmt: skip

_ASKED_POLICIES = """
SELECT policyname, roles::text, cmd, qual, with_check, permissive, tablename FROM pg_policies
WHERE schemaname = 'audit'
"""

_READS = """
SELECT c.oid::regclass::text || ' has no row security' FROM pg_class c
WHERE NOT c.relrowsecurity AND (c.oid = 'audit.event'::regclass
  OR c.oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'audit.event'::regclass))
ORDER BY 1
"""


def missing(tx: Connection) -> list[str]:
    """Return what protects the log no more, one line each; nothing if all is in place."""
    guarded = _guarded()
    found = [
        *_wrong_triggers(tx),
        *tx.execute(text(_GRANTS)).scalars(),
        *tx.execute(text(_READS)).scalars(),
        *tx.execute(text(_OTHERS), {"guarded": guarded}).scalars(),
        *_wrong_policies(tx),
        *_wrong_functions(tx),
    ]
    return [str(line) for line in found]


def _wrong_policies(tx: Connection) -> list[str]:
    """Return where a policy of the log is not what a migration made it."""
    there = {}
    for row in tx.execute(text(_ASKED_POLICIES)):
        ours = (row.tablename, row.permissive) == ("event", "PERMISSIVE")
        name = row.policyname if ours else f"{row.policyname} ({row.tablename}, {row.permissive})"
        there[name] = (row.roles, row.cmd, row.qual, row.with_check)
    return [
        f"policy {name} of audit.event is not as it was made"
        for name in sorted(there.keys() | _POLICIES.keys())
        if there.get(name) != _POLICIES.get(name)
    ]
