"""Misbehaviour on request, for the servers that are our own programs (`api_server`, `clickhouse_server`)."""

from __future__ import annotations

import asyncio
import random
from typing import Literal

import msgspec
from aiohttp import web

NO_ANSWER = 0  # stands for a status: the connection was closed


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens to requests, and to which of them. The defaults do nothing."""

    status: int | None = None
    """Answer with this status and accept nothing."""
    retry_after: str | None = None
    """Send this `Retry-After` with `status`."""
    hang_seconds: float = 0
    """Wait before accepting. If the client has gone meanwhile, accept nothing."""
    close: Literal["before", "after"] | None = None
    """Close the connection without an answer, before or after accepting the request."""
    delay_seconds: float = 0
    """Accept it at once, and answer later."""
    requests: int | None = None
    """Hit so many requests, then no more; None: all."""
    probability: float = 1
    """Hit each request with this probability."""
    seed: int | None = None
    """For `probability`."""


NO_FAULT = Fault()


class Refused(Exception):
    """The request ends with this status, which may be NO_ANSWER."""

    def __init__(self, status: int, text: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers or {}


class Faults:
    """Decides which requests a fault hits."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._left = fault.requests
        self._random = random.Random(fault.seed)  # noqa: S311  not a secret

    def next(self) -> Fault:
        """The fault for the next request."""
        if self._left == 0 or self._random.random() >= self._fault.probability:
            return NO_FAULT
        if self._left is not None:
            self._left -= 1
        return self._fault


async def strike_before(fault: Fault, request: web.Request) -> None:
    """Run before the request is accepted. Raises Refused if it is not to be."""
    if fault.hang_seconds:
        await asyncio.sleep(fault.hang_seconds)
        if request.transport is None or request.transport.is_closing():
            raise Refused(NO_ANSWER)
    if fault.status is not None:
        headers = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
        raise Refused(fault.status, "misbehaving on request", headers)
    if fault.close == "before":
        raise Refused(NO_ANSWER)


async def strike_after(fault: Fault) -> None:
    """Run between accepting the request and answering it."""
    if fault.close == "after":
        raise Refused(NO_ANSWER)
    if fault.delay_seconds:
        await asyncio.sleep(fault.delay_seconds)


def refusal(request: web.Request, refused: Refused) -> web.Response:
    """The answer to a refused request. For NO_ANSWER the connection is closed and the answer is lost."""
    if refused.status == NO_ANSWER and request.transport is not None:
        request.transport.abort()
    return web.Response(status=refused.status or 500, text=f"{refused}\n", headers=refused.headers)
