"""`python -m benchmarks.http_clients`: requests a second and CPU a request of the ways to POST with httpx.

Evidence for `docs/decisions.md`: httpx's own transport, the aiohttp transport under httpx's client, and that transport
alone. Each sends the same small request to the API of `devstack`, with as many requests in flight as the HTTP sink has.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import httpx
from httpx_aiohttp import AiohttpTransport

from devstack import DevStack

BODY = b'[{"event_id":1,"content_id":1,"user_id":1,"event_type":"play","event_ts":"2026-01-08T14:21:52.123456Z"}]'
CONCURRENCY = 16
WARM_UP_REQUESTS = 200

Send = Callable[[], Awaitable[object]]


def _client(client: httpx.AsyncClient, url: str) -> Send:
    return lambda: client.post(url, content=BODY)


def _bare(transport: httpx.AsyncBaseTransport, url: str) -> Send:
    async def send() -> None:
        response = await transport.handle_async_request(httpx.Request("POST", url, content=BODY))
        await response.aread()

    return send


async def _measure(name: str, send: Send, requests: int) -> str:
    """Print a line: name, requests a second, our CPU per request."""
    left = iter(range(requests))

    async def worker() -> None:
        for _ in left:
            await send()

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return f"{name:<36}{requests / seconds:>8,.0f} requests/s{cpu / requests * 1e6:>8,.0f} us of CPU a request"


async def _run(url: str, requests: int) -> None:
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(AiohttpTransport())
        own = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        over = await stack.enter_async_context(httpx.AsyncClient(transport=AiohttpTransport(), trust_env=False))
        ways = {
            "httpx.AsyncClient, its own transport": _client(own, url),
            "httpx.AsyncClient, aiohttp transport": _client(over, url),
            "the aiohttp transport alone": _bare(transport, url),
        }
        for name, send in ways.items():
            await _measure(name, send, WARM_UP_REQUESTS)
            print(await _measure(name, send, requests))


def main() -> None:
    """Start the API, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http_clients", description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=5_000, help="of each way (5000)")
    args = parser.parse_args()
    with DevStack("api") as devstack:
        asyncio.run(_run(devstack.api.url, args.requests))


if __name__ == "__main__":
    main()
