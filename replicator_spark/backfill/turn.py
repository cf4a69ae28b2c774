"""A task: for some seconds it brings a part of a range to the sinks, and tells the driver how far that is.

It is the product's own backfill with a checkpoint database of its own, for as long as the task lasts: the driver keeps
the dead letters and the place. So a task that dies costs a turn, and a sink that is away is told to the driver.
"""

from __future__ import annotations

import asyncio
import platform
import tempfile
from pathlib import Path

import msgspec

from checkpoint_store import SqlCheckpointStore
from enrichment import RangeHistory
from replicator.app import App
from replicator.contracts.errors import ReplicatorError
from replicator.contracts.events import DeadLetter, Lsn
from replicator.delivery.backfill import Backfill, BackfillProgress
from replicator.delivery.lane import Lane
from replicator.delivery.retry import Stopped, retry
from replicator_spark.backfill.plan import Share
from replicator_spark.nodes import Meant, compare, meant

TURN_SECONDS = 20.0
"""What a task that dies has done in vain, at most; and how often the driver hears of each. Each turn connects anew and
fills its lanes, which takes some 0.3 s."""
HELD_SECONDS = 10.0
"""After that, what a sink does not take is given back to the driver."""
LETTERS_MAX = 100_000_000
"""The driver has the bound, and waits where it is reached."""
PAGE = 1_000


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What every task is to do."""

    meant: Meant
    sinks: list[str]
    since: Lsn
    """Where the primary's WAL was when the backfill began: a standby has to be there."""
    page_rows: int
    rate: float | None
    """Events a second, at most."""


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What was brought to one sink."""

    events: int = 0
    new: int | None = None
    """None: the sink can't tell."""
    dead_letters: int = 0


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What a task has done."""

    node: str
    reached: BackfillProgress
    done: bool
    """The slice is."""
    letters: list[DeadLetter] = []
    rows_refused: int = 0
    sinks: dict[str, Written] = {}
    trouble: str = ""
    """Why it did not come further."""
    failure: tuple[str, str, str] | None = None
    """What trying again can't help: the problem, the cure and the code."""


def run(order: Order, share: Share) -> Turn:
    """One turn, from where the last one of this slice ended."""
    with tempfile.TemporaryDirectory(prefix="replicator-slice-") as folder:
        try:
            return asyncio.run(_run(order, share, Path(folder)))
        except ReplicatorError as exc:
            failure = exc.problem, exc.cure, exc.code
            return Turn(node=platform.node(), reached=share.reached, done=False, failure=failure)


async def _run(order: Order, share: Share, folder: Path) -> Turn:
    app = App.load(order.sinks)
    settings = app.settings.model_copy(update={"dead_letters_max": LETTERS_MAX})
    app = app._replace(settings=settings, store=SqlCheckpointStore(f"sqlite:///{folder}/checkpoint.db"))
    history = RangeHistory(app.dsn, share.slice.start, share.slice.end, tables=app.tables, since=order.since)
    await asyncio.to_thread(app.store.create)
    work = Backfill(
        settings,
        history,
        app.sinks,
        app.store,
        task="slice",
        start=share.reached,
        page_rows=order.page_rows,
        rate=order.rate,
    )
    async with app.closing(history):
        done = await _in_time(order, app, history, work)
        return Turn(
            node=platform.node(),
            reached=work.written,
            done=done,
            letters=await asyncio.to_thread(_letters, app),
            rows_refused=work.rows_refused,
            sinks={lane.name: _written(lane) for lane in work.fan_out.lanes},
            trouble="" if done else _trouble(work),
        )


async def _in_time(order: Order, app: App, history: RangeHistory, work: Backfill) -> bool:
    """Work for a turn; whether the slice is done."""

    async def begin() -> None:
        compare(order.meant, await meant(order.sinks, app.dsn, order.meant.key))
        await history.open()

    over = asyncio.Event()
    timing = asyncio.create_task(_end(work, over))
    try:
        await retry(begin, work.trouble, app.settings.retry_max_seconds, stopping=over)
        return await work.run()
    except Stopped:
        return False
    finally:
        timing.cancel()


async def _end(work: Backfill, over: asyncio.Event) -> None:
    await asyncio.sleep(TURN_SECONDS)
    over.set()
    work.finish()
    await asyncio.sleep(HELD_SECONDS)
    work.stop()


def _letters(app: App) -> list[DeadLetter]:
    found: list[DeadLetter] = []
    while page := app.store.dead_letters(app.settings.slot, after_id=found[-1].id or 0 if found else 0, limit=PAGE):
        found += page
    return found


def _written(lane: Lane) -> Written:
    refused = lane.stats.dead_letters
    return Written(events=lane.stats.events - refused, new=lane.sink.new_events, dead_letters=refused)


def _trouble(work: Backfill) -> str:
    """What holds it, in the words of the log."""
    troubles = [work.trouble, *(lane.trouble for lane in work.fan_out.lanes)]
    return " ".join(trouble.message for trouble in troubles if trouble)
