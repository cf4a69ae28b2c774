"""An independent observer: was `/readyz` ready at any moment while an event was lost or stood still?

It knows the committed events from PostgreSQL and what each destination has from the destination itself. An event is
overdue at a sink when it was committed more than OVERDUE_SECONDS ago and is not there. For GRACE_SECONDS `/readyz` may
be ready with the same oldest overdue event: the light has just turned green, and the sink begins to catch up. What is
skipped, refused or forgotten stays the oldest overdue event for ever, so a light that is green over it is found.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Iterator

import psycopg
import redis

from devstack.process import DevStackError
from replicator.contracts.events import Id
from tests.prove.world.world import World, WrongError

LOOK_SECONDS = 0.2
"""Between two looks at /readyz."""
INVENTORY_SECONDS = 1.0
"""Between two looks at what has arrived."""
OVERDUE_SECONDS = 15.0
"""A sink that takes nothing is a reason after 10 s; the rest is for a busy machine."""
GRACE_SECONDS = 5.0
ANSWER_SECONDS = 3.0
PAGE_BITS = 1 << 16

COMMITTED = "SELECT id, event_type = 'odd' FROM {table}"
GONE = (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName, psycopg.errors.QueryCanceled)


class Observer:
    """`watch` is one round's thread of looks."""

    def __init__(self, world: World, note: Callable[[str], None]) -> None:
        self.looks = Counter[str]()
        """How often it was `ready`, `not ready` and silent (`no answer`)."""
        self._world = world
        self._note = note
        self._since: dict[Id, float] = {}  # event → when it was seen first
        self._ready_since: float | None = None
        self._oldest: dict[str, tuple[Id, float]] = {}  # sink → its oldest overdue event, and since when it is that
        self._last = ""

    def watch(self, over: threading.Event) -> None:
        """Look until it is over. Raises WrongError."""
        at = 0.0
        while not over.wait(LOOK_SECONDS):
            self.look()
            if time.monotonic() - at > INVENTORY_SECONDS:
                at = time.monotonic()
                self.take_stock()

    def look(self) -> None:
        """Ask /readyz."""
        code, text = self._readyz()
        self.looks["ready" if code == 200 else "not ready" if code else "no answer"] += 1
        if (kind := re.sub(r"\d+", "…", text)) != self._last:
            self._note(f"/readyz: {code} {text}")
            self._last = kind
        if code != 200:
            self._ready_since = None
        elif self._ready_since is None:
            self._ready_since = time.monotonic()

    def _readyz(self) -> tuple[int, str]:
        url = f"http://{self._world.program.environment['REPLICATOR_ADMIN_LISTEN']}/readyz"
        try:
            with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read().decode()
        except OSError:
            return 0, "no answer"

    def take_stock(self) -> None:
        """Compare what is committed with what has arrived. Raises WrongError for a light that lies."""
        self._see_committed()
        now = time.monotonic()
        for sink, arrived in self._arrived():
            excused: Collection[Id] = self._world.place.poison if sink == "http" else ()
            missing = [key for key, at in self._since.items() if now - at > OVERDUE_SECONDS and key not in arrived]
            missing = [key for key in missing if key not in excused]
            self._judge(sink, missing, now)

    def _judge(self, sink: str, missing: list[Id], now: float) -> None:
        if not missing:
            self._oldest.pop(sink, None)
            return
        oldest = min(missing, key=lambda key: (self._since[key], key))
        if self._oldest.get(sink, (0, 0.0))[0] != oldest:
            self._oldest[sink] = oldest, now
            self._note(f"{sink}: {len(missing)} overdue, the oldest is event {oldest}")
        same = now - self._oldest[sink][1]
        ready = now - self._ready_since if self._ready_since is not None else 0.0
        if min(same, ready) > GRACE_SECONDS:
            age = now - self._since[oldest]
            raise WrongError(
                f"/readyz has been ready for {ready:.0f} s, and {sink} lacks {len(missing)} events that are overdue:"
                f" {missing[:5]}…; the oldest was committed {age:.0f} s ago"
            )

    def _see_committed(self) -> None:
        now = time.monotonic()
        with (
            contextlib.suppress(psycopg.OperationalError, *GONE),
            psycopg.connect(self._world.dsn, connect_timeout=2, options="-c statement_timeout=2000") as connection,
        ):
            for key, odd in connection.execute(self._committed.encode()):
                if not odd:
                    self._since.setdefault(key, now)

    def _arrived(self) -> Iterator[tuple[str, Collection[Id]]]:
        """Each destination that answers."""
        stack = self._world.stack
        with contextlib.suppress(OSError, DevStackError):
            yield (
                "clickhouse",
                {int(line) for line in stack.clickhouse.query("SELECT event_id FROM events_enriched").split()},
            )
        if not self._frozen:
            with contextlib.suppress(redis.RedisError):
                yield "redis", self._counted()
            with contextlib.suppress(OSError, DevStackError):
                yield "http", set(stack.api.event_ids())

    @property
    def _committed(self) -> str:
        return COMMITTED.format(table=self._world.place.table)

    @property
    def _frozen(self) -> bool:
        return self._world.frozen.is_set()

    def _counted(self) -> set[int]:
        """The events whose bit Redis has."""
        found: set[int] = set()
        pages = {key // PAGE_BITS for key in self._since if isinstance(key, int)}
        with redis.Redis.from_url(self._world.stack.redis.url, socket_timeout=ANSWER_SECONDS) as client:
            for page in pages:
                value: bytes = client.get(f"engagement:seen:{page}") or b""
                bits = int.from_bytes(value, "big")
                width = len(value) * 8
                found |= {page * PAGE_BITS + n for n in range(width) if bits >> (width - 1 - n) & 1}
        return found


class OrdersObserver(Observer):
    """Of orders: each one that was ever there has to have arrived, whatever became of it. The API is not asked."""

    @property
    def _committed(self) -> str:
        return "SELECT DISTINCT order_id::text, false FROM shop.log WHERE order_id IS NOT NULL AND NOT deleted"

    def _arrived(self) -> Iterator[tuple[str, Collection[Id]]]:
        with contextlib.suppress(OSError, DevStackError):
            yield "clickhouse", set(self._world.stack.clickhouse.query("SELECT toString(order_id) FROM orders").split())
        if not self._frozen:
            url = self._world.stack.redis.url
            with (
                contextlib.suppress(redis.RedisError),
                redis.Redis.from_url(url, socket_timeout=ANSWER_SECONDS, decode_responses=True) as client,
            ):
                yield "redis", set(client.hkeys("orders:seen:rows"))
