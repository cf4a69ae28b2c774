"""The HTTP sink over the wire: the devstack's API and its misbehaviour, TLS, and servers that break off."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr

from devstack.api import Api
from enrichment import EVENT
from replicator.contracts.errors import BatchRefused, BatchTooLarge, SinkMisconfigured, SinkUnavailable
from replicator.contracts.events import Event
from replicator.contracts.sink import SinkContext
from sinks.http.settings import HttpSettings
from sinks.http.sink import HttpSink

RETRY_DEADLINE_SECONDS = 30.0


def event(number: int) -> Event:
    """An event as enrichment makes it."""
    return Event(
        commit_lsn=100, ordinal=number, id=number, key=1, ts_us=0, json=b'{"event_id":%d,"device":"web"}' % number
    )


def events(first: int, last: int) -> list[Event]:
    """Events `first` to `last`."""
    return [event(number) for number in range(first, last + 1)]


@asynccontextmanager
async def opened(url: str, **settings: Any) -> AsyncIterator[HttpSink]:
    """A sink for that URL."""
    sink = HttpSink(HttpSettings(http_url=SecretStr(url), **settings), SinkContext(EVENT))
    await sink.open()
    try:
        yield sink
    finally:
        await sink.close()


async def written(sink: HttpSink, batch: list[Event]) -> list[int]:
    """Write as a lane does, trying again at once; the ids of the refused events."""
    async with asyncio.timeout(RETRY_DEADLINE_SECONDS):
        while True:
            try:
                return [refusal.event.id for refusal in await sink.write(batch)]
            except SinkUnavailable:
                continue


class TestApi:
    """Against the devstack's API."""

    async def test_takes_what_is_written(self, api: Api) -> None:
        """In order, in one request each, as arrays."""
        async with opened(api.url) as sink:
            assert list(await sink.write(events(1, 100))) == []
            assert list(await sink.write(events(101, 150))) == []
        assert api.event_ids() == list(range(1, 151))
        assert [(request.status, request.events) for request in api.requests()] == [(200, 100), (200, 50)]

    async def test_takes_single_objects(self, api: Api) -> None:
        """Batch size 1."""
        async with opened(api.url, http_batch_size=1) as sink:
            await sink.write([event(1)])
        assert api.events() == [{"event_id": 1, "device": "web"}]
        assert api.requests()[0].headers["idempotency-key"] == "event-1"

    async def test_gets_only_headers_with_a_purpose(self, api: Api) -> None:
        """No cookie, no credentials that nobody set."""
        async with opened(api.url) as sink:
            await sink.write([event(1)])
        names = set(api.requests()[0].headers)
        assert names == {
            "host", "content-length", "content-type", "user-agent", "accept", "accept-encoding", "idempotency-key",
            "webhook-id",
        }  # fmt: skip

    async def test_wants_a_token(self, api: Api) -> None:
        """A wrong one is our settings' fault, and costs no event."""
        api.behave(token="right")  # noqa: S106  made up
        async with opened(api.url, http_bearer_token="wrong") as sink:  # noqa: S106  made up
            with pytest.raises(SinkMisconfigured, match=r"401 Unauthorized.*REPLICATOR_HTTP_BEARER_TOKEN"):
                await sink.write(events(1, 3))
        async with opened(api.url, http_bearer_token="right") as sink:  # noqa: S106  made up
            await sink.write(events(1, 3))
        assert api.event_ids() == [1, 2, 3]

    async def test_refuses_events_and_says_why(self, api: Api) -> None:
        """In the reason of the refusal, for the dead letter."""
        api.behave(refuse_event_ids=[2], max_body_bytes=500)
        async with opened(api.url) as sink:
            with pytest.raises(BatchRefused) as caught:
                await sink.write(events(1, 3))
            assert caught.value.reason == "422 Unprocessable Entity: event 2 is refused"
            with pytest.raises(BatchTooLarge, match="413"):
                await sink.write(events(1, 100))

    async def test_names_a_time(self, api: Api) -> None:
        """Retry-After reaches the lane."""
        api.behave(status=429, retry_after="3", requests=1)
        async with opened(api.url) as sink:
            with pytest.raises(SinkUnavailable, match="429 Too Many Requests") as caught:
                await sink.write([event(1)])
        assert caught.value.retry_after == 3.0

    @pytest.mark.parametrize(("close", "taken"), [("before", [1, 2]), ("after", [1, 2, 1, 2])])
    async def test_hangs_up(self, api: Api, close: str, taken: list[int]) -> None:
        """Nobody knows whether the events were taken: they go again at once, under the same key."""
        api.behave(close=close, requests=1)
        async with opened(api.url) as sink:
            await sink.write(events(1, 2))
        assert api.event_ids() == taken
        assert len({request.headers["idempotency-key"] for request in api.requests()}) == 1

    async def test_hangs_up_again_and_again(self, api: Api) -> None:
        """The second time is an outage."""
        api.behave(close="before", requests=2)
        async with opened(api.url) as sink:
            with pytest.raises(SinkUnavailable, match=r"no answer from http://127.0.0.1"):
                await sink.write(events(1, 2))
            await sink.write(events(1, 2))
        assert len(api.requests()) == 3

    async def test_keeps_silent(self, api: Api) -> None:
        """The timeout ends it, and the next request works."""
        api.behave(hang_seconds=60, requests=1)
        async with opened(api.url, http_timeout_seconds=0.2) as sink:
            with pytest.raises(SinkUnavailable, match=r"did not answer within 0.2 s"):
                await sink.write([event(1)])
            await sink.write([event(1)])
        assert api.event_ids() == [1]

    async def test_is_killed_and_comes_back(self, api: Api) -> None:
        """Refused connections are an outage."""
        async with opened(api.url) as sink:
            await sink.write([event(1)])
            api.kill()
            with pytest.raises(SinkUnavailable, match="no answer from"):
                await sink.write([event(2)])
            (finding,) = await sink.check()
            assert not finding.ok
            api.start()
            assert await written(sink, [event(2)]) == []
        assert api.event_ids() == [1, 2]

    async def test_is_checked(self, api: Api) -> None:
        """Without a trace among its events."""
        async with opened(api.url) as sink:
            (finding,) = await sink.check()
        assert finding.ok
        assert "answers OPTIONS with 405 Method Not Allowed" in finding.what
        assert api.stats().requests == 0

    async def test_has_another_path(self, api: Api) -> None:
        """404 is our settings' fault, in `check` and in `write`."""
        async with opened(api.url + "/nowhere") as sink:
            (finding,) = await sink.check()
            with pytest.raises(SinkMisconfigured, match=r"404 Not Found.*REPLICATOR_HTTP_URL"):
                await sink.write([event(1)])
        assert (finding.ok, "REPLICATOR_HTTP_URL" in finding.cure) == (False, True)


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """A server that does just that with each connection; its URL."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/events"


async def _endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"]")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000000\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"x" * 65_536)
        try:
            await writer.drain()
        except ConnectionError:
            return


async def _stuck(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"]")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n1234")
    await reader.read()


async def _torn(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"]")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n1234")


async def _early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 413 Payload Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")


async def _garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"]")
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")


def _phrase(status_line: bytes) -> Handler:
    return _answer(b"HTTP/1.1 " + status_line + b"\r\nContent-Length: 0\r\n\r\n")


def _answer(text: bytes) -> Handler:
    """This to every request, and nothing else."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"]")
                writer.write(text)
                await writer.drain()
                if b"Length" not in text:
                    return

    return answer


OK = b"HTTP/1.1 200 OK\r\n"
END = b"Content-Length: 0\r\n\r\n"
HINT = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
ODD_2XX = {
    "a large header": OK + b"X: " + b"x" * 9_000 + b"\r\n" + END,
    "a huge header": OK + b"X: " + b"x" * 200_000 + b"\r\n" + END,
    "many headers": OK + b"X: x\r\n" * 2_000 + END,
    "204 with a body": b"HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\ndone",
    "a length that is none": OK + b"Content-Length: four\r\n\r\ndone",
    "two lengths": OK + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\ndone",
    "a length and chunks": OK + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ndone\r\n0\r\n\r\n",
    "chunks that are none": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a header without a colon": OK + b"nonsense\r\n" + END,
    "a header with a space": OK + b"X Y: z\r\n" + END,
    "control characters": OK + b"X: a\x00b\r\n" + END,
    "a folded header": OK + b"X: a\r\n b\r\n" + END,
    "line feeds": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    "an older version": b"HTTP/1.0 200 OK\r\n\r\n",
    "no phrase": b"HTTP/1.1 200\r\n" + END,
    "more than it announced": OK + b"Content-Length: 4\r\n\r\ndone and done",
    "only a status line": b"HTTP/1.1 200 OK\r\n",
    "headers without an end": OK + b"X: y\r\n",
    "an early hint": HINT + OK + END,
    "a huge header after it": HINT + OK + b"X: " + b"x" * 200_000 + b"\r\n" + END,
    "a length that is none after line feeds": b"\r\nHTTP/1.1 100\n\n" + HINT + OK + b"Content-Length: x\r\n\r\ndone",
}


class TestServers:
    """Against servers that don't keep to the protocol."""

    async def test_a_phrase_of_any_bytes_is_a_phrase(self) -> None:
        """Localised servers send Latin-1: the status decides, and the sink goes on."""
        async with serving(_phrase(b"200 verf\xfcgbar")) as url, opened(url) as sink:
            assert [] == list(await sink.write([event(1)]))
            assert [] == list(await sink.write([event(2)]))
        async with serving(_phrase(b"503 nicht verf\xfcgbar")) as url, opened(url) as sink:
            with pytest.raises(SinkUnavailable, match="answered 503 Service Unavailable"):
                await sink.write([event(1)])

    @pytest.mark.parametrize("handler", [_endless, _stuck, _torn])
    async def test_a_2xx_counts_whatever_its_body_does(self, handler: Handler) -> None:
        """The rest of the answer is read within bounds and decides nothing."""
        async with serving(handler) as url, opened(url) as sink, asyncio.timeout(10):
            assert list(await sink.write([event(1)])) == []
            assert list(await sink.write([event(2)])) == []

    async def test_an_answer_before_the_body_was_read_counts(self) -> None:
        """Proxies refuse a large body before they have read it; half a megabyte is still being sent then."""
        large = Event(commit_lsn=1, ordinal=1, id=1, key=1, ts_us=0, json=b'"' + b"x" * 500_000 + b'"')
        async with serving(_early) as url, opened(url) as sink:
            with pytest.raises(BatchTooLarge, match="413"):
                await sink.write([large])

    async def test_what_is_not_http_is_an_outage(self) -> None:
        """Perhaps the service behind a proxy is starting."""
        async with serving(_garbage) as url, opened(url) as sink:
            with pytest.raises(SinkUnavailable, match=r"does not speak HTTP \(if the port speaks TLS"):
                await sink.write([event(1)])

    @pytest.mark.parametrize("answer", ODD_2XX.values(), ids=ODD_2XX)
    async def test_an_odd_2xx_is_a_2xx(self, answer: bytes) -> None:
        """The status line is clear: events that were taken are not sent again."""
        async with serving(_answer(answer)) as url, opened(url) as sink:
            for number in (1, 2):
                assert [] == list(await sink.write([event(number)]))

    async def test_an_odd_refusal_is_a_refusal(self) -> None:
        """The same for every status."""
        async with serving(_answer(b"HTTP/1.1 422 No\r\nContent-Length: x\r\n\r\n")) as url, opened(url) as sink:
            with pytest.raises(BatchRefused, match="422"):
                await sink.write([event(1)])

    async def test_a_refusal_costs_its_connection(self) -> None:
        """Behind a load balancer the next one may lead to a server that takes the event."""
        connections: list[int] = []

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append(len(connections))
            status = b"422 No" if len(connections) == 1 else b"200 OK"
            await _answer(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")(reader, writer)

        async with serving(handle) as url, opened(url) as sink:
            with pytest.raises(BatchRefused):
                await sink.write([event(1)])
            for _ in range(2):
                assert [] == list(await sink.write([event(1)]))
        assert connections == [0, 1]

    async def test_an_unknown_host_is_an_outage(self) -> None:
        """Name servers fail and recover."""
        async with opened("http://user:hunter2@no-such-host.invalid/events") as sink:
            with pytest.raises(SinkUnavailable, match=r"no answer from http://no-such-host.invalid ") as caught:
                await sink.write([event(1)])
        assert "hunter2" not in str(caught.value) + str(caught.value.__cause__)

    async def test_cookies_and_redirects_are_not_followed(self) -> None:
        """What the API sets is not sent back; another address is for the operator to enter."""
        seen: list[str | None] = []

        async def handle(request: web.BaseRequest) -> web.Response:
            seen.append(request.headers.get("cookie"))
            status = 200 if len(seen) == 1 else 307
            return web.Response(status=status, headers={"set-cookie": "a=b", "location": "/elsewhere"})

        async with aiohttp_server(handle, None) as port, opened(f"http://localhost:{port}/events") as sink:
            await sink.write([event(1)])
            with pytest.raises(SinkMisconfigured, match=r"307 Temporary Redirect.*redirects to"):
                await sink.write([event(1)])
        assert seen == [None, None]

    async def test_proxies_of_the_environment_are_not_used(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        """Settings come from REPLICATOR_ variables alone."""
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        async with opened(api.url) as sink:
            await sink.write([event(1)])
        assert api.event_ids() == [1]


@asynccontextmanager
async def aiohttp_server(
    handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], context: ssl.SSLContext | None
) -> AsyncIterator[int]:
    """A small server; its port."""
    runner = web.ServerRunner(web.Server(handler))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for `localhost`, with its key, in one file."""
    file = tmp_path_factory.mktemp("tls") / "localhost.pem"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(file) + ".key"]
    subprocess.run(["openssl", "req", "-x509", *name, *key, "-days", "2", "-out", str(file)], check=True)
    return file


class TestTls:
    """Over https."""

    @asynccontextmanager
    async def server(self, certificate: Path) -> AsyncIterator[int]:
        """An API with that certificate; its port."""

        async def take(_: web.BaseRequest) -> web.Response:
            return web.Response()

        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, f"{certificate}.key")
        async with aiohttp_server(take, context) as port:
            yield port

    async def test_a_private_authority_is_trusted_when_named(self, certificate: Path) -> None:
        """REPLICATOR_HTTP_CA_FILE."""
        async with (
            self.server(certificate) as port,
            opened(f"https://localhost:{port}/", http_ca_file=certificate) as sink,
        ):
            assert list(await sink.write([event(1)])) == []

    async def test_an_unknown_authority_is_misconfigured(self, certificate: Path) -> None:
        """With the setting that cures it, in `check` too."""
        async with self.server(certificate) as port, opened(f"https://localhost:{port}/") as sink:
            with pytest.raises(SinkMisconfigured, match=r"self-signed certificate.*REPLICATOR_HTTP_CA_FILE"):
                await sink.write([event(1)])
            (finding,) = await sink.check()
        assert (finding.ok, "REPLICATOR_HTTP_CA_FILE" in finding.cure) == (False, True)

    async def test_another_host_name_is_misconfigured(self, certificate: Path) -> None:
        """The certificate is for localhost, the URL says 127.0.0.1."""
        async with (
            self.server(certificate) as port,
            opened(f"https://127.0.0.1:{port}/", http_ca_file=certificate) as sink,
        ):
            with pytest.raises(SinkMisconfigured, match="IP address mismatch"):
                await sink.write([event(1)])

    async def test_http_to_a_port_with_tls_is_nobody_s_fault(self, certificate: Path) -> None:
        """`check` tries TLS and names the cure; no event is refused."""
        async with self.server(certificate) as port, opened(f"http://localhost:{port}/") as sink:
            (finding,) = await sink.check()
            with pytest.raises(SinkUnavailable):
                await sink.write([event(1)])
        assert (finding.ok, "REPLICATOR_HTTP_URL to https://" in finding.cure) == (False, True)

    async def test_tls_to_a_plain_port_is_an_outage(self, api: Api) -> None:
        """It may be a proxy that is starting; the message says what OpenSSL met."""
        async with opened(api.url.replace("http:", "https:")) as sink:
            with pytest.raises(SinkUnavailable, match=r"no answer from https://.* \(TLS: \w+ "):
                await sink.write([event(1)])
