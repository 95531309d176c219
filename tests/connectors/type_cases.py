"""Every type of Postgres with its hard values: the one table behind the tests of types."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Case:
    """Values are SQL literals or expressions; `{s}` is the schema of types of one's own."""

    name: str
    type: str
    values: tuple[str, ...]
    #: what the column is where the type is missing; "": the same
    otherwise: str = ""
    extension: str = ""
    since: int = 0  # the first major version that has the type or the values
    own: bool = False  # numbered by each server itself: its record image holds that number

    def inside(self, schema: str) -> "Case":
        """The same with types of one's own in a schema."""
        return replace(
            self,
            type=self.type.replace("{s}", schema),
            values=tuple(value.replace("{s}", schema) for value in self.values),
        )


def _case(name: str, *values: str, type_: str = "", **more) -> Case:
    return Case(name.replace(" ", "_"), type_ or name, values, **more)


BUILT_IN = [
    _case("boolean", "true", "false"),
    _case("smallint", "-32768", "32767"),
    _case("integer", "-2147483648", "2147483647"),
    _case("bigint", "-9223372036854775808", "9223372036854775807"),
    _case("real", "'NaN'", "'-Infinity'", "'-0'", "'1e-45'", "'3.4028235e38'", "0.1"),
    _case(
        "double precision",
        "'NaN'",
        "'Infinity'",
        "'-0'",
        "'5e-324'",
        "0.1",
        "'1.7976931348623157e308'",
    ),
    _case(
        "numeric",
        "'NaN'",
        "0",
        "1.0",
        "1.00",
        "-0.000000001",
        "repeat('9', 131072)::numeric",
        "('0.' || repeat('0', 16382) || '1')::numeric",
    ),
    _case("numeric_infinity", "'Infinity'", "'-Infinity'", type_="numeric", since=14),
    _case("numeric scaled", "1234567890.12", "'NaN'", "-0.10", type_="numeric(12,2)"),
    _case("numeric hundreds", "12300", "-99900", type_="numeric(3,-2)", since=15),
    _case("numeric_small_scale", "0.00012", type_="numeric(3,5)", since=15),
    _case("money", "'-92233720368547758.08'", "'92233720368547758.07'", "'-12.34'", "'0'"),
    _case(
        "text",
        "''",
        "'ä☃𝄞'",
        r"E'tab\tnew\nline\r\\ back'",
        "'\\N'",
        "'NULL'",
        "' x '",
        r"E'\u0001\u007f\ufeff'",
        "repeat('x', 100000)",
    ),
    _case("varchar", "''", "'ä☃'", "'1234567890'", type_="varchar(10)"),
    _case("varchar unlimited", "''", "'x  '", type_="varchar"),
    _case("char", "''", "'ä'", "'  x'", type_="char(5)"),
    _case("bpchar", "'x  '", "''", type_="bpchar"),
    _case("char_byte", "'c'", "''", r"'\377'", type_='"char"', since=16),
    _case("char_letter", "'c'", "''", type_='"char"'),
    _case("name", "repeat('é', 31)::name", "''"),
    _case("bytea", "''", r"'\x00ff5c'", "decode(repeat('00ff', 50000), 'hex')"),
    _case(
        "date", "'infinity'", "'-infinity'", "'0044-03-15 BC'", "'4713-01-01 BC'", "'5874897-12-31'"
    ),
    _case(
        "timestamp",
        "'infinity'",
        "'-infinity'",
        "'4713-01-01 00:00:00 BC'",
        "'294276-12-31 23:59:59.999999'",
        "'1999-12-31 23:59:59.999999'",
    ),
    _case(
        "timestamptz",
        "'infinity'",
        "'-infinity'",
        "'0001-01-01 00:00:00+00 BC'",
        "'2026-03-29 02:30:00 Europe/Berlin'",
        "'294276-12-31 23:59:59.999999+00'",
    ),
    _case("timestamp rounded", "'2026-01-02 03:04:05.678'", type_="timestamp(3)"),
    _case("timestamptz rounded", "'2026-01-02 03:04:05+02'", type_="timestamptz(0)"),
    _case("time", "'24:00'", "'00:00'", "'23:59:59.999999'"),
    _case("timetz", "'00:00+15:59:59'", "'24:00-15:59'", "'12:00+05:30'"),
    _case(
        "interval",
        "'1 year 2 mons -3 days 04:05:06.789'",
        "'-1 mon +1 day -00:00:00.000001'",
        "'-178000000 years'",
        "'178956970 years 7 mons 2147483647 days'",
        "'1 mon'",
        "'30 days'",
        "'0'",
    ),
    _case("interval_infinity", "'infinity'", "'-infinity'", type_="interval", since=17),
    _case("interval fields", "'3 days 04:05:06.789'", type_="interval day to second(3)"),
    _case("interval months", "'3 years 4 months'", type_="interval year to month"),
    _case(
        "uuid", "'00000000-0000-0000-0000-000000000000'", "'0190163d-8694-739b-aea5-966c26f8ad91'"
    ),
    _case(
        "json",
        """'{"b":1,  "a":2, "a":3}'""",
        """E'\\n[1.10,  null ]\\n'""",
        "'null'",
        """'"\\u00e4"'""",
        "'1e400'",
    ),
    _case(
        "jsonb",
        """'{"b":1,  "a":2, "a":3}'""",
        "'1.10'",
        "'null'",
        """'"\\u00e4"'""",
        "'[]'",
        "'{}'",
    ),
    _case("jsonpath", "'$.a[*] ? (@ > 1)'", "'strict $'"),
    _case("inet", "'192.168.0.1/24'", "'::ffff:1.2.3.4'", "'fe80::1/64'", "'10.0.0.1'"),
    _case("cidr", "'10.0.0.0/8'", "'2001:db8::/32'"),
    _case("macaddr", "'08:00:2b:01:02:03'"),
    _case("macaddr8", "'08:00:2b:01:02:03:04:05'"),
    _case("bit", "B'1010'", "B'0000'", type_="bit(4)"),
    _case("bit unlimited", "B'101'", "B'10101010101'", type_='"bit"'),
    _case("varbit", "B''", "B'101'", "B'000000000'"),
    _case("varbit limited", "B'11'", "B''", type_="bit varying(7)"),
    _case("int4range", "'[1,5)'", "'empty'", "'(,)'", "'[,5]'"),
    _case("int8range", "'[1,9223372036854775807)'"),
    _case("numrange", "'[1.0,1.00]'", "'(,NaN]'", "'empty'"),
    _case("tsrange", "'[-infinity,infinity]'", "'[2026-01-01,)'"),
    _case("tstzrange", "'[2026-01-01 00:00+02,infinity)'", "'empty'"),
    _case("daterange", "'[0044-03-15 BC,infinity)'"),
    _case("int4multirange", "'{}'", "'{[1,3),[5,9)}'", since=14),
    _case("nummultirange", "'{(,1.0],[1.50,2.00)}'", since=14),
    _case("tstzmultirange", "'{[2026-01-01,2026-02-01),[2027-01-01,)}'", since=14),
    _case("datemultirange", "'{(,0044-03-15 BC)}'", since=14),
    _case("point", "'(1,2)'", "'(NaN,-Infinity)'", "'(-0,0.1)'"),
    _case("lseg", "'[(0,0),(1,1)]'"),
    _case("line", "'{1,-1,0}'"),
    _case("box", "'((0,0),(1,1))'"),
    _case("path", "'[(0,0),(1,1)]'", "'((0,0),(1,1),(2,0))'"),
    _case("polygon", "'((0,0),(1,1),(2,0))'"),
    _case("circle", "'<(0,0),1.5>'"),
    _case("tsvector", "''", "'fat:1A,3B cat:2 ''it''''s'':16383'"),
    _case("tsquery", "''", "'fat:AB & (cat | !dog:*) <2> x'"),
    _case("pg_lsn", "'0/0'", "'FFFFFFFF/FFFFFFFF'"),
    _case("xid8", "'0'", "'18446744073709551615'", since=13),
    _case("xid", "'4294967295'"),
    _case("cid", "'7'"),
    _case("tid", "'(4294967294,65535)'"),
    _case("oid", "4294967295", "0"),
    _case("oidvector", "'1 2 3'", "''"),
    _case("int2vector", "'1 -2 3'"),
    _case("pg_snapshot", "'10:20:10,14,15'", since=13),
    _case("txid_snapshot", "'10:20:10'"),
    _case("refcursor", "'portal'"),
]

#: Names of a server's own objects: text on the other side, whatever that one has.
NAMES = [
    _case("regclass", "'pg_class'", "'{s}.point3'", "0", "999999999", otherwise="text"),
    _case("regtype", "'int4'", "'{s}.mood'", otherwise="text"),
    _case("regprocedure", "'abs(integer)'", otherwise="text"),
    _case("regrole", "'reader'", otherwise="text"),
    _case("regnamespace", "'pg_catalog'", otherwise="text"),
    _case("aclitem", "'reader=r/postgres'", otherwise="text", since=16),
    _case("domain of names", "'pg_class'", type_="{s}.class_name", otherwise="text"),
]

MAKE_OWN = """
CREATE SCHEMA {s};
CREATE TYPE {s}.mood AS ENUM ('sad', 'o''k', 'happy, "very"', '');
CREATE DOMAIN {s}.posint AS int CHECK (value > 0);
CREATE DOMAIN {s}.small_money AS numeric(6,2) DEFAULT 1;
CREATE DOMAIN {s}.smallest AS {s}.posint CHECK (value < 10);
CREATE DOMAIN {s}.ints AS int[] CHECK (cardinality(value) < 5);
CREATE DOMAIN {s}.feeling AS {s}.mood;
CREATE DOMAIN {s}.feelings AS {s}.mood[];
CREATE DOMAIN {s}.class_name AS regclass;
CREATE TYPE {s}."Odd "" Type" AS ENUM ('x', 'y');
CREATE TYPE {s}.point3 AS (
  x float8, "y y" text, z numeric(8,2)[], at timestamptz, b bytea, m {s}.mood
);
CREATE TYPE {s}.deep AS (p {s}.point3, l {s}.point3[], s interval, cash money);
CREATE TYPE {s}.floats AS RANGE (subtype = float8);
CREATE TYPE {s}.moods AS RANGE (subtype = {s}.mood);
CREATE DOMAIN {s}.span AS {s}.floats;
CREATE TABLE {s}.as_row (id int, gone int, label text);
ALTER TABLE {s}.as_row DROP COLUMN gone;
"""

_POINT = (
    """ROW('NaN', E'a,"b" \\\\ (c)', '[2:3]={1.10,NULL}', '2026-01-02 03:04+05', '\\x00ff',"""
    """ 'happy, "very"')::{s}.point3"""
)
OWN = [
    _case(
        "enum",
        "'sad'",
        "'o''k'",
        "'happy, \"very\"'",
        "''",
        type_="{s}.mood",
        otherwise="text",
        own=True,
    ),
    _case("odd enum", "'x'", "'y'", type_='{s}."Odd "" Type"', otherwise="text", own=True),
    _case("domain", "1", "7", type_="{s}.posint", otherwise="integer", own=True),
    _case("domain scaled", "1.10", type_="{s}.small_money", otherwise="numeric(6,2)", own=True),
    _case("domain of domain", "1", "9", type_="{s}.smallest", otherwise="integer", own=True),
    _case(
        "domain of array",
        "'{1,NULL}'",
        "'[5:6]={1,2}'",
        "'{}'",
        type_="{s}.ints",
        otherwise="integer[]",
        own=True,
    ),
    _case("domain of enum", "'sad'", type_="{s}.feeling", otherwise="text", own=True),
    _case("domain of enums", "'{sad,NULL}'", type_="{s}.feelings", otherwise="text[]", own=True),
    _case(
        "composite",
        _POINT,
        "'(,,,,,)'",
        "'(,\"\",,,,)'",
        type_="{s}.point3",
        otherwise="text",
        own=True,
    ),
    _case(
        "composite of composites",
        "ROW(" + _POINT + ", ARRAY[" + _POINT + ", NULL], '-1 mon +1 day', '-1.10')::{s}.deep",
        type_="{s}.deep",
        otherwise="text",
        own=True,
    ),
    _case("row", "ROW(1, 'x')::{s}.as_row", type_="{s}.as_row", otherwise="text", own=True),
    _case(
        "own range", "'[0.1,Infinity)'", "'empty'", type_="{s}.floats", otherwise="text", own=True
    ),
    _case(
        "own multirange",
        "'{[0.1,0.2),[1,2)}'",
        "'{}'",
        type_="{s}.floats_multirange",
        otherwise="text",
        own=True,
        since=14,
    ),
    _case(
        "range of enums",
        '\'[sad,"happy, \\"very\\""]\'',
        type_="{s}.moods",
        otherwise="text",
        own=True,
    ),
    _case("domain of range", "'[1,2)'", type_="{s}.span", otherwise="text", own=True),
]

#: `{s}` is the schema of the extension.
EXTENSIONS = [
    _case("hstore", '\'a=>1, b=>NULL, "c d"=>""\'', "''", type_="{s}.hstore", extension="hstore"),
    _case("citext", "'Ab'", "''", type_="{s}.citext", extension="citext"),
    _case("ltree", "'a.b_1.c'", "''", type_="{s}.ltree", extension="ltree"),
    _case("lquery", "'*.b{1,2}.!c'", type_="{s}.lquery", extension="ltree"),
    _case("vector", "'[1,0.1,-0]'", type_="{s}.vector(3)", extension="vector"),
    _case("halfvec", "'[1,2]'", type_="{s}.halfvec(2)", extension="vector"),
    _case("cube", "'(1,2),(3,4)'", type_="{s}.cube", extension="cube"),
    _case("seg", "'1.0 .. ~2.00'", type_="{s}.seg", extension="seg"),
    _case("isbn13", "'978-0-393-04002-9'", type_="{s}.isbn13", extension="isn"),
]

#: Only where the server was built with libxml.
XML = [
    _case(
        "xml",
        "'<a/>'",
        "'<?xml version=\"1.0\"?><a> </a>'",
        "'text & more'".replace("&", "&amp;"),
        '\'<?xml version="1.0" standalone="yes"?><a>ä</a>\'',
        "''",
        "'<!DOCTYPE a><a/>'",
    ),
]


def at_least(cases: list[Case], major: int) -> list[Case]:
    """The cases that a server of a major version has."""
    return [case for case in cases if case.since <= major]
