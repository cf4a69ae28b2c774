"""`/healthz`, `/readyz`, `/status` and `/metrics` on REPLICATOR_ADMIN_LISTEN. No authentication: keep it on loopback.

`watchdog.py` knows what is shown, `metrics.py` and `status.py` give it its forms.
"""

from __future__ import annotations

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, exposition

from replicator.contracts.errors import SettingsError
from replicator.operations.metrics import Metrics
from replicator.operations.watchdog import Watchdog


class Admin:
    """The HTTP server; `start` and `stop` belong to the event loop that runs the pipeline."""

    def __init__(self, watchdog: Watchdog, listen: str) -> None:
        self._watchdog = watchdog
        self._listen = listen
        self._registry = CollectorRegistry()
        self._registry.register(Metrics(watchdog))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        app = web.Application()
        for path in ("healthz", "readyz", "status", "metrics"):
            app.router.add_get(f"/{path}", getattr(self, f"_{path}"))
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self) -> None:
        """Listen; nothing to do when the setting is empty. Raises SettingsError when the address can't be had."""
        if not self._listen:
            return
        host, _, port = self._listen.rpartition(":")
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host.strip("[]"), int(port)).start()
        except (OSError, OverflowError) as exc:
            await self.stop()
            problem = f"{self._listen} can't be listened on ({exc})"
            raise SettingsError(name="REPLICATOR_ADMIN_LISTEN", problem=problem, expected="a free host:port") from exc

    async def stop(self) -> None:
        """Stop listening. Safe to call at any time."""
        await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")  # from the loop that runs the pipeline: it lives

    async def _readyz(self, _: web.Request) -> web.Response:
        reasons = self._watchdog.reasons()
        return web.Response(text="\n".join(reasons or ["ready"]) + "\n", status=503 if reasons else 200)

    async def _status(self, _: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._watchdog.status()), content_type="application/json")

    async def _metrics(self, _: web.Request) -> web.Response:
        body = exposition.generate_latest(self._registry)
        return web.Response(body=body, headers={"Content-Type": exposition.CONTENT_TYPE_LATEST})
