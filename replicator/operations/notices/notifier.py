"""Tells people who do not look: messages to REPLICATOR_NOTIFY_URL, and a sign of life to REPLICATOR_HEARTBEAT_URL.

`rule.py` says what is told, `post.py` sends it. Nothing here is waited for by the stream, and nothing here ends it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial

import msgspec

from replicator.contracts.errors import CheckpointError, ReplicatorError
from replicator.contracts.settings import CoreSettings, fresh
from replicator.contracts.stores import TaskProgress
from replicator.delivery.retry import Trouble, retry
from replicator.operations.notices.post import NotTaken, ask
from replicator.operations.notices.ring import Notice, Notices, Reason
from replicator.operations.notices.rule import Message, Rule, message
from replicator.operations.status.form import NotificationStatus

LOOK_SECONDS = 1.0
HEARTBEAT_SECONDS = 60.0
RETRY_MAX_SECONDS = 60.0
TROUBLE_SECONDS = 10.0
"""A chat service may be away so long before the page says so."""
NOTIFICATIONS = "notifications"
"""The kind of trouble that can't be told."""
QUEUE = 50
"""Messages that wait behind the one on its way. One more, and the oldest is lost: that is logged and counted."""
END_SECONDS = 5.0
"""For the last message of a process that ends: it must not hold up the end."""
SAME_END_SECONDS = 3600.0
"""A process that is started again and ends of the same again says it once in this time."""
END = "told that it ended"
"""Where the checkpoint database remembers that."""

log = logging.getLogger(__name__)


class _End(msgspec.Struct, frozen=True):
    """The last end that was told."""

    kind: str
    at: float
    over: bool = False


class Notifier:
    """`watch`, `send` and `beat` each run until cancelled."""

    def __init__(self, settings: CoreSettings, notices: Notices, is_ready: Callable[[], bool]) -> None:
        self._settings = settings
        self._notices = notices
        self._is_ready = is_ready
        self._rule = Rule(settings.slot)
        self._queue: asyncio.Queue[Message] = asyncio.Queue(QUEUE)
        self._sending = False
        self._trouble = Trouble(over=lambda seconds: f"notifications are taken again, after {seconds:.0f} s")
        self._heart = Trouble(over=lambda seconds: f"the heartbeat is taken again, after {seconds:.0f} s")
        self.troubles = (self._trouble, self._heart)
        """Why people are not told."""
        self._sent = self._lost = 0

    def status(self) -> NotificationStatus | None:
        """None: nobody is told."""
        if not (self._settings.notify_url or self._settings.heartbeat_url):
            return None
        return NotificationStatus(
            trouble=self._trouble.message,
            heartbeat_trouble=self._heart.message,
            sent=self._sent,
            waiting=self._queue.qsize() + self._sending,
            lost=self._lost,
        )

    def warnings(self) -> Iterator[Reason]:
        """That people are not told, once it has lasted: it is no reason not to be ready."""
        for kind, trouble in ((NOTIFICATIONS, self._trouble), ("heartbeat", self._heart)):
            if trouble.seconds() >= TROUBLE_SECONDS:
                yield Reason(kind, self._settings.slot, trouble.message, trouble.cure, trouble.code)

    async def watch(self) -> None:
        """Queue what is to be told."""
        while self._settings.notify_url:
            lasting = {key: notice for key, notice in self._notices.lasting.items() if notice.kind != NOTIFICATIONS}
            for told in self._rule.see(lasting, time.time()):
                self._put(told)
            await asyncio.sleep(LOOK_SECONDS)

    def _put(self, told: Message) -> None:
        if self._queue.full():
            self._lose(self._queue.get_nowait())
        self._queue.put_nowait(told)

    def _lose(self, told: Message) -> None:
        self._lost += 1
        log.error("a notification is lost: %s", told.text, extra={"code": "R106"})

    async def send(self) -> None:
        """Send what is queued, in order, each until it is taken."""
        while True:
            post = partial(self._post, await self._queue.get())  # so it can't be lost while it is on its way
            self._sending = True
            self._sent += await retry(post, self._trouble, RETRY_MAX_SECONDS, retried=(NotTaken,))
            self._sending = False

    async def _post(self, told: Message) -> bool:
        """Whether it was taken; one that is refused is lost. Raises NotTaken when it is to be sent again."""
        url = fresh(self._settings).notify_url
        try:
            if url:
                await ask("notify_url", url, msgspec.json.encode(told))
        except NotTaken as exc:
            if not exc.refused:
                await asyncio.sleep(min(exc.retry_after, RETRY_MAX_SECONDS))
                raise
            log.error("%s", exc)
            self._lose(told)
            return False
        return True

    async def beat(self) -> None:
        """Ask the heartbeat's address once a minute, only while all is well here."""
        while self._settings.heartbeat_url:
            if not self._is_ready():
                await asyncio.sleep(LOOK_SECONDS)
                continue
            await self._beat()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _beat(self) -> None:
        url = fresh(self._settings).heartbeat_url
        try:
            if url:
                await ask("heartbeat_url", url)
        except NotTaken as exc:
            self._heart.say(exc)
        else:
            if self._heart:
                self._heart.end()

    # -- the end -------------------------------------------------------------------------------------------------

    async def say_end(self, problem: Exception, store: TaskProgress) -> None:
        """That the process ends, and why; not again within an hour when it was started again. Never raises."""
        if not self._settings.notify_url:
            return
        with suppress(TimeoutError, NotTaken):
            async with asyncio.timeout(END_SECONDS):
                await self._say_end(problem, store)

    async def _say_end(self, problem: Exception, store: TaskProgress) -> None:
        kind, now = type(problem).__name__, time.time()
        last = await self._last_end(store)
        if last and last.kind == kind and now - last.at < SAME_END_SECONDS:
            return
        known = problem if isinstance(problem, ReplicatorError) else None
        text = f"the replicator has ended: {known.problem if known else f'it failed in an unexpected way ({kind})'}."
        cure = known.advice if known else "Please report it, with the traceback in the log."
        code = known.code if known else ""
        notice = Notice(kind="end", subject=self._settings.slot, text=text, cure=cure, began_at=now, code=code)
        await self._post(message(self._settings.slot, notice, "begins"))
        await self._keep_end(store, _End(kind, now))

    async def say_again(self, store: TaskProgress) -> None:
        """Once all is well: that a process which was said to have ended runs again."""
        while self._settings.notify_url:
            if self._is_ready():
                if (last := await self._last_end(store)) and not last.over:
                    text = "the replicator had ended, and runs again"
                    subject = self._settings.slot
                    notice = Notice(
                        kind="end", subject=subject, text=text, cure="", began_at=last.at, ended_at=time.time()
                    )
                    self._put(message(subject, notice, "ends"))
                    await self._keep_end(store, _End(last.kind, last.at, over=True))
                return
            await asyncio.sleep(LOOK_SECONDS)

    async def _last_end(self, store: TaskProgress) -> _End | None:
        try:
            kept = await asyncio.to_thread(store.load_progress, self._settings.slot, END)
            return msgspec.json.decode(kept, type=_End) if kept else None
        except (CheckpointError, msgspec.DecodeError):
            return None

    async def _keep_end(self, store: TaskProgress, end: _End) -> None:
        with suppress(CheckpointError):  # then it may be told again
            kept = msgspec.json.encode(end).decode()
            await asyncio.to_thread(store.save_progress, self._settings.slot, END, kept)


async def guarded(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run it to its end. A bug in it is logged and never ends the program, which has something better to do."""
    try:
        await work()
    except Exception:
        said = "%s: a bug has ended this until the next start; the stream goes on"
        log.exception(said, what, extra={"code": ReplicatorError.code})
