"""The admin endpoints over HTTP, beside a pipeline on real servers: ready, not ready, and why."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import psycopg
import pytest

from checkpoint_store import SqlCheckpointStore
from devstack import DevStack
from devstack.process import free_port
from enrichment import EVENT, StreamEnricher, Tables
from replicator.contracts.errors import SettingsError
from replicator.contracts.settings import CoreSettings, decisive
from replicator.contracts.sink import SinkContext
from replicator.operations import watchdog as watchdogs
from replicator.operations.follow.trace import Trace
from replicator.operations.http import Admin
from replicator.operations.page.live import Live
from replicator.operations.status import collect
from replicator.operations.watchdog import Answers, Watchdog
from replicator.pipeline import Pipeline
from replicator.source.stream import Source
from sinks import create_sinks
from tests.support.metrics import value


class Running:
    """A pipeline with its watchdog and its endpoints."""

    def __init__(self, settings: CoreSettings, pipeline: Pipeline, watchdog: Watchdog, page: Live) -> None:
        self.settings = settings
        self.pipeline = pipeline
        self.watchdog = watchdog
        self.page = page
        self.client = httpx.AsyncClient(base_url=f"http://{settings.admin_listen}", trust_env=False)

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        response = await self.client.get(path)
        return response.status_code, response.text

    async def metric(self, name: str, **labels: str) -> float | None:
        """Of /metrics."""
        return value((await self.get("/metrics"))[1], name, **labels)

    async def until_ready_says(self, status_code: int, words: str) -> None:
        """Wait for what /readyz has to say."""
        async with asyncio.timeout(30):
            while (found := await self.get("/readyz"))[0] != status_code or words not in found[1]:  # noqa: ASYNC110  asked over HTTP
                await asyncio.sleep(0.05)


async def no_trace(number: str, _stream: str | None) -> Trace:
    """Nobody asks for one."""
    raise AssertionError(number)


@asynccontextmanager
async def running(dsn: str, folder: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    """Everything that `run` puts together, in this process."""
    monkeypatch.setenv("REPLICATOR_REDIS_URL", redis_url)
    monkeypatch.setattr(watchdogs, "LOOK_SECONDS", 0.1)
    settings = CoreSettings.model_validate(
        {
            "postgres_dsn": dsn,
            "slot": f"admin_{uuid.uuid4().hex[:12]}",
            "sinks": "redis",
            "checkpoint_url": f"sqlite:///{folder}/checkpoint.db",
            "checkpoint_interval_seconds": 0.01,
            "feedback_interval_seconds": 0.1,
            "retry_max_seconds": 0.2,
            "admin_listen": f"127.0.0.1:{free_port()}",
        }
    )
    enricher = StreamEnricher(dsn, Tables(EVENT), 10)
    sinks = create_sinks(settings.sinks, SinkContext(EVENT))
    store = SqlCheckpointStore(settings.checkpoint_url.get_secret_value())
    answers = Answers(store)
    pipeline = Pipeline(settings, Source(dsn, settings.slot), enricher, sinks, answers.store)
    watchdog = Watchdog(pipeline, dsn, settings, answers, decisive())
    page = Live(watchdog, store, settings.slot, [])
    admin = Admin(watchdog, settings.admin_listen, page, no_trace)
    await admin.start()
    work = [asyncio.create_task(watchdog.run()), asyncio.create_task(pipeline.run())]
    made = Running(settings, pipeline, watchdog, page)
    try:
        yield made
    finally:
        pipeline.stop()
        await asyncio.wait_for(work[1], 30)
        work[0].cancel()
        await asyncio.wait([work[0]])
        await made.client.aclose()
        await admin.stop()
        await enricher.close()
        for sink in sinks:
            await sink.close()
        store.close()


async def test_what_a_healthy_replicator_says(
    database: str, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alive, ready, its counters and its status; `status` reads the latter."""
    async with running(database, tmp_path, redis_url, monkeypatch) as replicator:
        await replicator.until_ready_says(200, "ready")
        assert (200, "ok\n") == await replicator.get("/healthz")
        with psycopg.connect(database) as connection:
            connection.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')")
            connection.execute("UPDATE engagement_events SET device = 'tv'")
        async with asyncio.timeout(10):
            while await replicator.metric("sink_events_total", sink="redis") != 1:  # noqa: ASYNC110  likewise
                await asyncio.sleep(0.05)
        metric, slot = replicator.metric, replicator.settings.slot
        assert (1, 1, 2) == (await metric("ready"), await metric("connected"), await metric("rows_total", slot=slot))
        assert 1 == await metric("ignored_rows_total", action="update")
        assert 1 == await metric("sink_latency_seconds_count", sink="redis")
        saved = await metric("checkpoint_saved_timestamp_seconds")
        assert saved is not None
        assert 0 <= time.time() - saved < 60
        with closing(SqlCheckpointStore(replicator.settings.checkpoint_url.get_secret_value())) as store:
            found = await collect.collect(replicator.settings, ["redis"], store)
        assert (True, []) == (found.ready, found.reasons)
        assert found.replicator is not None
        assert (True, 2, {"update": 1}) == (
            found.replicator.connected,
            found.replicator.rows,
            found.replicator.ignored_rows,
        )
        assert (1, 1, "") == (found.sinks["redis"].events, found.sinks["redis"].writes, found.sinks["redis"].trouble)


async def test_not_ready_while_postgresql_is_away(
    stack: DevStack, database: str, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alive all the time; ready again by itself."""
    async with running(database, tmp_path, redis_url, monkeypatch) as replicator:
        await replicator.until_ready_says(200, "ready")
        stack.postgres.stop()
        try:
            await replicator.until_ready_says(503, "PostgreSQL is not reachable")
            assert (200, "ok\n") == await replicator.get("/healthz")
        finally:
            stack.postgres.start()
        await replicator.until_ready_says(200, "ready")


async def test_not_ready_over_a_slot_that_stands_still(
    stack: DevStack, database: str, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connected, and nothing moves because a sink takes nothing: said with the sink's own words."""
    monkeypatch.setattr(watchdogs, "STALL_SECONDS", 0.5)
    async with running(database, tmp_path, redis_url, monkeypatch) as replicator:
        await replicator.until_ready_says(200, "ready")
        stack.redis.stop()
        try:
            with psycopg.connect(database) as connection:
                insert = "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')"
                connection.execute(insert)
            await replicator.until_ready_says(503, "of WAL wait: Sink redis")
            assert 1 == await replicator.metric("sink_troubled", sink="redis")
        finally:
            stack.redis.start()
        await replicator.until_ready_says(200, "ready")


async def test_a_sink_that_does_not_answer_is_well_nowhere(
    stack: DevStack, database: str, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error says so for as long as its timeout: status, metrics and the page's light of the sink do."""
    monkeypatch.setattr(watchdogs, "TROUBLE_SECONDS", 0.3)
    async with running(database, tmp_path, redis_url, monkeypatch) as replicator:
        await replicator.until_ready_says(200, "ready")
        stack.redis.pause()
        try:
            with psycopg.connect(database) as connection:
                insert = "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')"
                connection.execute(insert)
            await replicator.until_ready_says(503, "sink redis has not answered")
            [redis] = replicator.watchdog.status().sinks.values()
            assert "has not answered" in redis.trouble
            assert 1 == await replicator.metric("sink_troubled", sink="redis")
            _, page = await replicator.get("/")
            assert 'class="stage sink" data-state="wrong"' in page
        finally:
            stack.redis.resume()
        await replicator.until_ready_says(200, "ready")


async def test_status_does_not_take_another_program_for_the_replicator(
    database: str, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address may belong to another slot's replicator: its lag is not ours."""
    async with running(database, tmp_path, redis_url, monkeypatch) as replicator:
        await replicator.until_ready_says(200, "ready")
        other = replicator.settings.model_copy(update={"slot": "another"})
        with closing(SqlCheckpointStore(other.checkpoint_url.get_secret_value())) as store:
            found = await collect.collect(other, ["redis"], store)
        assert not found.ready
        reason, missing = found.reasons
        assert f"the replicator of another slot, {replicator.settings.slot}, answers at" in reason
        assert replicator.settings.admin_listen in reason
        assert "does not exist" in missing


async def test_an_address_that_is_taken_is_a_setting_to_change(
    database: str, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, with the setting's name."""
    async with running(database, tmp_path, redis_url, monkeypatch) as replicator:
        second = Admin(replicator.watchdog, replicator.settings.admin_listen, replicator.page, no_trace)
        with pytest.raises(SettingsError, match="REPLICATOR_ADMIN_LISTEN"):
            await second.start()
