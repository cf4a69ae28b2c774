"""What `top` draws: one line that says how it is, then the way of the data, a row a sink, 80 columns wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from replicator.contracts.errors import command
from replicator.operations.logs import printable
from replicator.operations.status.collect import History, Hour
from replicator.operations.status.form import Status
from replicator.operations.status.text import durable, lag, size, span

WIDTH = 80
POINTS = 18
"""Of the line, 10 s each: the last three minutes."""
BARS = "▁▂▃▄▅▆▇█"

T = TypeVar("T")


def picture(status: Status, history: History, *, silent: str = "") -> RenderableType:
    """As it is now; `silent` says that nothing newer is known, and why."""
    lines = [Text(printable(silent), "bold yellow")] if silent else []
    return Group(*lines, *_state(status), Text(), _sinks(status, history), Text(), *_below(status))


def _state(status: Status) -> Iterator[Text]:
    name = f"{printable(status.slot.name)}  "
    if status.reasons:
        yield Text.assemble(name, ("NOT READY", "bold red"))
        for reason in status.reasons:
            yield Text(f"  {printable(reason)}", "red")
    elif status.standby:
        yield Text.assemble(name, ("standby", "bold cyan"), f": {printable(status.standby)}")
    else:
        yield Text.assemble(name, ("ready", "bold green"))


def _sinks(status: Status, history: History) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), width=WIDTH, header_style="dim")
    table.add_column("sink", overflow="ellipsis", no_wrap=True, min_width=10)
    for heading in ("events/s", "lag", "behind", "waiting", "dead"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("3 minutes", width=POINTS, no_wrap=True)
    for name, sink in status.sinks.items():
        color = "red" if sink.trouble else "cyan" if sink.paused else ""
        letters = status.dead_letters.sinks.get(name, 0) if status.dead_letters else None
        hour = history.sinks.get(name, Hour())
        rate, waiting = _known(hour.events_per_second_now, "{:,.0f}".format), _known(sink.waiting, "{:,}".format)
        row = [name, rate, _known(sink.lag_seconds, lag), _known(sink.lag_bytes, size), waiting]
        shown = (Text(printable(cell), color) for cell in row)
        table.add_row(*shown, _known(letters, "{:,}".format), line(hour.events_per_second))
    return table


def _known(value: T | None, show: Callable[[T], str]) -> str:
    return "-" if value is None else show(value)


def line(values: Sequence[float | None]) -> str:
    """The newest of them as bars, the largest as a full one; a blank where nothing is known."""
    shown = [*values][-POINTS:]
    most = max((value for value in shown if value), default=0.0)
    bars = (" " if value is None else BARS[round(value / most * (len(BARS) - 1)) if most else 0] for value in shown)
    return "".join(bars).rjust(POINTS)


def _below(status: Status) -> Iterator[Text]:
    for name, sink in status.sinks.items():
        if sink.paused:
            yield Text(printable(sink.paused), "cyan")
        if sink.trouble and sink.trouble not in status.reasons:
            lasting = f" ({span(sink.trouble_seconds)})" if sink.trouble_seconds else ""
            yield Text(f"{name}{lasting}: {printable(sink.trouble)}", "yellow")
    yield from (Text(printable(fact, keep="\n")) for fact in durable(status))
    letters = status.dead_letters
    if letters and (letters.rows or letters.sinks):
        count = letters.rows + sum(letters.sinks.values())
        yield Text(f"dead letters {count:,}: {command('dead-letters list --summary')} says why")
