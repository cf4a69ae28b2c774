"""What arguments take. An option's help says it, so that an error can repeat it; `main.py` prints the error."""

from __future__ import annotations

import gc
import re
import signal
import sys
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeAlias

import typer

from replicator.contracts.errors import SettingsError
from replicator.contracts.events import Id
from replicator.contracts.fields import UUID, Type

if TYPE_CHECKING:
    from enrichment import Tables
    from replicator.app import App, Choice

PAGE_ROWS = 5_000  # 10 MB of memory and some 50 ms of PostgreSQL's time; larger pages gain nothing
MOST = 1_000_000  # rows a page: what memory may hold

_TIME = "in ISO 8601, such as 2026-01-08T09:00:00 (UTC), 2026-01-08T10:00:00+01:00 or 2026-01-08"
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def moment(text: str) -> datetime:
    """A time of `--start` and `--end`; without a zone it is UTC."""
    try:
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a time") from None


def duration(text: str) -> timedelta:
    """The span of `--last`."""
    found = re.fullmatch(r"([0-9]{1,6})([smhd])", text)
    span = timedelta(**{_UNITS[found[2]]: int(found[1])}) if found else timedelta()
    if not timedelta() < span < datetime.now(UTC) - datetime.min.replace(tzinfo=UTC):
        raise typer.BadParameter(f"{text!r} is not a span of time")
    return span


def count(given: str | int) -> int:
    """A number of rows, events or seconds. A default comes as it is."""
    return _whole(given, MOST)


def letter_id(given: str) -> int:
    """The number of a dead letter: the database never gives one again, so they grow."""
    return _whole(given, 2**63 - 1)


def event_id(given: str, wanted: Type) -> Id:
    """An event's id, of the kind that the stream's identity is. Raises SettingsError."""
    found: Id = given
    if wanted.python is int and re.fullmatch("-?[0-9]{1,19}", given):
        found = int(given)
    if wanted.postgres == UUID.postgres:
        found = _uuid(given)
    if not wanted.fits(found):
        raise SettingsError(name="ID", problem=f"{given!r} is not an event's id", expected=wanted.words)
    return found


def _uuid(given: str) -> str | None:
    """As PostgreSQL writes it; it takes capitals and braces, too."""
    try:
        return str(uuid.UUID(given))
    except ValueError:
        return None


def _whole(given: str | int, most: int) -> int:
    text = str(given)
    if not (re.fullmatch("[0-9]{1,19}", text) and 0 < int(text) <= most):
        raise typer.BadParameter(f"{text!r} is not a whole number from 1 to {most}")
    return int(text)


Start: TypeAlias = Annotated[
    datetime | None, typer.Option(parser=moment, metavar="TIME", help=f"the first moment of the range, {_TIME}")
]
End: TypeAlias = Annotated[
    datetime | None, typer.Option(parser=moment, metavar="TIME", help="the first moment after the range, likewise")
]
Last: TypeAlias = Annotated[
    timedelta | None,
    typer.Option(parser=duration, metavar="SPAN", help="the time until now, instead of both, such as 30m, 2h or 1d"),
]
BatchSize: TypeAlias = Annotated[int, typer.Option(parser=count, metavar="N", help="rows a page, 1 to 1000000")]
Rate: TypeAlias = Annotated[
    int | None, typer.Option(parser=count, metavar="N", help="events a second at most, 1 to 1000000")
]
Resume: TypeAlias = Annotated[bool, typer.Option("--resume", help="continue an interrupted run")]
GARBAGE_OBJECTS = 20_000
"""So many new lists and the like make Python look for cycles of garbage, at 700 it takes 3 % of the CPU a row
(`make bench ARGS="--only bulk --compare REF"`). We make next to none; 20,000 of them would be some 2 MB."""
USUAL_SINKS = ("clickhouse", "redis")  # the HTTP API belongs to others, who see a repeated event
Sinks: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="names of sinks, separated by commas; without it those of clickhouse and redis that REPLICATOR_SINKS has",
    ),
]
StreamName: TypeAlias = Annotated[
    str | None,
    typer.Option("--stream", metavar="NAME", help="the name of one stream; needed where REPLICATOR_STREAM has several"),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="one JSON object on standard output, for programs")]
Yes: TypeAlias = Annotated[bool, typer.Option("--yes", help="don't ask")]


class TimeRange(NamedTuple):
    """`start <= event_ts < end`, in UTC."""

    start: datetime
    end: datetime

    def __str__(self) -> str:
        return f"--start {iso(self.start)} --end {iso(self.end)}"


def time_range(start: datetime | None, end: datetime | None, last: timedelta | None) -> TimeRange:
    """What `--start`, `--end` and `--last` come to. Raises SettingsError."""
    if last is not None:
        if start or end:
            raise SettingsError(name="--last", problem="--start or --end is given too", expected="either, not both")
        end = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)  # the second that runs belongs to it
        return TimeRange(end - last, end)
    if start is None or end is None:
        name = "--end" if start else "--start"
        raise SettingsError(name=name, problem="it is missing", expected=f"a time {_TIME}; or use --last 2h")
    if start >= end:
        problem = f"{iso(start)} is not before --end {iso(end)}"
        raise SettingsError(name="--start", problem=problem, expected="an earlier time")
    return TimeRange(start, end)


def pace(batch_size: int, rate: int | None) -> str:
    """Both options as they can be typed again."""
    return f" --batch-size {batch_size}" * (batch_size != PAGE_ROWS) + (f" --rate {rate}" if rate else "")


def sinks_of(text: str | None, known: Iterable[str], stream: str | None = None) -> list[str]:
    """The names in an option, or the usual ones. Raises SettingsError for one that is not known.

    A sink of the chosen `stream` may be called `redis/orders`, too, as status and messages call it.
    """
    if text is None:
        return _usual_sinks(known)
    names = [name.strip().removesuffix(f"/{stream}") for name in text.split(",") if name.strip()]
    known = list(known)
    if not names or set(names) - set(known):
        expected = f"one or more of {', '.join(known)}, separated by commas"
        raise SettingsError(name="--sinks", problem=_not_of(text, set(names) - set(known)), expected=expected)
    return names


def _not_of(text: str, others: set[str]) -> str:
    """What is wrong with these names: there may be such sinks, but the command has no use for them."""
    from sinks import known_sinks

    if others and others <= known_sinks().keys():
        return f"what sink {min(others)} has can't be compared: nobody can ask it"
    return f"{text!r} is not the name of a sink"


def _usual_sinks(known: Iterable[str]) -> list[str]:
    """Never one that the replicator does not write to: its address may be the default, and somebody else's."""
    from replicator.contracts.settings import CoreSettings, load

    configured, known = load(CoreSettings).sinks, list(known)
    if not (names := [sink for sink in USUAL_SINKS if sink in configured]):
        problem = f"it is missing, and REPLICATOR_SINKS has neither {' nor '.join(USUAL_SINKS)}, its default"
        choice = [sink for sink in configured if sink in known] or known
        expected = f"one or more of {', '.join(choice)}, separated by commas"
        raise SettingsError(name="--sinks", problem=problem, expected=expected)
    return names


def one_sink(text: str, known: Iterable[str], name: str = "--sink") -> str:
    """The one name in an option. Raises SettingsError for several, none, and one that is not known."""
    if text not in (known := list(known)):
        expected = f"one of {', '.join(known)}"
        raise SettingsError(name=name, problem=f"{text!r} is not the name of a sink", expected=expected)
    return text


def iso(when: datetime) -> str:
    """As it can be typed."""
    return when.isoformat().replace("+00:00", "Z")


def confirmed(question: str, *, yes: bool) -> bool:
    """Ask on the terminal, unless `--yes` answers. Raises SettingsError where there is no terminal."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise SettingsError(
            name="standard input", problem="it is not a terminal", expected="a terminal to ask on, or --yes"
        )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the event loop's would wait for the answer first
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def load_one(stream: str | None, sinks: Sequence[str] | None = None) -> App:
    """The App for the stream of this name, or for the only one. Raises SettingsError."""

    def choose(streams: Sequence[Tables]) -> Sequence[Tables]:
        from enrichment import the_one

        return [the_one(streams, stream)]

    return load_app(sinks, choose)


def load_app(sinks: Sequence[str] | None = None, choose: Choice | None = None) -> App:
    """The App, with these sinks or the configured ones; imported here because that takes half a second."""
    gc.disable()  # modules are no garbage: without the search for it, importing takes a tenth less
    try:
        from replicator.app import App

        return App.load(sinks, choose)
    finally:
        gc.freeze()  # nor will they be
        gc.enable()
        gc.set_threshold(GARBAGE_OBJECTS)
