"""The notifier against a real HTTP server that misbehaves: nothing is told twice, nothing is lost silently."""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from checkpoint_store import SqlCheckpointStore
from replicator.contracts.errors import SlotMissing
from replicator.contracts.settings import CoreSettings
from replicator.operations.notices import notifier as notifiers
from replicator.operations.notices import post
from replicator.operations.notices.notifier import QUEUE, Notifier, guarded
from replicator.operations.notices.ring import Notice, Notices, Reason
from replicator.operations.notices.rule import message
from replicator.operations.notices.systemd import tell
from replicator.operations.status.form import NotificationStatus
from tests.support.certificates import sign
from tests.support.hook import Hook, hook

PATH = "T000/B000/planted-secret"


@pytest.fixture
def server() -> Iterator[Hook]:
    """It behaves well until a test says otherwise."""
    with hook() as listening:
        yield listening


@pytest.fixture
def notices() -> Notices:
    """Nothing is wrong."""
    return Notices()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that fit a test."""
    monkeypatch.setattr(notifiers, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(notifiers, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(notifiers, "RETRY_MAX_SECONDS", 0.02)


def notifier_of(notices: Notices, url: str, *, is_ready: Callable[[], bool] = lambda: True) -> Notifier:
    """Both addresses are this one."""
    given = {"notify_url": url, "heartbeat_url": url, "slot": "s"}
    return Notifier(CoreSettings.model_validate(given), notices, is_ready)


def url_of(server: Hook, scheme: str = "http") -> str:
    """With a secret in it, as a chat service's."""
    return f"{scheme}://127.0.0.1:{server.port}/{PATH}"


@asynccontextmanager
async def running(*work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Side by side, until the end."""
    tasks = [asyncio.ensure_future(one()) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def until(holds: Callable[[], object]) -> None:
    """Return when it holds. Fifty messages take 4 s alone, and longer beside other tests."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110  of another thread
            await asyncio.sleep(0.005)


def shown(notifier: Notifier) -> NotificationStatus:
    """What `status` says."""
    status = notifier.status()
    assert status is not None
    return status


def wrong(number: int = 1) -> list[Reason]:
    """So many troubles."""
    return [Reason("sink", f"sink{n}", f"sink{n} is away. Start it.", "Start it.") for n in range(number)]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "statuses",
    [[500], [0], [429, 503], [404], [302], [401, 403, 410]],
    ids=lambda statuses: "-".join(map(str, statuses)),
)
async def test_a_message_is_sent_until_it_is_taken(server: Hook, notices: Notices, statuses: list[int]) -> None:
    """Whatever the server does meanwhile, which is shown; it is taken once, and no redirect is followed."""
    server.statuses = statuses * 3
    server.headers = {"Retry-After": "0.01", "Location": f"http://127.0.0.1:{server.port}/elsewhere"}
    notifier = notifier_of(notices, url_of(server))
    notices.see(wrong())
    async with running(notifier.watch, notifier.send):
        await until(lambda: shown(notifier).trouble)
        status = shown(notifier)
        assert "REPLICATOR_NOTIFY_URL: " in status.trouble
        assert "planted" not in status.trouble
        await until(lambda: server.told)
        await until(lambda: shown(notifier).sent == 1)
    assert [f"POST /{PATH}"] * (len(statuses) * 3 + 1) == server.asked
    [told] = server.told
    assert ("[s] sink0 is away. Start it.", "begins", "sink0") == (told["text"], told["event"], told["subject"])
    status = shown(notifier)
    assert ("", 0, 0) == (status.trouble, status.waiting, status.lost)


@pytest.mark.usefixtures("quick")
async def test_that_nobody_is_told_is_a_warning(
    server: Hook, notices: Notices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both addresses, for whoever looks at the page; whoever can't be told is not told of that later."""
    monkeypatch.setattr(notifiers, "TROUBLE_SECONDS", 0.01)
    server.statuses = [500] * 10_000
    notifier = notifier_of(notices, url_of(server))
    notices.see(wrong())
    async with running(notifier.watch, notifier.send, notifier.beat):
        await until(lambda: len([*notifier.warnings()]) == 2)
        told, beaten = notifier.warnings()
        assert ("notifications", "R105") == (told.kind, told.code)
        assert "REPLICATOR_NOTIFY_URL: " in told.problem
        assert ("heartbeat", "R105") == (beaten.kind, beaten.code)
        assert "Check the address in REPLICATOR_HEARTBEAT_URL." == beaten.cure
        notices.see([*wrong(), told])
        server.statuses = []
        await until(lambda: not [*notifier.warnings()])
        notices.see([])
        await until(lambda: shown(notifier).waiting == 0)
    assert ["sink0"] == [message["subject"] for message in server.told]


@pytest.mark.usefixtures("quick")
async def test_a_message_that_is_refused_holds_up_no_other(
    server: Hook, notices: Notices, caplog: pytest.LogCaptureFixture
) -> None:
    """The same one again would be refused again: it is lost, which is logged and counted."""
    server.statuses = [400]
    notifier = notifier_of(notices, url_of(server))
    notices.see(wrong(2))
    async with running(notifier.watch, notifier.send):
        await until(lambda: server.told)
    assert ["[s] sink1 is away. Start it."] == server.texts()
    assert 1 == shown(notifier).lost
    assert "a notification is lost: [s] sink0 is away." in caplog.text
    assert "planted" not in caplog.text


@pytest.mark.usefixtures("quick")
async def test_the_queue_has_a_bound(server: Hook, notices: Notices, caplog: pytest.LogCaptureFixture) -> None:
    """The oldest is lost, and said to be."""
    server.statuses = [500] * 10_000
    notifier = notifier_of(notices, url_of(server))
    notices.see(wrong(QUEUE + 3))
    async with running(notifier.watch, notifier.send):
        await until(lambda: shown(notifier).lost == 3)
        server.statuses = []
        await until(lambda: shown(notifier).waiting == 0)
    assert 3 == caplog.text.count("a notification is lost")
    assert QUEUE == len(server.told)


@pytest.mark.usefixtures("quick")
async def test_a_message_on_its_way_is_not_said_to_be_lost(
    server: Hook, notices: Notices, caplog: pytest.LogCaptureFixture
) -> None:
    """While it is tried again the queue behind it overflows: each message is either told or lost."""
    server.statuses = [500] * 10_000
    notifier = notifier_of(notices, url_of(server))
    notices.see(wrong())
    async with running(notifier.watch, notifier.send):
        await until(lambda: server.asked)
        notices.see(wrong(QUEUE + 2))
        await until(lambda: shown(notifier).lost)
        assert QUEUE + 1 == shown(notifier).waiting
        server.statuses = []
        await until(lambda: shown(notifier).waiting == 0)
    assert "a notification is lost: [s] sink1 is away." in caplog.text
    assert "[s] sink0 is away. Start it." == server.texts()[0]
    assert (QUEUE + 1, 1) == (shown(notifier).sent, shown(notifier).lost)


async def test_the_certificates_are_not_read_on_the_loop(
    server: Hook, notices: Notices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes 70 ms, and every try does it."""
    read: list[str] = []

    def create() -> ssl.SSLContext:
        read.append(threading.current_thread().name)
        return ssl.create_default_context()

    monkeypatch.setattr("httpx.create_ssl_context", create)
    assert await notifier_of(notices, url_of(server))._post(message("s", _notice(notices), "begins"))  # noqa: SLF001
    assert [True] == ["asyncio" in name for name in read]


async def test_a_silent_server_holds_up_nothing(
    server: Hook, notices: Notices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request is given up, and says so without the address."""
    monkeypatch.setattr(post, "TIMEOUT_SECONDS", 0.05)
    server.silent_seconds = 0.2
    notifier = notifier_of(notices, url_of(server))
    with pytest.raises(
        post.NotTaken, match=rf"REPLICATOR_NOTIFY_URL: no answer from http://127.0.0.1:{server.port} within"
    ):
        await notifier._post(message("s", _notice(notices), "begins"))  # noqa: SLF001


def _notice(notices: Notices) -> Notice:
    notices.see(wrong())
    return notices.ring[0]


async def test_a_certificate_that_nobody_vouches_for_is_not_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notices: Notices
) -> None:
    """Nothing is sent to it; SSL_CERT_FILE names who is trusted."""
    made = sign(tmp_path / "ca", "localhost")
    with hook(made.context()) as server:
        url = url_of(server, "https").replace("127.0.0.1", "localhost")
        notifier = notifier_of(notices, url)
        told = message("s", _notice(notices), "begins")
        with pytest.raises(post.NotTaken, match=r"the certificate of https://localhost:[0-9]+ is not accepted"):
            await notifier._post(told)  # noqa: SLF001
        assert not server.told
        monkeypatch.setenv("SSL_CERT_FILE", str(made.authority))
        assert await notifier._post(told)  # noqa: SLF001
        assert 1 == len(server.told)


@pytest.mark.usefixtures("quick")
async def test_the_heartbeat_beats_only_while_all_is_well(server: Hook, notices: Notices) -> None:
    """By GET; whoever waits for it is not asked once more because of a failure."""
    ready = False
    notifier = notifier_of(notices, url_of(server), is_ready=lambda: ready)
    async with running(notifier.beat):
        await asyncio.sleep(0.05)
        assert not server.asked
        ready = True
        server.statuses = [500]
        await until(lambda: len(server.asked) == 1)
        await until(lambda: shown(notifier).heartbeat_trouble)
        await until(lambda: not shown(notifier).heartbeat_trouble)
        ready = False
        await asyncio.sleep(0.1)
        asked = len(server.asked)
        await asyncio.sleep(0.1)
        assert asked == len(server.asked)
    assert {f"GET /{PATH}"} == {*server.asked}


@pytest.mark.usefixtures("quick")
async def test_an_end_is_told_once_and_that_it_runs_again(server: Hook, notices: Notices, tmp_path: Path) -> None:
    """A process that is started again and again ends of the same gap again and again."""
    store = SqlCheckpointStore(f"sqlite:///{tmp_path}/checkpoint.db")
    store.create()
    gap = SlotMissing(slot="s", checkpoint="0/10", since="then")
    for _ in range(3):
        await notifier_of(notices, url_of(server)).say_end(gap, store)
    await notifier_of(notices, url_of(server)).say_end(ValueError("hush"), store)
    again = notifier_of(notices, url_of(server))
    async with running(again.send):
        await again.say_again(store)
        await until(lambda: len(server.told) == 3)
    await notifier_of(notices, url_of(server)).say_again(store)
    first, bug, over = server.texts()
    assert first.startswith("[s] the replicator has ended: replication slot s does not exist")
    assert "init --accept-gap" in first
    assert "it failed in an unexpected way (ValueError)" in bug
    assert "hush" not in bug
    assert over.endswith("the replicator had ended, and runs again")
    store.close()


async def test_nobody_is_told_without_an_address(notices: Notices) -> None:
    """Nothing runs for it."""
    notifier = Notifier(CoreSettings.model_validate({}), notices, lambda: True)
    await notifier.watch()
    await notifier.beat()
    assert notifier.status() is None


async def test_a_bug_in_it_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The stream goes on; the log has the traceback."""

    async def fails() -> None:
        raise ValueError("a bug of ours")

    await guarded("the heartbeat", fails)
    assert "the heartbeat: a bug has ended this until the next start" in caplog.text
    assert logging.ERROR == caplog.records[0].levelno


def test_without_systemd_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor when its socket is gone."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    tell("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/socket")
    tell("READY=1")
