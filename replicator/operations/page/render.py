"""HTML of the status, by `assets/page.html`. Whatever comes from outside is escaped there, by the template engine.

`view.py` and `charts.py` say what is shown, `live.py` when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup, escape

from replicator import __version__
from replicator.contracts.errors import PROGRAM
from replicator.operations.logs import printable
from replicator.operations.page.beside import Beside
from replicator.operations.page.charts import LEAST_LAG_SECONDS, LEAST_RATE, Chart, chart
from replicator.operations.page.history import History
from replicator.operations.page.view import headline, note, sink_state
from replicator.operations.status import text
from replicator.operations.status.form import Status
from replicator.operations.watchdog import Watchdog

if TYPE_CHECKING:
    from jinja2 import Environment, Template

ASSETS = files(__package__) / "assets"
LOW_RATE = 10.0
"""Shown with a decimal below."""
CODE = Markup("<code>{}</code>")


class Rendered(NamedTuple):
    """The page of one moment, in the parts that updates replace."""

    state: str
    title: str
    parts: dict[str, str]


def _words(text: str) -> Markup:
    """Text as it may be shown, its `commands` marked as such."""
    words = printable(text).split("`")
    if len(words) % 2 == 0:  # one of the backticks stands alone
        return escape(printable(text))
    return Markup("").join(CODE.format(part) if number % 2 else escape(part) for number, part in enumerate(words))


def _known(shown: Callable[[float], str]) -> Callable[[float | None], str]:
    """The same of a number that may be unknown."""
    return lambda number: "unknown" if number is None else shown(number)


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))


def _rate(rate: float) -> str:
    return f"{rate:,.{int(0 < rate < LOW_RATE)}f}/s"


def environment() -> Environment:
    """The template engine: it escapes everything, and knows our words."""
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415  50 ms of CPU, which a start need not take

    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    made.filters |= {"words": _words, "plain": printable, "moment": _moment, "duration": text.span}
    made.filters |= {"size": _known(lambda count: text.size(round(count))), "seconds": _known(text.lag)}
    made.filters |= {"count": _known("{:,}".format), "rate": _known(_rate), "carrier": text.carrier_text}
    macros = made.from_string((ASSETS / "macros.html").read_text(encoding="utf-8")).module
    made.globals |= {
        name: getattr(macros, name) for name in ("messages", "bar", "hour", "follow")
    }  # also for a part alone
    return made


class Renderer:
    """Makes the page of what the process knows."""

    def __init__(
        self,
        watchdog: Watchdog,
        history: History,
        beside: Beside,
        settings: Sequence[Mapping[str, Any]],
        streams: Sequence[str],
    ) -> None:
        """`settings` as `config show --json` has them, without secrets; `streams` are those of the slot."""
        self._watchdog = watchdog
        self._history = history
        self._beside = beside
        self._settings = settings
        self._streams = streams
        self._began = time.monotonic()
        self._charts: dict[str, tuple[Chart, Chart]] = {}
        self._charted = 0

    @cached_property
    def _page(self) -> Template:
        """Made when somebody looks: 25 ms of CPU, and 50 for the import."""
        return environment().from_string((ASSETS / "page.html").read_text(encoding="utf-8"))

    def document(self) -> str:
        """All of it."""
        return self._page.render(self._context())

    def parts(self) -> Rendered:
        """Each part by the id of its element."""
        context = self._context()
        made = self._page.new_context(context)
        parts = {name: "".join(block(made)) for name, block in self._page.blocks.items()}
        return Rendered(context["headline"].state, context["title"], parts)

    def _context(self) -> dict[str, Any]:
        status = self._watchdog.status()
        top = headline(self._watchdog, status)
        return {
            "version": __version__,
            "status": status,
            "headline": top,
            "title": f"{top.word} · {status.slot.name}",
            "clock": _moment(time.time()),
            "states": {name: sink_state(sink, status) for name, sink in status.sinks.items()},
            "notes": {name: note(sink) for name, sink in status.sinks.items()},
            "rates": {name: self._history.rate(name) for name in {*status.sinks, *self._charts}},
            "streams": self._streams,
            "charts": self._lines(),
            "forecast": f"{'the slot is ' if status.wal.lost_in_seconds else ''}{text.outlook(status.wal)}",
            "top": self._beside.top,
            "ranked": self._beside.ranked,
            "letters": [*self._letters(status)],
            "backfills": self._beside.backfills,
            "notices": [*reversed(self._watchdog.notices.ring)],
            "uptime": time.monotonic() - self._began,
            "settings": self._settings,
        }

    def _lines(self) -> dict[str, tuple[Chart, Chart]]:
        """The charts, made anew when a step has ended."""
        if self._charted != (step := self._history.step):
            self._charted = step
            hours = self._history.hours().items()
            self._charts = {
                name: (chart(rates, LEAST_RATE), chart(lags, LEAST_LAG_SECONDS)) for name, (rates, lags) in hours
            }
        return self._charts

    def _letters(self, status: Status) -> Iterator[dict[str, Any]]:
        """Those that are kept, with the commands for them, and why in words without row values."""
        kept = status.dead_letters
        if kept is None:
            return
        reasons = self._watchdog.pipeline.letters.reasons
        rows = [("", kept.rows)] if kept.rows else []
        for sink, count in [*rows, *kept.sinks.items()]:
            chosen = f"--sink {sink}" if sink else "--stage row"
            yield {
                "count": count,
                "of": f"of sink {sink}" if sink else "of rows that could not be made into events",
                "reasons": reasons.get(sink, {}).items(),
                "list": f"{PROGRAM} dead-letters list {chosen}",
                "replay": f"{PROGRAM} dead-letters replay {chosen}",
            }
