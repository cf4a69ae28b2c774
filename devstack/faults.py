"""Misbehaviour on request, for the servers that are our own programs (`api_server`, `clickhouse_server`)."""

from __future__ import annotations

import asyncio
import random
from typing import Literal

import msgspec
from aiohttp import web

NO_ANSWER = 0  # in place of a status: the connection was closed


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens to a request, and to which ones; the defaults do nothing."""

    status: int | None = None
    """Answer this and take nothing."""
    retry_after: str | None = None
    """Send this `Retry-After` with `status`."""
    hang_seconds: float = 0
    """First keep silent for so long; if the client has gone meanwhile, take nothing."""
    close: Literal["before", "after"] | None = None
    """Close the connection without an answer, before or after taking what it brought."""
    delay_seconds: float = 0
    """Take it, and answer so much later."""
    requests: int | None = None
    """Strike so many requests, then no more; None: until told otherwise."""
    probability: float = 1
    """Strike each request with this probability."""
    seed: int | None = None
    """Of that probability."""


NO_FAULT = Fault()


class Refused(Exception):
    """The request ends with this status, NO_ANSWER included."""

    def __init__(self, status: int, text: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers or {}


class Faults:
    """Decides which requests a fault strikes."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._left = fault.requests
        self._random = random.Random(fault.seed)  # noqa: S311  no secrets here

    def next(self) -> Fault:
        """What the coming request meets."""
        if self._left == 0 or self._random.random() >= self._fault.probability:
            return NO_FAULT
        if self._left is not None:
            self._left -= 1
        return self._fault


async def strike_before(fault: Fault, request: web.Request) -> None:
    """What happens before the request is taken; raises Refused if it isn't."""
    if fault.hang_seconds:
        await asyncio.sleep(fault.hang_seconds)
        if request.transport is None or request.transport.is_closing():
            raise Refused(NO_ANSWER)
    if fault.status is not None:
        headers = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
        raise Refused(fault.status, "misbehaving as told", headers)
    if fault.close == "before":
        raise Refused(NO_ANSWER)


async def strike_after(fault: Fault) -> None:
    """What happens between taking the request and answering it."""
    if fault.close == "after":
        raise Refused(NO_ANSWER)
    if fault.delay_seconds:
        await asyncio.sleep(fault.delay_seconds)


def refusal(request: web.Request, refused: Refused) -> web.Response:
    """The answer to a refused request; with NO_ANSWER the connection is cut, and the answer goes nowhere."""
    if refused.status == NO_ANSWER and request.transport is not None:
        request.transport.abort()
    return web.Response(status=refused.status or 500, text=f"{refused}\n", headers=refused.headers)
