"""In which order staged rows can be taken that wait for each other: start at `ordered`.

A row waits for the row that it refers to (a foreign key of the table to itself), or for the one
that still has the value it is to get (a unique value or an exclusion that moves). The catalog says
which columns that is, and joins find who waits for whom; so each row is tried once, behind those
it needs. Rows that wait for each other in a ring are one unit: they are taken together or not at
all.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from connectors.postgres.batch import Load, same, values
from connectors.postgres.link import named
from schemas.streams import Mode

#: The rows that are looked at, and who waits for whom: NULL for what is nowhere.
_LEFT = sql.Identifier("pg_temp", "syncward_left")
_WAITS = sql.Identifier("pg_temp", "syncward_waits")
#: The same rows in the order in which they can be taken; `unit` counts from 0 without a gap.
ORDERED = sql.Identifier("pg_temp", "syncward_ordered")
#: Rows behind so many others in one chain come in no order, behind all others.
_LEVELS_MAX = 5_000
#: Rows in rings that are told apart; more of them are tried one by one.
_RINGS_MAX = 10_000

_REFERENCE = """
SELECT
  ARRAY(SELECT a.attname::text FROM unnest(c.conkey) WITH ORDINALITY AS k (n, i)
    JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.n ORDER BY i),
  ARRAY(SELECT a.attname::text FROM unnest(c.confkey) WITH ORDINALITY AS k (n, i)
    JOIN pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = k.n ORDER BY i),
  ARRAY(SELECT ARRAY[s.nspname::text, o.oprname::text]
    FROM unnest(c.conpfeqop) WITH ORDINALITY AS k (n, i)
    JOIN pg_operator o ON o.oid = k.n JOIN pg_namespace s ON s.oid = o.oprnamespace ORDER BY i)
FROM pg_constraint c
WHERE c.contype = 'f' AND c.conname = %(constraint)s
  AND c.conrelid = to_regclass(format('%%I.%%I', %(schema)s::text, %(table)s::text))
  AND coalesce(pg_partition_root(c.confrelid), c.confrelid)
    = coalesce(pg_partition_root(%(target)s::regclass), %(target)s::regclass)
"""
_VALUE = """
SELECT
  ARRAY(SELECT a.attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k (n, i)
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.n
    WHERE k.i <= i.indnkeyatts ORDER BY k.i),
  '{}'::text[],
  ARRAY(SELECT ARRAY[s.nspname::text, o.oprname::text]
    FROM unnest(coalesce(x.conexclop, ARRAY(
      SELECT m.amopopr FROM unnest(i.indclass::oid[]) WITH ORDINALITY AS c (n, i)
      JOIN pg_opclass p ON p.oid = c.n
      JOIN pg_amop m ON m.amopfamily = p.opcfamily AND m.amopstrategy = 3
        AND m.amoplefttype = p.opcintype AND m.amoprighttype = p.opcintype ORDER BY c.i)
    )) WITH ORDINALITY AS k (n, i)
    JOIN pg_operator o ON o.oid = k.n JOIN pg_namespace s ON s.oid = o.oprnamespace ORDER BY k.i)
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
LEFT JOIN pg_constraint x ON x.conindid = i.indexrelid AND x.contype = 'x'
WHERE c.relname = %(constraint)s AND i.indexprs IS NULL AND i.indpred IS NULL
  AND i.indrelid = to_regclass(format('%%I.%%I', %(schema)s::text, %(table)s::text))
"""


@dataclass(frozen=True, slots=True)
class Rule:
    """A constraint of the target by which its rows may wait for each other."""

    columns: tuple[str, ...]
    refers: tuple[str, ...]  # () for a value that may be there once
    operators: tuple[tuple[str, str], ...]


def is_reference(error: psycopg.Error) -> bool:
    """Say whether a row refers to one that is not there."""
    return error.sqlstate == "23503"


def rule_of(load: Load, error: psycopg.Error) -> Rule | None:
    """Return the constraint that refused a row; None if no order helps, or none can be found."""
    found = named(error)
    if found is None or found.constraint_name is None or load.is_history:
        return None
    row = load.conn.execute(
        _REFERENCE if is_reference(error) else _VALUE,
        {
            "constraint": found.constraint_name,
            "schema": found.schema_name,
            "table": found.table_name,
            "target": load.table.as_string(load.conn),
        },
    ).fetchone()
    if row is None:
        return None
    columns, refers, operators = row
    rule = Rule(tuple(columns), tuple(refers), tuple((s, o) for s, o in operators))
    known = {column.name for column in load.columns}
    whole = len(rule.operators) == len(rule.columns) > 0
    return rule if whole and {*rule.columns, *rule.refers} <= known else None


def ordered(
    load: Load, rules: Iterable[Rule], places: sql.Composable, *, but_lost: bool = False
) -> int:
    """Put staged rows into an order in which they can be taken; return how many units they are.

    `places` selects them. With `but_lost` rows are left out that wait for what is nowhere: not in
    the table, and not among these rows.
    """
    conn = load.conn
    for table in (_LEFT, _WAITS, ORDERED):
        conn.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table))
    conn.execute(
        sql.SQL(
            "CREATE TEMP TABLE {} ON COMMIT DROP AS SELECT row_number() OVER (ORDER BY place) AS "
            "id, place, NULL::int AS level FROM ({}) AS p"
        ).format(_LEFT, places)
    )
    conn.execute(
        sql.SQL("CREATE TEMP TABLE {} (id bigint, needs bigint) ON COMMIT DROP").format(_WAITS)
    )
    conn.execute(sql.SQL("ANALYZE {}").format(_LEFT))
    for rule in set(rules):
        conn.execute(_edges(load, rule))
    conn.execute(
        sql.SQL("CREATE INDEX ON {0} (id); CREATE INDEX ON {0} (needs); ANALYZE {0}").format(_WAITS)
    )
    if but_lost:
        conn.execute(_FORGET_LOST)
    conn.execute(sql.SQL("DELETE FROM {} WHERE needs IS NULL").format(_WAITS))
    _number_levels(load)
    return _make_units(load)


def _edges(load: Load, rule: Rule) -> sql.Composed:
    """Find who waits for whom by one constraint."""
    rows = sql.SQL("SELECT o.id AS _syncward_n, {} FROM {} s JOIN {} o ON o.place = s.ctid").format(
        sql.SQL(", ").join(
            sql.SQL("{} AS {}").format(value, sql.Identifier(column.name))
            for column, value in zip(load.columns, values(load, "s."), strict=True)
        ),
        load.staging,
        _LEFT,
    )
    query = _by_reference if rule.refers else _by_value
    return sql.SQL("WITH r AS MATERIALIZED ({}) INSERT INTO {} {}").format(
        rows, _WAITS, query(load, rule)
    )


def _by_reference(load: Load, rule: Rule) -> sql.Composed:
    return sql.SQL(
        "SELECT s._syncward_n, p._syncward_n FROM r s LEFT JOIN r p ON {among} WHERE {given} "
        "AND NOT EXISTS (SELECT FROM {table} t WHERE {there}) "
        "AND s._syncward_n IS DISTINCT FROM p._syncward_n"
    ).format(
        table=load.table,
        among=_equal("p", rule.refers, rule),
        there=_equal("t", rule.refers, rule),
        given=sql.SQL(" AND ").join(
            sql.SQL("s.{} IS NOT NULL").format(sql.Identifier(name)) for name in rule.columns
        ),
    )


def _by_value(load: Load, rule: Rule) -> sql.Composed:
    """Of rows that are only added to a table, what is there never moves."""
    key = [column.name for column in load.key]
    held = _equal("t", rule.columns, rule)
    if not key or load.request.stream.mode is Mode.APPEND:
        return sql.SQL("SELECT s._syncward_n, NULL::bigint FROM r s JOIN {} t ON {}").format(
            load.table, held
        )
    return sql.SQL(
        "SELECT s._syncward_n, b._syncward_n FROM r s JOIN {} t ON {} AND NOT ({same}) "
        "LEFT JOIN LATERAL (SELECT s._syncward_n FROM r s WHERE {same}) b ON true"
    ).format(load.table, held, same=same(load, key))


def _equal(alias: str, theirs: Sequence[str], rule: Rule) -> sql.Composed:
    return sql.SQL(" AND ").join(
        sql.SQL("{}.{} OPERATOR({}.{}) s.{}").format(
            sql.SQL(alias),
            sql.Identifier(there),
            sql.Identifier(schema),
            sql.SQL(operator),
            sql.Identifier(here),
        )
        for there, here, (schema, operator) in zip(
            theirs, rule.columns, rule.operators, strict=True
        )
    )


_FORGET_LOST = sql.SQL("""
WITH RECURSIVE lost (id) AS (
  SELECT id FROM {waits} WHERE needs IS NULL
  UNION SELECT w.id FROM {waits} w JOIN lost ON w.needs = lost.id)
DELETE FROM {left} l USING lost WHERE l.id = lost.id
""").format(waits=_WAITS, left=_LEFT)
_FIRST_LEVEL = sql.SQL("""
UPDATE {left} l SET level = 0 WHERE NOT EXISTS (SELECT FROM {waits} w WHERE w.id = l.id)
""").format(waits=_WAITS, left=_LEFT)
#: Rows that wait for one of the level before, and for none that has no level yet.
_NEXT_LEVEL = sql.SQL("""
UPDATE {left} l SET level = %(level)s + 1
FROM (SELECT DISTINCT w.id FROM {left} d JOIN {waits} w ON w.needs = d.id
      WHERE d.level = %(level)s) n
WHERE l.id = n.id AND l.level IS NULL AND NOT EXISTS (
  SELECT FROM {waits} w JOIN {left} p ON p.id = w.needs WHERE w.id = l.id AND p.level IS NULL)
""").format(waits=_WAITS, left=_LEFT)


def _number_levels(load: Load) -> None:
    conn = load.conn
    conn.execute(
        sql.SQL("CREATE UNIQUE INDEX ON {0} (id); CREATE INDEX ON {0} (level)").format(_LEFT)
    )
    moved, level = conn.execute(_FIRST_LEVEL).rowcount, 0
    conn.execute(sql.SQL("ANALYZE {}").format(_LEFT))
    while moved and level < _LEVELS_MAX:
        moved = conn.execute(_NEXT_LEVEL, {"level": level}).rowcount
        level += 1


def _make_units(load: Load) -> int:
    conn = load.conn
    conn.execute(
        sql.SQL(
            "CREATE TEMP TABLE {} ON COMMIT DROP AS SELECT place, id, (row_number() OVER (ORDER BY "
            "level, id) - 1)::bigint AS unit FROM {} WHERE level IS NOT NULL"
        ).format(ORDERED, _LEFT)
    )
    rings = list(_rings(load))
    conn.execute(
        sql.SQL(
            "INSERT INTO {ordered} SELECT l.place, l.id, c.n + dense_rank() OVER (ORDER BY "
            "coalesce(r.ring, l.id)) - 1 FROM {left} l LEFT JOIN unnest(%s::bigint[], %s::bigint[])"
            " AS r (id, ring) ON r.id = l.id, (SELECT count(*) AS n FROM {ordered}) c "
            "WHERE l.level IS NULL"
        ).format(ordered=ORDERED, left=_LEFT),
        ([id_ for id_, _ in rings], [ring for _, ring in rings]),
    )
    conn.execute(sql.SQL("CREATE INDEX ON {0} (unit); ANALYZE {0}").format(ORDERED))
    row = conn.execute(
        sql.SQL("SELECT coalesce(max(unit) + 1, 0) FROM {}").format(ORDERED)
    ).fetchone()
    return int(row[0]) if row else 0


def _rings(load: Load) -> Iterator[tuple[int, int]]:
    """Yield the rows without a level, each with the least of those that it is tied to."""
    ties = load.conn.execute(
        sql.SQL(
            "SELECT w.id, w.needs FROM {waits} w JOIN {left} l ON l.id = w.id JOIN {left} n "
            "ON n.id = w.needs WHERE l.level IS NULL AND n.level IS NULL LIMIT {most}"
        ).format(waits=_WAITS, left=_LEFT, most=sql.Literal(_RINGS_MAX + 1))
    ).fetchall()
    if len(ties) > _RINGS_MAX:
        return
    above: dict[int, int] = {}

    def top(one: int) -> int:
        while above.setdefault(one, one) != one:
            above[one] = one = above[above[one]]
        return one

    for one, other in ties:
        low, high = sorted((top(one), top(other)))
        above[high] = low
    for one in list(above):
        yield one, top(one)
