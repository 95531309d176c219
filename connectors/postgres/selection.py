"""Which columns and rows of a table are read, and which columns leave it as text to be masked.

What is left out is not in the SELECT, so it never leaves the source.
"""

from collections.abc import Sequence
from dataclasses import replace

import psycopg
from psycopg import sql

from connectors import selection
from connectors.postgres import column_types
from connectors.postgres.catalog import Relation
from connectors.postgres.link import Connection
from schemas import conditions
from schemas.conditions import All, Among, Compare, Condition, IsNull, Not
from schemas.errors import ConfigError
from schemas.records import Column
from schemas.streams import StreamSpec


def selected(conn: Connection, stream: StreamSpec, relation: Relation) -> Relation:
    """Return the table as the stream reads it; ConfigError lists what columns there are.

    Masked columns are of type text then, and read as such: their bytes do not depend on a session.
    """
    if selection.is_whole(stream):
        return relation
    known = {column.name: column for column in relation.shape.columns}
    names = selection.chosen(stream, relation.shape.columns)
    columns = tuple(
        _as_text(column) if column.name in stream.mask else column
        for column in relation.shape.columns
        if column.name in names
    )
    keys = selection.kept_keys(stream, names, relation.keys)
    shape = replace(
        relation.shape,
        columns=columns,
        key=keys[0] if keys else (),
        key_is_unique=bool(keys),
    )
    rows = _rows(conn, stream, known) if stream.where is not None else relation.rows
    return replace(relation, shape=shape, keys=keys, rows=rows)


def _as_text(column: Column) -> Column:
    return Column(column.name, "text", column.nullable, as_text=True)


def _rows(conn: Connection, stream: StreamSpec, known: dict[str, Column]) -> sql.Composable:
    """Write the stream's condition as SQL, once the server has read all of its literals."""
    parsed = conditions.parse(stream.where or "")
    tested = [test.column for test in conditions.tests(parsed)]
    selection.check_known(stream, tested, known)
    if not _is_read(conn, stream, parsed, known):
        for test in conditions.tests(parsed):
            if not _is_read(conn, stream, test, known):
                raise selection.incomparable(stream, test.column, known[test.column].type)
        raise ConfigError(f"{stream.name}: where: the source does not take it; read a view instead")
    return sql.SQL("({})").format(_sql(conn, parsed, known))


def _is_read(
    conn: Connection, stream: StreamSpec, condition: Condition, known: dict[str, Column]
) -> bool:
    """Have the server read a condition without reading a row."""
    table = sql.Identifier(stream.schema_name, stream.table_name)
    asked = sql.SQL("SELECT FROM {} WHERE {} LIMIT 0").format(table, _sql(conn, condition, known))
    try:
        conn.execute(asked)
    except (psycopg.DataError, psycopg.errors.UndefinedFunction, psycopg.errors.DatatypeMismatch):
        return False
    return True


def _sql(conn: Connection, condition: Condition, known: dict[str, Column]) -> sql.Composable:
    match condition:
        case Compare(column, operator, literal):
            return _compared(conn, known[column], operator, literal)
        case Among(column, literals):
            return _among(conn, known[column], literals)
        case IsNull(column):
            return sql.SQL("{} IS NULL").format(sql.Identifier(column))
        case Not(part):
            return sql.SQL("(NOT {})").format(_sql(conn, part, known))
        case All(parts):
            both = (_sql(conn, part, known) for part in parts)
            return sql.SQL("({})").format(sql.SQL(" AND ").join(both))
        case conditions.Any(parts):
            either = (_sql(conn, part, known) for part in parts)
            return sql.SQL("({})").format(sql.SQL(" OR ").join(either))


def _compared(conn: Connection, column: Column, sign: str, literal: str) -> sql.Composed:
    """Compare a column as its type does: a bare literal takes it, and nothing is cut or rounded."""
    if sign == "<>" and "." in column.type:
        return sql.SQL("(NOT {})").format(_compared(conn, column, "=", literal))
    return sql.SQL("{} {} {}").format(
        sql.Identifier(column.name),
        column_types.operator(conn, column.type, sign),
        sql.Literal(literal),
    )


def _among(conn: Connection, column: Column, literals: Sequence[str]) -> sql.Composed:
    if "." in column.type:
        equal = [_compared(conn, column, "=", literal) for literal in literals]
        return sql.SQL("({})").format(sql.SQL(" OR ").join(equal))
    listed = sql.SQL(", ").join(map(sql.Literal, literals))
    return sql.SQL("{} IN ({})").format(sql.Identifier(column.name), listed)
