"""How the types of Postgres travel: as binary or as text, and as what where a type is missing.

The source describes its columns (`travels`), the destination decides what they are there
(`settled`). Binary is exact and fast, but holds numbers of types that mean something else on
another server; text is read by the other server's own rules. docs/postgres.md has the table.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import psycopg
from psycopg import sql

from connectors.postgres.link import Connection, PostgresConfig
from schemas.errors import ConfigError
from schemas.records import Batch, Column, LoadRequest
from schemas.streams import StreamSpec

#: Types below have the same number on every server; those above are numbered as they are made.
_FIRST_OWN = 10_000
#: The longest row that a server can send, and what asks for more (SQLSTATE 54000, or XX000).
MAX_ROW_BYTES = 1_073_741_823
#: From here on a server knows these; what an older one makes of their binary form is nonsense.
_HAS_INFINITE_INTERVALS = 170_000
_HAS_MULTIRANGES = 140_000

#: Built-in types whose binary form is not taken back as it was sent: xml loses its declaration,
#: and the empty values of the others are refused.
_INEXACT = frozenset({"xml", "tsquery", "oidvector", "int2vector"})

#: What of a type decides how it travels, for the types asked for and all that they are made of.
_TYPES = """
WITH RECURSIVE found (oid) AS (
  SELECT unnest(%s::oid[])
  UNION
  SELECT part.oid FROM found f JOIN pg_type t ON t.oid = f.oid
  CROSS JOIN LATERAL (
    SELECT t.typelem WHERE t.typtype = 'b' AND t.typlen = -1 AND t.typelem <> 0
    UNION ALL SELECT t.typbasetype WHERE t.typbasetype <> 0
    UNION ALL SELECT g.rngsubtype FROM pg_range g WHERE g.rngtypid = t.oid
    UNION ALL SELECT a.atttypid FROM pg_attribute a
      WHERE a.attrelid = t.typrelid AND t.typtype = 'c' AND a.attnum > 0 AND NOT a.attisdropped
  ) AS part (oid)
)
SELECT t.oid, t.typname::text, t.typtype::text, t.typcategory::text, t.typsend <> 0,
       CASE WHEN t.typtype = 'b' AND t.typlen = -1 THEN t.typelem ELSE 0 END,
       t.typbasetype, format_type(t.typbasetype, t.typtypmod),
       array(SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = t.typrelid
             AND t.typtype = 'c' AND a.attnum > 0 AND NOT a.attisdropped),
       coalesce((SELECT g.rngsubtype FROM pg_range g WHERE g.rngtypid = t.oid), 0),
       array(SELECT l.enumlabel::text FROM pg_enum l WHERE l.enumtypid = t.oid
             ORDER BY l.enumsortorder),
       coalesce((SELECT x.extname::text FROM pg_depend d JOIN pg_extension x ON x.oid = d.refobjid
         WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e'
           AND d.refclassid = 'pg_extension'::regclass), '')
FROM pg_type t WHERE t.oid IN (SELECT oid FROM found)
"""


@dataclass(frozen=True, slots=True)
class _Type:
    """A row of _TYPES."""

    oid: int
    name: str
    kind: str  # b(ase), c(omposite), d(omain), e(num), m(ultirange), r(ange)
    category: str
    has_binary: bool
    element: int  # of an array
    base: int  # of a domain
    base_name: str | None
    attributes: list[int]  # of a composite
    bound: int  # of a range
    labels: list[str]  # of an enum
    extension: str

    @property
    def parts(self) -> list[int]:
        return [oid for oid in (self.element, self.base, self.bound, *self.attributes) if oid]

    @property
    def own(self) -> bool:
        return self.oid >= _FIRST_OWN

    @property
    def names_objects(self) -> bool:
        """Say whether its values are names of this server's own tables, functions or roles."""
        return not self.own and (self.name.startswith("reg") or self.name == "aclitem")


@dataclass(frozen=True, slots=True)
class Travel:
    """How a column of one type goes to another server."""

    type: str  # what it should be there
    otherwise: str  # what it is where that type is missing; "" if it is nothing then
    extension: str  # whose type it is
    labels: tuple[str, ...]  # of an enum, also in an array or below a domain
    as_text: bool
    category: str  # of the type, below its domains
    base: str  # name of the type, below its domains
    oid: int  # its number here


def is_plain(oid: int, kind: str, name: str, *, has_binary: bool) -> bool:
    """Say whether a type is the same on every server: no further question is needed."""
    name = name.removeprefix("_")
    special = name.startswith("reg") or name == "aclitem" or name in _INEXACT
    return oid < _FIRST_OWN and kind in {"b", "r", "m"} and has_binary and not special


def travels(conn: Connection, types: Sequence[tuple[int, str]]) -> list[Travel]:
    """Say how types (their number and full name) of this server travel."""
    rows = conn.execute(_TYPES, ([oid for oid, _ in types],)).fetchall()
    known = {row[0]: _Type(*row) for row in rows}
    return [_travel(known, oid, name) for oid, name in types]


def _travel(known: dict[int, _Type], oid: int, name: str) -> Travel:
    otherwise = _otherwise(known, oid, name)
    if _any_part(known, oid, lambda t: t.names_objects):
        name = otherwise = "text[]" if known[oid].element else "text"
    base = known[oid]
    while base.base:
        base = known[base.base]
    enum = base
    while enum.base or enum.element:
        enum = known[enum.base or enum.element]
    return Travel(
        type=name,
        otherwise="" if otherwise == name else otherwise,
        extension=_extension(known, oid),
        labels=tuple(enum.labels),
        as_text=_as_text(known, oid),
        category=base.category,
        base=base.name,
        oid=base.oid,
    )


def _any_part(known: dict[int, _Type], oid: int, holds: Callable[[_Type], bool]) -> bool:
    return holds(known[oid]) or any(_any_part(known, part, holds) for part in known[oid].parts)


def _as_text(known: dict[int, _Type], oid: int) -> bool:
    """Say whether the binary form is missing, or holds numbers or names of this server's own."""
    type_ = known[oid]
    if not type_.has_binary or type_.names_objects or type_.kind == "c":
        return True
    if not type_.own and type_.name in _INEXACT:
        return True
    if type_.kind in {"r", "m"} and type_.own:
        return True
    if type_.element and known[type_.element].own:
        return True
    return any(_as_text(known, part) for part in type_.parts)


def _otherwise(known: dict[int, _Type], oid: int, name: str) -> str:
    """Name what every server has and what takes the same values, in the same form on the wire."""
    type_ = known[oid]
    if type_.kind == "d":
        return _otherwise(known, type_.base, type_.base_name or "")
    if type_.element and known[type_.element].own:
        element = _otherwise(known, type_.element, name.removesuffix("[]"))
        # An array of arrays is written otherwise than one of a domain that is an array.
        return "text[]" if element.endswith("[]") else f"{element}[]"
    return "text" if type_.own and type_.kind in {"c", "e", "r", "m"} else name


def _extension(known: dict[int, _Type], oid: int) -> str:
    """Name the extension without which neither the type nor its otherwise exists."""
    type_ = known[oid]
    below = type_.base or type_.element
    return type_.extension or (_extension(known, below) if below else "")


def notes(columns: Sequence[Column]) -> tuple[str, ...]:
    """Say which columns may not be there what they are here."""
    return tuple(
        f"column {c.name} is {c.type}, or {c.otherwise} where the destination has no such type"
        for c in columns
        if c.otherwise
    )


def is_too_large(error: psycopg.Error) -> bool:
    """Say whether a row was longer than a server can send; the text is looked at, never shown."""
    return re.search(_TOO_LARGE, str(error)) is not None


def too_large(conn: Connection, config: PostgresConfig, stream: StreamSpec) -> ConfigError:
    """Name the table and the column with the largest value, from its size as it is stored."""
    with suppress(psycopg.Error):  # naming the column is a favour: the reason is known
        conn.execute("ROLLBACK")
        names = [row[0] for row in conn.execute(_LONG, (stream.schema_name, stream.table_name))]
        sizes = sql.SQL(", ").join(
            sql.SQL("coalesce(max(pg_column_size({})), 0)").format(sql.Identifier(n)) for n in names
        )
        table = sql.Identifier(stream.schema_name, stream.table_name)
        conn.execute("SET statement_timeout = '60s'")
        row = conn.execute(sql.SQL("SELECT {} FROM {}").format(sizes, table)).fetchone()
        size, name = max(zip(row or (), names, strict=True))
        largest = f"its largest value is in column {name} ({size:,} bytes as stored)"
        return _too_large(config, stream, largest)
    return _too_large(config, stream, "its largest column is to blame")


def _too_large(config: PostgresConfig, stream: StreamSpec, largest: str) -> ConfigError:
    return ConfigError(
        f"{config.where}: a row of {stream.name} is longer than the {MAX_ROW_BYTES:,} bytes that "
        f"Postgres can send; {largest}; read the table through a view without that column or "
        "with a part of it",
        code="row_too_large",
    )


#: Columns of values that may be long.
_LONG = """
SELECT a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s::text AND c.relname = %s::text AND a.attnum > 0 AND NOT a.attisdropped
  AND a.attlen = -1
"""
_TOO_LARGE = "string buffer exceeds|Cannot enlarge string buffer|invalid memory alloc request size"


# ── at the destination ───────────────────────────────────────────────────────────────────────

#: The type of that name; else of the same extension, which may be in another schema here.
_HERE = """
SELECT to_regtype(%(type)s) IS NOT NULL,
       to_regtype(%(otherwise)s) IS NOT NULL,
       (SELECT format_type(t.oid, NULL) FROM pg_extension x
        JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = x.oid
          AND d.classid = 'pg_type'::regclass AND d.deptype = 'e'
        JOIN pg_type t ON t.oid = d.objid
        WHERE x.extname = %(extension)s AND t.typname = %(name)s),
       (SELECT format_type(a.atttypid, a.atttypmod) FROM pg_attribute a
        JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = %(schema)s AND c.relname = %(table)s AND a.attname = %(column)s
          AND a.attnum > 0)
"""


def settled(conn: Connection, config: PostgresConfig, request: LoadRequest, batch: Batch) -> Batch:
    """Return the batch with the types that its columns have here; ConfigError if there is none."""
    columns = tuple(
        replace(c, type=_here(conn, config, request, c)) if _asks(conn, c) else c
        for c in batch.shape.columns
    )
    if any(c.type in {"xml", "xml[]"} for c in columns):
        _check_xml(conn, config, request)
    return replace(batch, shape=replace(batch.shape, columns=columns))


def _asks(conn: Connection, column: Column) -> bool:
    """Say whether this server may lack the type: those that every version has need no question."""
    newer = conn.info.server_version < _HAS_MULTIRANGES and "multirange" in column.type
    return bool(column.otherwise or column.extension or "." in column.type or newer)


def _here(conn: Connection, config: PostgresConfig, request: LoadRequest, column: Column) -> str:
    bare, suffix = column.type, ""
    if bare.endswith("[]"):
        bare, suffix = bare.removesuffix("[]"), "[]"
    typmod = bare[bare.index("(") :] if bare.endswith(")") and "(" in bare else ""
    row = conn.execute(
        _HERE,
        {
            "type": column.type,
            "otherwise": column.otherwise or None,
            "extension": column.extension,
            "name": bare.removesuffix(typmod).rsplit(".", 1)[-1].strip('"'),
            "schema": request.target_schema,
            "table": request.stream.table_name,
            "column": column.name,
        },
    ).fetchone()
    exact, otherwise, moved, there = row or (False, False, None, None)
    names = [
        *([column.type] if exact else []),
        *([f"{moved}{typmod}{suffix}"] if moved else []),
        *([column.otherwise] if otherwise else []),
    ]
    if not names:
        raise ConfigError(_missing(config, request, column))
    # What the table has decides: a type that was made after its first load changes nothing.
    return there if there in names else names[0]


@contextmanager
def labels_named(
    conn: Connection, config: PostgresConfig, request: LoadRequest, columns: Sequence[Column]
) -> Iterator[None]:
    """Say which label of an enum is missing here, where a value was refused for that."""
    try:
        yield
    except psycopg.errors.InvalidTextRepresentation as error:
        for column in columns:
            enum, lacking = _lacking(conn, column) if column.labels else ("", [])
            if lacking:
                added = " ".join(
                    f"ALTER TYPE {enum} ADD VALUE {sql.Literal(label).as_string(conn)};"
                    for label in lacking
                )
                raise ConfigError(
                    f"{request.stream.name}: a value of column {column.name} has a label that "
                    f"{enum} of {config.where} lacks; run there: {added}",
                    code="data_refused",
                ) from error
        raise


def _lacking(conn: Connection, column: Column) -> tuple[str, list[str]]:
    """Return the enum below a column's type here, and the labels that only the source has."""
    rows = conn.execute(
        "SELECT format_type(l.enumtypid, NULL), l.enumlabel::text FROM pg_enum l JOIN pg_type t "
        "ON l.enumtypid IN (t.oid, t.typbasetype) WHERE t.oid = to_regtype(%s)",
        (column.type.removesuffix("[]"),),
    ).fetchall()
    here = {label for _, label in rows}
    enum = rows[0][0] if rows else ""
    return enum, [label for label in column.labels if here and label not in here]


def _missing(config: PostgresConfig, request: LoadRequest, column: Column) -> str:
    what = f"{request.stream.name}: column {column.name} is of type {column.type}"
    if column.extension:
        name = sql.Identifier(column.extension).as_string()
        name = column.extension if column.extension.isidentifier() else name
        return (
            f"{what}, of the extension {column.extension}, which {config.where} does not have; "
            f"run there: CREATE EXTENSION {name};"
        )
    return (
        f"{what}, which {config.where} does not have; create it there, or read the table through "
        "a view that casts the column to text"
    )


def _check_xml(conn: Connection, config: PostgresConfig, request: LoadRequest) -> None:
    try:
        with conn.transaction():
            conn.execute("SELECT '<a/>'::xml")
    except psycopg.errors.FeatureNotSupported:
        raise ConfigError(
            f"{request.stream.name}: {config.where} was built without libxml and takes no xml; "
            "use another server, or read the table through a view that casts the column to text"
        ) from None


def equal(conn: Connection, column: Column) -> sql.Composed:
    """Compare a key column of the target (t) with the staged one (s), as the target's key does."""
    staged: sql.Composable = sql.SQL("s.{}").format(sql.Identifier(column.name))
    if column.as_text:
        staged = sql.SQL("{}::{}").format(staged, sql.SQL(column.type))
    same = operator(conn, column.type, "=")
    return sql.SQL("t.{} {} {}").format(sql.Identifier(column.name), same, staged)


#: By its strategy in an index; a type of one's own has its operators in a schema of its own.
_STRATEGIES = {"<": 1, "<=": 2, "=": 3, ">=": 4, ">": 5}
_OPERATOR = """
WITH RECURSIVE below (oid, base) AS (
  SELECT t.oid, t.typbasetype FROM pg_type t WHERE t.oid = to_regtype(%s)
  UNION ALL SELECT t.oid, t.typbasetype FROM below b JOIN pg_type t ON t.oid = b.base
)
SELECT n.nspname, o.oprname FROM below
JOIN pg_opclass c ON c.opcintype = below.oid AND c.opcdefault
JOIN pg_am m ON m.oid = c.opcmethod AND m.amname = 'btree'
JOIN pg_amop a ON a.amopfamily = c.opcfamily AND a.amopstrategy = %s
  AND a.amoplefttype = c.opcintype AND a.amoprighttype = c.opcintype
JOIN pg_operator o ON o.oid = a.amopopr
JOIN pg_namespace n ON n.oid = o.oprnamespace
WHERE below.base = 0
"""


def operator(conn: Connection, type_: str, sign: str) -> sql.Composable:
    """Return what compares two values of a type as its own indexes do.

    An operator of an extension is not on our search path: citext would be compared as text.
    """
    plain = sql.SQL(sign)
    if "." not in type_:
        return plain
    row = conn.execute(_OPERATOR, (type_, _STRATEGIES[sign])).fetchone()
    if row is None:  # enums, arrays and the like: the server's own operator takes them
        return plain
    return sql.SQL("OPERATOR({}.{})").format(sql.Identifier(row[0]), sql.SQL(row[1]))


def images(columns: Sequence[Column], values: Sequence[sql.Composable]) -> sql.Composed:
    """List values so that rows can be told apart: those without a binary form as text."""
    return sql.SQL(", ").join(
        sql.SQL("{}::text").format(value) if column.as_text else value
        for column, value in zip(columns, values, strict=True)
    )


def check_intervals(
    conn: Connection, config: PostgresConfig, request: LoadRequest, columns: Sequence[Column]
) -> None:
    """Refuse infinite intervals where the server would take them for 178 million years."""
    names = [c for c in columns if c.type.startswith("interval")]
    if not names or conn.info.server_version >= _HAS_INFINITE_INTERVALS:
        return
    table = sql.Identifier(request.target_schema, request.stream.table_name)
    for column in names:
        infinite = sql.SQL(_INFINITE_IN if column.type.endswith("[]") else _INFINITE).format(
            sql.Identifier(column.name), sql.Literal([_LATEST, _EARLIEST])
        )
        row = conn.execute(
            sql.SQL("SELECT FROM {} WHERE _syncward_synced_at = now() AND {} LIMIT 1").format(
                table, infinite
            )
        ).fetchone()
        if row is not None:
            raise ConfigError(
                f"{request.stream.name}: column {column.name} holds an infinite interval, and "
                f"{config.where} is older than Postgres 17, which was the first to have them; "
                "upgrade it, or read the table through a view that casts the column to text"
            )


#: Every field at its limit: infinity for a server that knows it, 178,956,970 years for others.
_LATEST = bytes.fromhex("7f" + "ff" * 7 + "7fffffff" * 2)
_EARLIEST = bytes.fromhex("80" + "00" * 7 + "80000000" * 2)
_INFINITE = "interval_send({}) = ANY({}::bytea[])"
_INFINITE_IN = (
    "EXISTS (SELECT FROM unnest({}) AS u (one) WHERE interval_send(u.one) = ANY({}::bytea[]))"
)
