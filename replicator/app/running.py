"""A replicator at work: the pipeline, and the watchdog that looks at it. The command `run` and the library share it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from replicator.app import App
from replicator.delivery.retry import cancel
from replicator.operations.notices.notifier import guarded
from replicator.operations.watchdog import Answers, Watchdog
from replicator.pipeline import Pipeline


class Running:
    """`run` once."""

    def __init__(self, app: App) -> None:
        answers = Answers(app.store)
        self.store = answers.store
        self.pipeline = Pipeline(app.settings, app.source(), app.enricher, app.sinks, self.store)
        self.watchdog = Watchdog(self.pipeline, app.dsn, app.settings, answers, app.decisive)

    async def run(self, beside: Mapping[str, Callable[[], Awaitable[None]]]) -> None:
        """Replicate until the pipeline is stopped, and do `beside` meanwhile, by what each does."""
        watching = asyncio.create_task(self.watchdog.run())
        # Without it we would look healthy while the slot stands.
        watching.add_done_callback(lambda _: self.pipeline.stop())
        beside = {"notices": self.watchdog.notice, **beside}
        others = [asyncio.create_task(guarded(what, does)) for what, does in beside.items()]
        try:
            await self.pipeline.run()
        finally:
            await cancel([watching, *others])
        if not watching.cancelled() and (failure := watching.exception()):
            raise failure
