"""Whether the triggers and grants that protect the audit log are still there.

They keep everybody but the database's owner from changing the log; who takes them away leaves
that to see. Every role may read the catalogs that this asks.
"""

from sqlalchemy import Connection, text

from storage.audit import GUARDED_TABLES

_ROLES = "('syncward_scheduler', 'syncward_worker', 'syncward_operator', 'syncward_sealer', 'syncward_auditor')"  # noqa: E501 - one list

_TRIGGERS = """
WITH kept AS (
  SELECT i.inhrelid AS rel FROM pg_inherits i WHERE i.inhparent = 'audit.event'::regclass
  UNION ALL SELECT unnest(ARRAY['audit.checkpoint', 'audit.epoch']::regclass[])
), guarded AS (  -- by their names: no cast, which asks for a right to the schema
  SELECT c.oid::regclass AS rel FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  WHERE n.nspname || '.' || c.relname = ANY (CAST(:guarded AS text[]))
), wanted (rel, name, function, states) AS (
  SELECT rel, n.name, 'audit.deny', 'A' FROM kept
    CROSS JOIN (VALUES ('no_change'), ('no_truncate')) AS n (name)
  UNION ALL SELECT 'audit.event'::regclass, 'stamp', 'audit.stamp', 'A'
  UNION ALL SELECT 'audit.principal'::regclass, 'no_change', 'audit.only_erase', 'A'
  UNION ALL SELECT 'audit.principal'::regclass, 'no_truncate', 'audit.deny', 'A'
  UNION ALL SELECT 'audit.principal'::regclass, 'audited_erasure', 'audit.require_erasure', 'OA'
  UNION ALL SELECT i.inhrelid, 'stamp', 'audit.stamp', 'OA' FROM pg_inherits i
    WHERE i.inhparent = 'audit.event'::regclass
  UNION ALL SELECT g.rel, n.name, n.function, 'OA' FROM guarded g
    CROSS JOIN (VALUES ('audited', 'audit.require_event'), ('no_truncate', 'audit.deny'))
      AS n (name, function)
  UNION ALL SELECT g.rel, 'audited_state', 'audit.require_event', 'OA' FROM guarded g
    WHERE EXISTS (SELECT FROM pg_attribute WHERE attrelid = g.rel
                  AND attname = 'state' AND NOT attisdropped)
  UNION ALL SELECT 'public.credentials'::regclass, 'audited_envelope', 'audit.require_event', 'OA'
)
SELECT 'trigger ' || w.name || ' of ' || w.rel::regclass::text || CASE
    WHEN t.tgname IS NULL THEN ' is missing'
    WHEN t.tgenabled = 'D' THEN ' is disabled'
    WHEN position(t.tgenabled IN w.states) = 0 THEN ' is not ENABLE ALWAYS'
    WHEN (t.tgqual IS NOT NULL) <> (w.name IN ('audited_state', 'audited_envelope'))
      THEN ' has another condition'
    ELSE ' calls another function' END
FROM wanted w
LEFT JOIN pg_trigger t ON t.tgrelid = w.rel AND t.tgname = w.name AND NOT t.tgisinternal
LEFT JOIN pg_proc p ON p.oid = t.tgfoid
LEFT JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE t.tgname IS NULL OR position(t.tgenabled IN w.states) = 0
  OR (t.tgqual IS NOT NULL) <> (w.name IN ('audited_state', 'audited_envelope'))
  OR n.nspname || '.' || p.proname <> w.function
ORDER BY 1
"""

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
  SELECT c.oid AS rel, c.relname, c.relkind FROM pg_class c
  WHERE c.relnamespace = 'audit'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
)
SELECT 'trigger ' || t.tgname || ' of ' || o.rel::regclass::text || ' is none of ours'
FROM ours o JOIN pg_trigger t ON t.tgrelid = o.rel AND NOT t.tgisinternal
WHERE t.tgname NOT IN ('stamp', 'no_change', 'no_truncate', 'audited_erasure')
UNION ALL
SELECT 'rule ' || r.rulename || ' of ' || o.rel::regclass::text || ' is none of ours'
FROM ours o JOIN pg_rewrite r ON r.ev_class = o.rel
UNION ALL
SELECT o.rel::regclass::text || ' is no table' FROM ours o WHERE o.relkind NOT IN ('r', 'p')
UNION ALL
SELECT o.rel::regclass::text || ' hides rows' FROM ours o JOIN pg_class c ON c.oid = o.rel
WHERE c.relrowsecurity AND o.relname !~ '^event(_[0-9]{6}|_default)?$'
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
    guarded = [name if "." in name else f"public.{name}" for name in sorted(GUARDED_TABLES)]
    found = [
        *tx.execute(text(_TRIGGERS), {"guarded": guarded}).scalars(),
        *tx.execute(text(_GRANTS)).scalars(),
        *tx.execute(text(_READS)).scalars(),
        *tx.execute(text(_OTHERS)).scalars(),
        *_wrong_policies(tx),
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
