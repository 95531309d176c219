"""Mode history: a table of every version that runs saw of each row. Start at `follow`.

A version is valid from the load that brought it until the load that found it changed or gone, by
this server's clock. Current ones have no end. Two unique indexes hold that a key has one current
version and one beginning at a time; a check holds that no version ends before it begins.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from psycopg import sql

from connectors.postgres.batch import VALID_FROM, VALID_TO, Load, parts, typed
from connectors.postgres.catalog import Relation
from connectors.postgres.link import beside_values
from schemas.errors import ConfigError

_FROM, _TO = sql.Identifier(VALID_FROM), sql.Identifier(VALID_TO)

#: Since this version MERGE returns the rows it took.
_MERGE_RETURNS = 170_000

#: Whether current versions are unique by these columns, or by some of them.
_ONE_CURRENT = """
EXISTS (SELECT FROM pg_index i WHERE i.indrelid = %(table)s AND i.indisunique AND i.indisvalid
  AND i.indexprs IS NULL AND pg_get_expr(i.indpred, i.indrelid) = '(_syncward_valid_to IS NULL)'
  AND ARRAY(SELECT a.attname::text FROM pg_attribute a
    WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)) <@ %(key)s)
"""
#: Behind what this stream has written before, also where the clock was set back since.
_SINCE = """
SELECT {one_current}, greatest(now(), (SELECT s.updated_at + interval '1 microsecond'
  FROM _syncward.state s WHERE s.connection_id = %(connection)s AND s.stream = %(stream)s), {last})
"""
#: Where nothing is remembered of the stream, the table says it.
_LAST = "(SELECT greatest(max({}), max({})) + interval '1 microsecond' FROM {})"


# ── the table ────────────────────────────────────────────────────────────────────────────────


def keys(load: Load) -> sql.Composed:
    """Make a history of a table just filled: each row is the current version, from now on.

    The default is this transaction's time for all of them, and nothing is rewritten for it. It
    stays, for rows that are copied into an empty table.
    """
    return sql.SQL(
        "ALTER TABLE {table} ADD COLUMN {since} timestamptz NOT NULL DEFAULT now(), "
        "ADD COLUMN {to} timestamptz, ADD CHECK ({since} < {to}); "
        "ALTER TABLE {table} ADD PRIMARY KEY ({key}, {since}); "
        "CREATE UNIQUE INDEX ON {table} ({key}) WHERE {to} IS NULL; "
        "ANALYZE {table} ({to})"
    ).format(table=load.table, key=_names(load.request.stream.key), since=_FROM, to=_TO)


def check_kept(load: Load, own: AbstractSet[str]) -> None:
    """Refuse a history in another mode, and another mode's table for a history.

    Whoever reads a table counts on one row for each key, or on all its versions.
    """
    there, wanted = VALID_FROM in own and VALID_TO in own, load.is_history
    if there == wanted:
        return
    holds = "all versions of its rows" if there else "one row for each key"
    raise ConfigError(
        f"{load.name}: holds {holds}, and the stream says mode: {load.request.stream.mode}; choose "
        "another target schema, or move the table: everything is read into a new one"
    )


def begun(load: Load, target: Relation) -> Load:
    """Return the load with the time at which its versions begin; ConfigError if keys are missing.

    It is behind that of every load of this stream before, even if this server's clock is not.
    """
    key = load.request.stream.key
    last: sql.Composable = sql.SQL("NULL")
    if load.seen_shape is None:
        last = sql.SQL(_LAST).format(_FROM, _TO, beside_values(load.conn, load.table))
    row = load.conn.execute(
        sql.SQL(_SINCE).format(one_current=sql.SQL(_ONE_CURRENT), last=last),
        {
            "table": target.oid,
            "key": list(key),
            "connection": load.request.connection_id,
            "stream": load.request.stream.name,
        },
    ).fetchone()
    one_current, since = row or (False, None)
    if not one_current or not target.is_key((*key, VALID_FROM)):
        raise ConfigError(
            f"{load.name}: is no history by key ({', '.join(key)}); it needs a unique index on "
            f"it WHERE {VALID_TO} IS NULL and a unique key of it and {VALID_FROM}; make them, or "
            "move the table: everything is read into a new one"
        )
    return replace(load, since=since)


# ── a load ───────────────────────────────────────────────────────────────────────────────────


def follow(
    load: Load, key: Sequence[str], staged: sql.Composable, *, meddled: bool
) -> tuple[int, int]:
    """End versions that differ, begin those that are missing; return keys added, and changed.

    Rows that are equal are not touched. Where something of the table's own may swallow rows
    (`meddled`), both are statements that it sees.
    """
    careful = meddled or load.refusals is not None  # whose rows are no table, and have no type
    at_once = not careful and load.conn.info.server_version >= _MERGE_RETURNS
    return (_follow_at_once if at_once else _follow_in_two)(load, key, staged)


def _follow_at_once(load: Load, key: Sequence[str], staged: sql.Composable) -> tuple[int, int]:
    """End and add with one join: what ends a version comes back to begin one.

    As `s.*`: a column of the table may itself be named s.
    """
    row = load.conn.execute(
        sql.SQL(
            "WITH followed AS (MERGE INTO {table} t USING {staging} s ON {same} "
            "WHEN MATCHED AND {differs} THEN UPDATE SET ({to}, {synced}) = ROW({since}, now()) "
            "WHEN NOT MATCHED THEN INSERT ({columns}, {from}) VALUES ({typed}, {since}) "
            "RETURNING CASE WHEN merge_action() = 'UPDATE' THEN s.* END AS row), "
            "added AS (INSERT INTO {table} ({columns}, {from}) SELECT {again}, {since} "
            "FROM followed f WHERE f.row IS DISTINCT FROM NULL) "
            "SELECT count(*) FILTER (WHERE f.row IS NULL), "
            "count(*) FILTER (WHERE f.row IS DISTINCT FROM NULL) FROM followed f"
        ).format(**_parts(load, key, staged), again=typed(load, "(f.row)."))
    ).fetchone()
    return row or (0, 0)


def _follow_in_two(load: Load, key: Sequence[str], staged: sql.Composable) -> tuple[int, int]:
    """End what differs, then add what has no current version."""
    updated = load.conn.execute(
        sql.SQL(
            "UPDATE {table} t SET ({to}, {synced}) = ROW({since}, now()) FROM {staging} s "
            "WHERE {same} AND {differs}"
        ).format(**_parts(load, key, staged))
    ).rowcount
    added = load.conn.execute(
        sql.SQL(
            "INSERT INTO {table} ({columns}, {from}) SELECT {typed}, {since} FROM {staging} s "
            "WHERE NOT EXISTS (SELECT FROM {table} t WHERE {same})"
        ).format(**_parts(load, key, staged))
    ).rowcount
    return added - updated, updated


def _parts(load: Load, key: Sequence[str], staged: sql.Composable) -> dict[str, sql.Composable]:
    return {**parts(load, key, staged), "from": _FROM, "to": _TO, "since": load.moment}


def _names(key: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, key))
