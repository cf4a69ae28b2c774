"""The functions that are compiled from a declaration, as dataclasses compile theirs: the hot path, run for every event.

`codec.py` and `shortcut.py` use them. Each is Python source with the fields' names as its variables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from math import isfinite
from typing import Any

import msgspec

from enrichment.events.draft import DerivedUnusable
from enrichment.tables.declared import Join, Tables
from replicator.contracts.errors import SourceError
from replicator.contracts.events import Column, Event, RowChange
from replicator.contracts.fields import INT64_MAX, Derived, Field, Type

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_BEYOND_PYTHON = re.compile(r"-?infinity|\d{4,6}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{1,6})?\+00( BC)?", re.ASCII)
"""Timestamps that PostgreSQL holds and Python does not."""


def exactly(number: Decimal | int) -> msgspec.Raw:
    """As JSON, with the digits that it has; a Decimal's own text may have an exponent."""
    return msgspec.Raw((format(number, "f") if isinstance(number, Decimal) else str(number)).encode())


def rfc3339(text: str, zone: str) -> str:
    """A timestamp of PostgreSQL's, in UTC if it has a zone; what Python's calendar does not have stays as it is."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=None).isoformat(timespec="microseconds") + zone
    except ValueError:
        return text


def _in_json(value: Any, kind: Type) -> Any:
    """What a function gave, as JSON has it: as of a column, NaN is NULL. Raises what it likes for what JSON has not."""
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair
    elif kind.python is float and kind.fits(value) and value is not None and not isfinite(value):
        return None
    return value


def _each(form: str, fields: Iterable[Field], between: str = ", ") -> str:
    return between.join(form.format(field.name) for field in fields)


def _typed(field: Field) -> str:
    if field.type.fit:
        return f"_fits_{field.name}({field.name})"
    test = f"_type({field.name}) is _{field.type.python.__name__}"
    return f"({field.name} is None or {test})" if field.type.optional else test


def _bits(field: Field) -> str:
    return f"({field.name} or 0)" if field.type.optional else field.name


_NAMES: Mapping[str, object] = {
    "_type": type,
    "_int": int,
    "_str": str,
    "_bool": bool,
    "_float": float,
    "_exactly": exactly,
    "_rfc3339": rfc3339,
    "_datetime": datetime,
    "_UTC": UTC,
    "_EPOCH": EPOCH,
    "_fromisoformat": datetime.fromisoformat,
    "_beyond_python": _BEYOND_PYTHON.fullmatch,
    "_encode": msgspec.json.Encoder().encode,
}


def _made(source: str, name: str, names: Mapping[str, object], **words: object) -> Any:
    """The function of that name, compiled from source. A field's name is a variable there; all else begins with `_`."""
    namespace = {**_NAMES, **names}
    exec(source.format(**words), namespace)  # noqa: S102  our own source, with names from the declaration
    return namespace[name]


_READ = """
def _read(_self, _row):
    _columns = _row.columns
    {places} = _self.places
    try:
        {cells}
    except IndexError:
        return _self.read_again(_row)
    if {renamed}:
        return _self.read_again(_row)
    {values}
    # None negative and their bits together a signed 64-bit integer: so is each. Others are looked at one by one.
    if not ({typed} and 0 <= {bits} <= {most}):
        if _unquote(_columns):
            return _self.read(_row)
        _check(_columns)
    try:
        _moment = _fromisoformat({time})
        _in_utc = _moment.tzinfo is _UTC
    except ValueError:
        _moment, _in_utc = {time}, _beyond_python({time})
    if not _in_utc:
        raise _misfit()
    return _row.commit_lsn, _row.ordinal, {draft}
"""

FINISH = """
        {derived}
        if _type({time}) is _datetime:
            _since = {time} - _EPOCH
            _microseconds = _since.microseconds
            _ts_us = (_since.days * 86_400 + _since.seconds) * 1_000_000 + _microseconds
            if not _microseconds:  # as a datetime it would come without its six digits
                {time} = {time}.isoformat()[:19] + ".000000Z"
        else:
            _ts_us = None
        _event = _Event(_commit_lsn, _ordinal, {identity}, {key}, _ts_us, _encode(_Enriched({every})){label})
"""
"""From the values of a row and of its content, and a position, to the event."""

BUILD = f"""
def _build_events(_drafts, {{known}}_events):
    _append = _events.append
    for _commit_lsn, _ordinal, {{own}} in _drafts:
        {{content}}{FINISH}
        _append(_event)
"""
"""From drafts to events; see `Codec.build_events`."""

_SHOW = """
def _show(_value):
    return {shown}
"""


def _computed(name: str, derived: Derived) -> str:
    null = " or ".join(f"{argument} is None" for argument in derived.of)
    call = f"_compute_{name}({', '.join(derived.of)})"
    return f"{name} = None if {null} else {f'{derived.shortcut} else {call}' if derived.shortcut else call}"


def _taken_over(join: Join) -> str:
    """Source that sets the columns that are joined with a dimension."""
    found = f"_contents{join.number or ''}[{join.on.name}]"
    if join.on.type.optional:
        found = f"_missing{join.number or ''} if {join.on.name} is None else {found}"
    return f"[{_each('{0}', join.fields)}] = {found}"


class Compiler:
    """Compiles the functions of one declaration."""

    def __init__(self, tables: Tables) -> None:
        stream = tables.stream
        changes = stream.follows or tables.of_several
        self.event: type[Event] = RowChange if changes else Event
        """What its events are."""
        self.label = (stream.name,) if changes else ()
        """What they say beyond an `Event`."""
        self._tables = tables
        self._fits = {f"_fits_{field.name}": field.type.fits for field in stream.fields if field.type.fit}

    def reader(
        self,
        unquote: Callable[[Iterable[Column]], bool],
        check: Callable[[Iterable[Column]], None],
        misfit: Callable[[], Exception],
    ) -> Any:
        """From a `RowReader` and a row to its draft.

        A row that does not fit goes to `unquote`, which says whether it has mended it, and else to `check`, which
        raises; `misfit` makes the error of a time that is none.
        """
        own, time = self._tables.own, self._tables.time
        integers = [field for field in own if field.type.python is int]
        return _made(
            _READ,
            "_read",
            {"_unquote": unquote, "_check": check, "_misfit": misfit, **self._fits},
            places=_each("_at_{0}", own) + ",",
            cells=_each("_c_{0} = _columns[_at_{0}]", own, "; "),
            renamed=" or ".join(f"_c_{field.name}.name != {field.column!r}" for field in own),
            values=_each("{0} = _c_{0}.value", own, "; "),
            typed=" and ".join(map(_typed, own)),
            bits=" | ".join(map(_bits, integers)) or "0",
            most=INT64_MAX,
            time=time.name,
            draft=", ".join("_moment" if field is time else field.name for field in own),
        )

    def showing(self, field: Field) -> Any:
        """From a value of this field to what the event's JSON has."""
        return _made(_SHOW, "_show", {}, shown=field.type.shown.format("_value"))

    def finishing(self, source: str, name: str, names: Mapping[str, object] | None = None) -> Any:
        """The function of that name, compiled from source that has `FINISH` in it."""
        tables = self._tables
        fields = tables.stream.fields
        derived = [(field, field.derived) for field in fields if field.derived]
        return _made(
            source,
            name,
            {
                "_Enriched": msgspec.defstruct("Enriched", [(field.name, Any) for field in fields], gc=False),
                **{f"_compute_{field.name}": self._function(field, function) for field, function in derived},
                "_Event": self.event,
                **{f"_missing{join.number or ''}": join.missing for join in tables.joins},
                **self._fits,
                **(names or {}),
            },
            own=_each("{0}", tables.own),
            values=_each("{0} = _columns.{0}.value", tables.own, "; "),
            known="".join(f"_contents{join.number or ''}, " for join in tables.joins),
            content="; ".join(map(_taken_over, (join for join in tables.joins if join.fields))) or "pass",
            unfit="".join(f" or not {test}" for test in self._tests()),
            key=tables.key.name,
            identity=tables.identity.name,
            time=tables.time.name,
            derived="; ".join(_computed(field.name, function) for field, function in derived) or "pass",
            every=", ".join(map(self._shown, fields)),
            label="".join(f", {value!r}" for value in self.label),
        )

    def _function(self, field: Field, derived: Derived) -> Callable[..., object]:
        """The declaration's own function is trusted where it has a shortcut, which is ours."""
        if derived.shortcut:
            return derived.function
        types = {known.name: known.type.python for known in self._tables.stream.fields}
        exact = [types[name] in {Decimal, float} for name in derived.of]
        kinds = [types[name] for name in derived.of]

        def compute(*values: object) -> object:
            # A whole number of them comes as an integer.
            given = (
                kind(value) if is_exact else value for kind, is_exact, value in zip(kinds, exact, values, strict=True)
            )
            try:
                found = _in_json(derived.function(*given), field.type)
                fits = field.type.made(found)
            except KeyboardInterrupt as exc:  # perhaps somebody's Ctrl-C: then the row is no worse than others
                problem = f"the function of the field {field.name} was interrupted (KeyboardInterrupt)"
                raise SourceError(problem, "If nobody did that, correct the declaration") from exc
            except BaseException as exc:  # anything at all: `sys.exit()`, too, would end us without a word
                raise DerivedUnusable(f"{field.name} can't be derived: {type(exc).__name__}") from exc
            if not fits:
                raise DerivedUnusable(f"{field.name} is derived, and is not {field.type.words}")
            return found

        return compute

    def _tests(self) -> Iterator[str]:
        """What a row of the right types has to pass, in source."""
        yield from (_typed(field) for field in self._tables.own if field.type.fit)
        if where := self._tables.stream.where:
            yield f"({where.field} in {set(where.values)!r})"

    def _shown(self, field: Field) -> str:
        return field.name if field is self._tables.time else field.type.shown.format(field.name)
