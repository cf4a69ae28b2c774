"""The stream that is configured, and its tables: which columns it needs, and what they are called there."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final

from annotated_types import MinLen
from psycopg import sql
from pydantic import AfterValidator, BeforeValidator, InstanceOf, ValidationInfo
from pydantic import Field as Setting

from replicator.contracts.errors import SettingsError, command, raised_at, unimported
from replicator.contracts.fields import TEXT, Field, Stream, StreamUnusable
from replicator.contracts.settings import LISTED, Settings, load, split, variable

ENGAGEMENT: Final = "enrichment.contract:EVENT"


def declaration(one: str | Stream) -> Stream:
    """It, or the one of that name: `module:NAME`, or `module`, whose STREAM it is. Raises ValueError.

    The module may be in the working directory.
    """
    return one if isinstance(one, Stream) else _named(one)


@cache
def _named(named: str) -> Stream:
    module, _, name = (part.strip() for part in named.partition(":"))
    if not module:
        raise ValueError(f"{named} names no module")
    known, name = vars(_imported(module)), name or "STREAM"
    if not isinstance(stream := known.get(name), Stream):
        streams = [other for other, value in known.items() if isinstance(value, Stream)]
        there = f"its streams are {', '.join(streams)}" if streams else "it has none"
        problem = f"{module} has no Stream that is called {name}; {there}"
        raise ValueError(problem)  # noqa: TRY004  pydantic takes it for its own
    return stream


def _here() -> str:
    with suppress(FileNotFoundError):
        return str(Path.cwd())
    return "the working directory, which was removed"


def _imported(module: str) -> ModuleType:
    here = _here()
    sys.path.append(here)
    try:
        with redirect_stdout(sys.stderr):  # what it prints is none of our output, which programs may read
            return importlib.import_module(module)
    except StreamUnusable as exc:
        raise ValueError(f"{exc}{raised_at(exc)}") from exc
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # a module runs, and may end with anything, `sys.exit()` included
        if isinstance(exc, ModuleNotFoundError) and f"{module}.".startswith(f"{exc.name}."):
            raise ValueError(f"there is no module {module} in {here}, nor an installed one") from exc
        raise ValueError(f"{module} can't be imported: {unimported(exc)}") from exc
    finally:
        sys.path.pop()


def _declared(named: tuple[str | Stream, ...]) -> tuple[str | Stream, ...]:
    streams = [declaration(one) for one in named]
    for what in ("name", "clickhouse_table", "redis_name"):
        names = [getattr(stream, what) or stream.name for stream in streams]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several streams have the {what} {', '.join(doubles)}")
    return named


def _renamed(value: object, info: ValidationInfo) -> object:
    """`device=dev, content.length_seconds=length`: table to column to its name there."""
    if not isinstance(value, str | dict):
        raise ValueError(f"it has a value of type {type(value).__name__}")  # noqa: TRY004  pydantic takes it for its own
    if not (isinstance(value, str) and value and "stream" in info.data):
        return value if isinstance(value, dict) else {}
    if len(info.data["stream"]) > 1:
        raise ValueError("it is for one stream only; several declare their columns: Field(name, type, column=…)")
    tables = Tables(declaration(info.data["stream"][0]))
    found: dict[str, dict[str, str]] = {}
    for pair in split(value):
        ours, _, theirs = pair.partition("=")
        table, _, column = ours.rpartition(".")
        table = table or tables.events
        if column not in tables.needed.get(table, {}):
            raise ValueError(f"events have no column {ours}; they are made of {', '.join(tables.columns())}")
        if found.setdefault(table, {}).setdefault(column, theirs) != theirs:
            raise ValueError(f"{ours} has two names, {found[table][column]} and {theirs}")
    for table, names in found.items():
        for theirs, count in Counter(names.get(column, column) for column in tables.needed[table]).items():
            if count > 1:
                raise ValueError(f"{theirs} of {table} would be {count} columns at once; a swap is two pairs: a=b,b=a")
    return found


class EnrichmentSettings(Settings):
    """Options of the enrichment."""

    stream: Annotated[tuple[str | InstanceOf[Stream], ...], LISTED, AfterValidator(_declared)] = Setting(
        (ENGAGEMENT,),
        min_length=1,
        description="module:NAME, a Stream that a Python module declares, or module, for its STREAM; several of "
        "them separated by commas",
    )
    content_cache_size: int = Setting(
        100_000,  # some 200 bytes each: 20 MB; a catalog that fits is never looked up again
        ge=1,
        le=100_000_000,
        description="how many contents of each dimension are kept in memory, 1 to 100000000; some 200 bytes each",
    )
    columns: Annotated[dict[str, dict[str, Annotated[str, MinLen(1)]]], BeforeValidator(_renamed)] = Setting(
        {}, description="names of renamed columns: device=dev, content.length_seconds=length, separated by commas"
    )


@dataclass(frozen=True)
class Join:
    """A dimension, as an event finds its row."""

    number: int
    """Among those of the stream."""
    schema: str
    table: str
    key: str
    on: Field
    """The event's field that has the key."""
    fields: tuple[Field, ...]
    """The event's fields that are columns of this table."""
    copy: str
    """What its copy is called; of a single dimension it has the slot's own name."""

    @property
    def name(self) -> str:
        """`schema.table`."""
        return f"{self.schema}.{self.table}"

    @cached_property
    def columns(self) -> dict[str, str]:
        """Those that are read, with their types."""
        return {self.key: self.on.type.postgres} | {field.joined: _source_type(field) for field in self.fields}

    @property
    def alias(self) -> str:
        """In SQL."""
        return f"c{self.number or ''}"

    @cached_property
    def integers(self) -> set[str]:
        """The columns that are integers."""
        found = {field.joined for field in self.fields if field.type.python is int}
        return found | {self.key} if self.on.type.python is int else found

    @cached_property
    def numbers(self) -> tuple[tuple[int, Field], ...]:
        """The fields whose column may have more digits than they have, and their places."""
        return tuple((place, field) for place, field in enumerate(self.fields) if field.type.python is Decimal)

    @cached_property
    def missing(self) -> tuple[None, ...]:
        """What an event takes over where there is no such row: a left join."""
        return (None,) * len(self.fields)


class Tables:
    """A stream's tables: the one of its events, and those that they are joined with."""

    def __init__(
        self, stream: Stream, renamed: Mapping[str, Mapping[str, str]] | None = None, *, of_several: bool = False
    ) -> None:
        """`renamed`: table to column to the name that it has there, where that is another one."""
        self.stream = stream
        self.of_several = of_several
        """Whether the slot has other streams, too."""
        self.renamed = renamed or {}
        self.schema, _, self.events = stream.table.partition(".")
        self.own = tuple(field for field in stream.fields if field.column)
        """The fields that are columns of the events' table."""
        self.identity, self.key, self.time = stream.identity, stream.key, stream.time
        self.joins = tuple(self._joins())
        self.needed: Mapping[str, Mapping[str, str]] = {
            **self._joined(),
            self.events: {field.column: _source_type(field) for field in self.own},
        }
        """Table to column to type."""

    def _joins(self) -> Iterator[Join]:
        stream = self.stream
        for number, dimension in enumerate(stream.dimensions):
            schema, _, table = dimension.table.partition(".")
            on = next(field for field in self.own if field.name == dimension.on)
            fields = tuple(field for field in stream.fields if stream.joins(field) == dimension)
            copy = f"{table}.{on.name}" if len(stream.dimensions) > 1 else ""
            yield Join(number, schema, table, dimension.key, on, fields, copy)

    def _joined(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for join in self.joins:
            found.setdefault(join.table, {}).update(join.columns)
        return found

    def joins_of(self, table: str | None) -> list[Join]:
        """Those with this table."""
        return [join for join in self.joins if join.table == table]

    def joined(self, events: str) -> str:
        """SQL that joins the rows of `events` with all of them."""
        return "".join(
            f" LEFT JOIN {self.rows_of(join.table)} AS {join.alias}"
            f" ON {join.alias}.{quoted(join.key)} = {events}.{quoted(join.on.column)}"
            for join in self.joins
            if join.fields
        )

    @property
    def identity_name(self) -> str:
        """What the identity's column is called in its table."""
        return self.named(self.events, self.identity.column)

    @property
    def among(self) -> str:
        """SQL that an identity is one of those in the parameter `ids`.

        A list of texts has no type: PostgreSQL takes it for the column's own, so that its index serves, and a char(9)
        is not compared with texts, from which the spaces at its end would have gone.
        """
        kind = self.identity.type.postgres
        return f"{quoted(self.identity.column)} = ANY(%(ids)s{'' if kind == TEXT.postgres else f'::{kind}[]'})"

    @property
    def stream_option(self) -> str:
        """What chooses the stream in a command, ` --stream orders`; empty where it is the only one."""
        return f" --stream {self.stream.name}" if self.of_several else ""

    @property
    def anew(self) -> str:
        """The command that counts the table's rows in Redis anew."""
        return command(f"rebuild-redis --from-empty{self.stream_option}")

    @property
    def take_out(self) -> str:
        """What becomes of rows that went without a delete, and how the sinks get rid of them."""
        compare = command(f"reconcile --start … --end … --repair --delete-extra{self.stream_option}")
        return (
            f"the sinks keep them. {compare} removes them from ClickHouse, {self.anew} from Redis. If the sinks should"
            " keep them, only drop this dead letter"
        )

    @property
    def are_engagement(self) -> bool:
        """Whether `sql/source_schema.sql` makes them."""
        return self.stream is declaration(ENGAGEMENT)

    def wanted(self, alias: str) -> str:
        """SQL for which rows the stream takes, in a query with parameters; empty: all."""
        if not (where := self.stream.where):
            return ""
        field = next(field for field in self.own if field.name == where.field)
        values = ", ".join(sql.Literal(unpadded(value)).as_string() for value in where.values).replace("%", "%%")
        column = f"{alias}.{quoted(field.column)}"
        if field.type.python is str:  # an enum takes no text that is none of its values
            column = f"rtrim({column}::text, ' ')"
        return f"{column} IN ({values})"

    def named_in_schema(self, table: str) -> str:
        """`schema.table`."""
        return next((join.name for join in self.joins_of(table)), self.stream.table)

    def named(self, table: str, column: str) -> str:
        """What a column is called in its table."""
        return self.renamed.get(table, {}).get(column, column)

    def columns(self) -> Iterator[str]:
        """As REPLICATOR_COLUMNS names them."""
        for table in reversed([*self.needed]):
            yield from (column if table == self.events else f"{table}.{column}" for column in self.needed[table])

    def rows_of(self, table: str, source: str = "") -> str:
        """SQL for a table, or for a part of it, with its columns under our names."""
        source = source or ".".join(map(quoted, self.named_in_schema(table).split(".")))
        if table not in self.renamed:
            return source
        listed = (f"{quoted(self.named(table, column))} AS {quoted(column)}" for column in self.needed[table])
        hidden = "xmin, tableoid, " if table == self.events else ""  # content may be a view, which has none
        return f"(SELECT {hidden}{', '.join(listed)} FROM {source})"  # noqa: S608  quoted names


def _source_type(field: Field) -> str:
    return field.type.declared or field.type.postgres


def unpadded(value: Any) -> Any:
    """Without spaces at the end: a char(9) has them in the slot, and they do not count."""
    return value.rstrip(" ") if isinstance(value, str) else value


def quoted(name: str) -> str:
    """As SQL takes any name, a keyword for instance; for a query that has parameters."""
    escaped = name.replace('"', '""').replace("%", "%%")
    return f'"{escaped}"'


def configured() -> Tables:
    """Those that the environment names, where there is one stream. Raises SettingsError."""
    return the_one(tables_of(load(EnrichmentSettings)))


def the_one(streams: Sequence[Tables], name: str | None = None) -> Tables:
    """Those of the stream of this name, or of the only one. Raises SettingsError."""
    known = {tables.stream.name: tables for tables in streams}
    if name is None and len(known) == 1:
        return streams[0]
    if name not in known:
        several = f"this command works on one stream, and {variable('stream')} has {len(known)}"
        problem = f"{name!r} is not the name of a stream" if name is not None else several
        raise SettingsError(name="--stream", problem=problem, expected=f"one of {', '.join(known)}")
    return known[name]


def tables_of(settings: EnrichmentSettings) -> list[Tables]:
    """Of each stream; the same objects for the same settings: code is compiled for them."""
    names = tuple((table, *pair) for table, pairs in settings.columns.items() for pair in pairs.items())
    return [_tables(stream, names, of_several=len(settings.stream) > 1) for stream in settings.stream]


@cache
def _tables(stream: str | Stream, names: tuple[tuple[str, str, str], ...], *, of_several: bool) -> Tables:
    renamed: dict[str, dict[str, str]] = {}
    for table, ours, theirs in names:
        renamed.setdefault(table, {})[ours] = theirs
    return Tables(declaration(stream), renamed, of_several=of_several)
