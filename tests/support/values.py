"""Random values of PostgreSQL's types, as the text that COPY takes; the seed is the caller's."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeAlias

Draw: TypeAlias = Callable[[random.Random], str]

LONG_CHARACTERS = 20_000
"""PostgreSQL keeps such a text apart."""
SELDOM = 0.002
EPOCH = datetime(1900, 1, 1, tzinfo=UTC)
DAYS = 146_096  # until the end of 2299


def integer(bits: int) -> Draw:
    """Signed."""
    return lambda chance: str(chance.choice([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, chance.getrandbits(bits - 1), 0]))


def exact(digits: int, fraction: int) -> Draw:
    """A numeric of any number of digits."""

    def draw(chance: random.Random) -> str:
        number = chance.randrange(10 ** chance.randint(1, digits)) * chance.choice((1, -1))
        text = f"{abs(number):0{fraction + 1}}"
        whole, rest = (text[:-fraction], text[-fraction:]) if fraction else (text, "")
        return f"{'-' if number < 0 else ''}{whole}.{rest}".removesuffix(".")

    return draw


def floating(size: str) -> Draw:
    """Any finite one, denormal ones too."""

    def draw(chance: random.Random) -> str:
        if chance.random() < 0.3:
            return repr(chance.choice((1.0, 0.1, 1e15, 123.456, 5e-324 if size == "d" else 1e-45)))
        number = math.nan
        while not math.isfinite(number):
            [number] = struct.unpack(size, chance.randbytes(struct.calcsize(size)))
        if size == "d" and chance.random() < 0.2:
            return repr(math.ldexp(number, -1022) or 0.0)  # denormal, mostly
        return repr(number)

    return draw


def text(chance: random.Random, most: int = 30) -> str:
    """Any character but NUL and surrogates; now and then a long one."""
    length = LONG_CHARACTERS if chance.random() < SELDOM and most >= 30 else chance.randint(0, most)
    return "".join(_character(chance) for _ in range(length))


def _character(chance: random.Random) -> str:
    kind = chance.randrange(4)
    if kind == 0:
        return chance.choice("\\\"'|~,{}[]:/\t\r\n\b\f\x01\x1f\x7f\u0085\u2028\ufeff\ufffe\uffff")
    if kind == 1:
        code = chance.randrange(1, 0x110000)
        return chr(code if not 0xD800 <= code < 0xE000 else 0x10FFFF)
    return chr(chance.randrange(32, 127 if kind == 2 else 0x800))


def moment(zone: str = "") -> Draw:
    """In the years that ClickHouse has."""

    def draw(chance: random.Random) -> str:
        at = EPOCH + timedelta(days=chance.randrange(DAYS), microseconds=chance.randrange(86_400_000_000))
        at = at.replace(microsecond=chance.choice((0, 500_000, at.microsecond)))
        return f"{at:%Y-%m-%d %H:%M:%S.%f}{zone}"

    return draw


def far_moment(chance: random.Random) -> str:
    """Also infinite ones, and before Christ."""
    far = ["infinity", "-infinity", "4713-01-01 00:00:00 BC", "294276-12-31 23:59:59.999999", "0001-01-01 00:00:00"]
    return chance.choice([*far, moment()(chance)])


def day(chance: random.Random) -> str:
    """A date that ClickHouse has."""
    return str(date(1900, 1, 1) + timedelta(days=chance.randrange(DAYS)))


def interval(chance: random.Random) -> str:
    """Of either sign, in each part."""
    months, days, us = (chance.randint(-1_000, 1_000) for _ in range(3))
    return f"{months} mons {days} days {us * 1_234_567} microseconds"


def document(chance: random.Random) -> str:
    """JSON with numbers of any length, and keys that come twice. No NUL: jsonb has none."""
    return _value(chance, 3)


def _value(chance: random.Random, depth: int) -> str:
    kind = chance.randrange(6 if depth else 4)
    if kind == 0:
        return chance.choice(("null", "true", "false", "1e30", "-0", "1.10", "12345678901234567890123.000"))
    if kind == 1:
        return exact(chance.randint(4, 60), 3)(chance)
    if kind in (2, 3):
        return json.dumps(text(chance, 10), ensure_ascii=chance.random() < 0.5)
    inside = [_value(chance, depth - 1) for _ in range(chance.randint(0, 3))]
    if kind == 4:
        return f"[{', '.join(inside)}]"
    keys = [json.dumps(chance.choice(("a", "b", "", text(chance, 3)))) for _ in inside]
    return "{" + ", ".join(f"{key}: {value}" for key, value in zip(keys, inside, strict=True)) + "}"


def octets(chance: random.Random) -> str:
    """Bytea."""
    length = LONG_CHARACTERS if chance.random() < SELDOM else chance.randint(0, 40)
    return f"\\x{chance.randbytes(length).hex()}"


def address(chance: random.Random) -> str:
    """Of either kind, perhaps with a mask."""
    found: Any = IPv4Address(chance.getrandbits(32)) if chance.random() < 0.5 else IPv6Address(chance.getrandbits(128))
    return f"{found}/{chance.randint(0, 32)}" if chance.random() < 0.5 else str(found)


def array(element: Draw) -> Draw:
    """Of texts in quotes, or NULL."""

    def draw(chance: random.Random) -> str:
        quoted = [element(chance).replace("\\", "\\\\").replace('"', '\\"') for _ in range(chance.randint(0, 4))]
        return "{" + ", ".join(chance.choice((f'"{one}"', f'"{one}"', "NULL")) for one in quoted) + "}"

    return draw


def between(draw: Draw, key: Callable[[str], Any]) -> Draw:
    """A range."""

    def drawn(chance: random.Random) -> str:
        low, high = sorted((draw(chance), draw(chance)), key=key)
        return chance.choice(("empty", f"[{low},{high}]", f"({low},{high})", f"[{low},)", f"(,{high}]", "(,)"))

    return drawn


def one_of(*values: str) -> Draw:
    """Any of them."""
    return lambda chance: chance.choice(values)


def bits(most: int) -> Draw:
    """Up to so many."""
    return lambda chance: "".join(chance.choices("01", k=chance.randint(0, most)))


def uuid(chance: random.Random) -> str:
    """Any."""
    return f"{chance.getrandbits(128):032x}"


DRAWS: Mapping[str, Draw] = {
    "smallint": integer(16),
    "integer": integer(32),
    "bigint": integer(64),
    "numeric(12,2)": exact(12, 2),
    "numeric(38,0)": exact(38, 0),
    "numeric(76,38)": exact(76, 38),
    "numeric(20,20)": exact(20, 20),
    "real": floating("f"),
    "double precision": floating("d"),
    "boolean": one_of("true", "false"),
    "text": text,
    "varchar(40)": lambda chance: text(chance, 20),
    "mood": one_of("sad", "so happy"),
    "uuid": uuid,
    "date": day,
    "timestamptz": moment("+00"),
    "timestamp": moment(),
    "timestamp(6)": far_moment,
    "time": lambda chance: chance.choice(("24:00:00", moment()(chance)[11:])),
    "timetz": lambda chance: f"{moment()(chance)[11:]}+{chance.randrange(14):02}:30",
    "interval": interval,
    "jsonb": document,
    "json": document,
    "bytea": octets,
    "integer[]": array(integer(32)),
    "text[]": array(lambda chance: text(chance, 6)),
    "bytea[]": array(lambda chance: f"\\x{chance.randbytes(3).hex()}"),
    "inet": address,
    "macaddr": lambda chance: chance.randbytes(6).hex(),
    "bit varying": bits(40),
    "bit(8)": lambda chance: f"{chance.getrandbits(8):08b}",
    "money": exact(16, 2),
    "tsvector": lambda chance: " ".join(f"'{number}':{number}A" for number in chance.choices(range(1, 99), k=3)),
    "xml": one_of("<a>1</a>", "<ü b='&amp;'/>", "text"),
    "point": lambda chance: f"({floating('d')(chance)},{floating('f')(chance)})",
    "int4range": between(integer(31), int),
    "numrange": between(exact(30, 5), float),
    "tstzrange": between(moment("+00"), str),
    "pg_lsn": lambda chance: f"{chance.getrandbits(32):X}/{chance.getrandbits(32):X}",
    "int4multirange": lambda chance: "{" + between(integer(31), int)(chance).replace("empty", "") + "}",
}
"""By the type's name in PostgreSQL."""
