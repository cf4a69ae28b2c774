"""The HTTP sink against an API that is a function: bodies, keys, signatures, status classes, secrets."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from enrichment import EVENT
from replicator.contracts.errors import (
    BatchRefused,
    BatchTooLarge,
    SettingsError,
    SinkError,
    SinkMisconfigured,
    SinkUnavailable,
)
from replicator.contracts.events import Event
from replicator.contracts.settings import load
from replicator.contracts.sink import SinkContext
from sinks.http.errors import retry_after_seconds, status_text
from sinks.http.settings import HttpSettings
from sinks.http.sink import NO_TIME, HttpSink, event_key

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105  the example of the Standard Webhooks specification
NOW = datetime(2026, 1, 8, 14, 21, 52, tzinfo=UTC)

Answer = Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response] | None]


@pytest.fixture(autouse=True)
def _no_dotenv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A `.env` file of the developer's is not read."""
    monkeypatch.chdir(tmp_path)


def event(number: int, *, ts_us: int | None = 0) -> Event:
    """An event whose JSON no encoder would write like this: it has to arrive as it is."""
    body = f'{{"event_id": {number},"device":"ü"}}'.encode()
    return Event(commit_lsn=100, ordinal=number, id=number, key=1, ts_us=ts_us, json=body)


def events(count: int) -> list[Event]:
    """Events 1 to `count`."""
    return [event(number) for number in range(1, count + 1)]


class Api:
    """An API that gives `answer`; without one it takes a request unless one of the `bad` events is in it."""

    def __init__(self, answer: Answer | None = None, *, bad: frozenset[int] = frozenset()) -> None:
        self.requests: list[httpx.Request] = []
        self.taken: list[int] = []
        self._answer = answer
        self._bad = bad

    def sink(self, **settings: Any) -> HttpSink:
        """A sink that talks to it."""
        return HttpSink(
            HttpSettings(**settings), SinkContext(EVENT), transport=lambda: httpx.MockTransport(self._handle)
        )

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answer(request) if self._answer else None
        response = answer if answer is None or isinstance(answer, httpx.Response) else await answer
        body = json.loads(request.content or b"[]")
        ids = [one["event_id"] for one in (body if isinstance(body, list) else [body])]
        response = response or httpx.Response(422 if self._bad.intersection(ids) else 200)
        if response.is_success:
            self.taken += ids
        return response


def answering(status: int, **headers: str) -> Answer:
    """Always this status."""
    return lambda _: httpx.Response(status, headers={name.replace("_", "-"): text for name, text in headers.items()})


class TestRequest:
    """What goes over the wire."""

    async def test_is_an_array_of_the_events_bytes(self) -> None:
        """The events' bytes are joined, never encoded again."""
        api = Api()
        assert list(await api.sink(http_url="http://api:8000/in?x=1").write(events(2))) == []
        (request,) = api.requests
        assert request.method == "POST"
        assert str(request.url) == "http://api:8000/in?x=1"
        assert request.headers["content-type"] == "application/json"
        assert request.content.decode() == '[{"event_id": 1,"device":"ü"},{"event_id": 2,"device":"ü"}]'

    async def test_is_one_object_with_batch_size_1(self) -> None:
        """Batch size 1 means an object, not an array of one."""
        api = Api()
        await api.sink(http_batch_size=1).write(events(1))
        assert api.requests[0].content == event(1).json

    async def test_of_one_event_is_an_array_otherwise(self) -> None:
        """A lone event in a batch of up to 100 is still an array: the API needs one kind of parser."""
        api = Api()
        await api.sink().write(events(1))
        assert api.requests[0].content == b"[" + event(1).json + b"]"

    async def test_carries_no_secret_that_is_not_set(self) -> None:
        """Neither authorization nor signature by default."""
        api = Api()
        await api.sink().write(events(1))
        assert {"authorization", "webhook-signature"}.isdisjoint(api.requests[0].headers)

    async def test_carries_the_bearer_token(self) -> None:
        """As RFC 6750 has it."""
        api = Api()
        await api.sink(http_bearer_token="t0ken").write(events(1))  # noqa: S106  made up
        assert api.requests[0].headers["authorization"] == "Bearer t0ken"

    async def test_carries_userinfo_as_basic_authentication(self) -> None:
        """User and password leave the URL, percent-decoded."""
        api = Api()
        await api.sink(http_url="http://us%40er:p%3Aw@api/events").write(events(1))
        assert str(api.requests[0].url) == "http://api/events"
        credentials = api.requests[0].headers["authorization"].removeprefix("Basic ")
        assert base64.b64decode(credentials) == b"us@er:p:w"

    async def test_is_signed_so_that_receivers_can_verify_it(self) -> None:
        """The package that receivers use accepts the signature, and only over these bytes."""
        api = Api()
        await api.sink(http_webhook_secret=SECRET).write(events(3))
        (request,) = api.requests
        headers = dict(request.headers)
        assert [one["event_id"] for one in Webhook(SECRET).verify(request.content, headers)] == [1, 2, 3]
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(request.content + b" ", headers)


class TestKey:
    """The `Idempotency-Key`."""

    async def test_is_sent_twice(self) -> None:
        """Standard Webhooks' name for it carries the same."""
        api = Api()
        await api.sink().write(events(2))
        headers = api.requests[0].headers
        assert headers["idempotency-key"] == headers["webhook-id"] == event_key(events(2))

    def test_of_one_event_comes_from_its_id_alone(self) -> None:
        """Neither position nor content matter: a backfill finds the same key."""
        other = Event(commit_lsn=0, ordinal=0, id=7, key=9, ts_us=1, json=b"{}")
        assert event_key([event(7)]) == event_key([other]) == "event-7"

    def test_of_a_batch_is_fixed_for_ever(self) -> None:
        """A new release must not change it: events sent before the upgrade may come again after it."""
        assert event_key(events(3)) == "events-1-3-e2e2033ae7e19d680599d4eb0a1359a2"

    def test_tells_other_ids_and_other_orders_apart(self) -> None:
        """Different batches have different keys."""
        one, two, three, four = events(4)
        batches = ([one, two, four], [one, three, four], [two, one, four], [one, two, three, four], [one], [four])
        assert len({event_key(batch) for batch in batches}) == len(batches)

    @given(st.integers(min_value=-(2**63), max_value=2**63 - 1))
    def test_takes_every_id(self, number: int) -> None:
        """All that a bigint holds."""
        lone = Event(commit_lsn=0, ordinal=0, id=number, key=0, ts_us=0, json=b"")
        assert event_key([lone]) == f"event-{number}"
        assert event_key([lone, lone]).startswith(f"events-{number}-{number}-")


class TestStatus:
    """What an answer means."""

    @pytest.mark.parametrize("status", [200, 201, 202, 204, 207, 299])
    async def test_2xx_is_taken(self, status: int) -> None:
        """Whatever the body says."""
        api = Api(lambda _: httpx.Response(status, content=b"error: \xff not JSON"))
        assert list(await api.sink().write(events(2))) == []
        assert len(api.requests) == 1

    @pytest.mark.parametrize("status", [408, 409, 423, 424, 425, 429, 499, 500, 501, 502, 503, 504, 511, 599])
    async def test_overload_is_unavailable(self, status: int) -> None:
        """Nothing is refused or halved; the lane tries again."""
        api = Api(answering(status))
        with pytest.raises(SinkUnavailable, match=rf"http://localhost:8000 answered {status}") as caught:
            await api.sink().write(events(2))
        assert caught.value.retry_after is None
        assert len(api.requests) == 1

    async def test_retry_after_is_passed_on(self) -> None:
        """For the lane to honour."""
        with pytest.raises(SinkUnavailable) as caught:
            await Api(answering(429, retry_after="7")).sink().write(events(2))
        assert caught.value.retry_after == 7.0

    @pytest.mark.parametrize(
        "status", [301, 302, 304, 307, 308, 401, 402, 403, 404, 405, 407, 410, 412, 414, 415, 421, 426, 440, 497]
    )
    async def test_turned_away_is_misconfigured(self, status: int) -> None:
        """Nothing is refused, halved or followed; the message has a cure."""
        api = Api(answering(status, location="http://elsewhere/?secret"))
        with pytest.raises(SinkMisconfigured, match=rf"answered {status}.*REPLICATOR_HTTP_") as caught:
            await api.sink().write(events(2))
        assert len(api.requests) == 1
        assert "elsewhere" not in str(caught.value)

    @pytest.mark.parametrize("status", [400, 413, 416, 418, 422, 481])
    async def test_other_4xx_refuses_the_events(self, status: int) -> None:
        """One request: the lane sends parts. Only the dead letter's reason has the API's words."""
        api = Api(lambda _: httpx.Response(status, content=b"user\x1b 42", extensions={"reason_phrase": b"user 42"}))
        with pytest.raises(BatchRefused) as caught:
            await api.sink().write(events(2))
        assert len(api.requests) == 1
        assert (status == 413) == isinstance(caught.value, BatchTooLarge)
        assert caught.value.detail.startswith(f"http://localhost:8000 answered {status}")
        assert "user" not in str(caught.value)
        assert caught.value.reason == f"{status_text(status)}: user 42"

    async def test_the_words_of_a_refusal_are_cut(self) -> None:
        """Five hundred characters."""
        with pytest.raises(BatchRefused) as caught:
            await Api(lambda _: httpx.Response(422, content=b"x" * 100_000)).sink().write(events(1))
        assert caught.value.reason == f"422 Unprocessable Entity: {'x' * 500}…"

    @pytest.mark.parametrize(
        "error", [httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.ConnectTimeout, OSError]
    )
    async def test_network_errors_are_unavailable(self, error: type[Exception]) -> None:
        """Whatever the network does, it is tried again."""

        def fail(_: httpx.Request) -> httpx.Response:
            raise error("here")

        with pytest.raises(SinkUnavailable, match="no answer from http://localhost:8000"):
            await Api(fail).sink().write(events(1))

    async def test_silence_is_unavailable(self) -> None:
        """The timeout holds for the whole request."""

        async def never(_: httpx.Request) -> httpx.Response:
            await asyncio.Event().wait()
            raise AssertionError

        began = asyncio.get_running_loop().time()
        with pytest.raises(SinkUnavailable, match=r"did not answer within 0.05 s"):
            await Api(never).sink(http_timeout_seconds=0.05).write(events(1))
        assert 0.05 <= asyncio.get_running_loop().time() - began < 1.5

    async def test_a_body_that_breaks_off_changes_nothing(self) -> None:
        """After a 2xx the events are taken; sending them again would repeat them."""

        class Broken(httpx.AsyncByteStream):
            async def __aiter__(self) -> Any:
                yield b"{"
                raise httpx.ReadError("gone")

        api = Api(lambda _: httpx.Response(200, stream=Broken()))
        assert list(await api.sink().write(events(2))) == []


class TestRetryAfter:
    """The header's forms."""

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("0", 0.0),
            ("120", 120.0),
            (" 1.5 ", 1.5),
            ("Thu, 08 Jan 2026 14:22:52 GMT", 60.0),
            ("Thu, 08 Jan 2026 14:22:52 -0000", 60.0),
            ("Thursday, 08-Jan-26 14:22:52 GMT", 60.0),
            ("Thu, 08 Jan 2026 14:20:00 GMT", 0.0),
            (None, None),
            ("", None),
            ("-5", None),
            ("soon", None),
            ("9" * 400, None),
            ("nan", None),
            ("Mon, 01 Jan 2024 00:00:00 +99999999999999999999", None),
        ],
    )
    def test_is_read(self, value: str | None, expected: float | None) -> None:
        """Seconds or a date; anything else is as if it were absent."""
        assert retry_after_seconds(value, NOW) == expected

    @given(st.text())
    def test_never_fails(self, value: str) -> None:
        """Whatever a server sends."""
        seconds = retry_after_seconds(value, NOW)
        assert seconds is None or seconds >= 0

    @given(st.datetimes(min_value=datetime(1900, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001  hypothesis wants it so
    def test_reads_every_date(self, then: datetime) -> None:
        """Dates as servers write them."""
        value = then.strftime("%a, %d %b %Y %H:%M:%S GMT")
        assert retry_after_seconds(value, NOW) == max(0.0, (then.replace(microsecond=0) - NOW).total_seconds())


def _repeating(status: int, request: httpx.Request) -> httpx.Response:
    """An answer that says everything it was told, and what it knows of us."""
    return httpx.Response(status, text=f"you said {request.url} {dict(request.headers)} user:hunter2")


class TestTime:
    """Times that JSON can't express."""

    async def test_an_event_without_a_time_is_not_sent(self) -> None:
        """RFC 3339 can't say infinity: the sink knows that by itself, and the event's neighbours go."""
        api = Api()
        refusals = await api.sink().write([event(1), event(2, ts_us=None), event(3)])
        assert [(refusal.event.id, refusal.reason) for refusal in refusals] == [(2, NO_TIME)]
        assert api.taken == [1, 3]

    async def test_nothing_is_sent_when_no_event_has_a_time(self) -> None:
        """No empty array."""
        api = Api()
        assert len(await api.sink().write([event(1, ts_us=None)])) == 1
        assert api.requests == []


class TestCheck:
    """The preflight."""

    @pytest.mark.parametrize("status", [200, 204, 405, 501])
    async def test_finds_the_way_without_an_event(self, status: int) -> None:
        """OPTIONS is answered somehow: reachable, and no more is claimed."""
        api = Api(answering(status))
        (finding,) = await api.sink().check()
        assert finding.ok
        assert finding.cure == ""
        assert finding.what.startswith(f"HTTP API: http://localhost:8000 answers OPTIONS with {status}")
        assert [(request.method, request.content) for request in api.requests] == [("OPTIONS", b"")]

    @pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422, 429, 500, 503])
    async def test_reports_what_turns_us_away(self, status: int) -> None:
        """With the cure."""
        (finding,) = await Api(answering(status)).sink().check()
        assert not finding.ok
        assert (
            finding.what == f"HTTP API: http://localhost:8000 answered {status} {httpx.codes.get_reason_phrase(status)}"
        )
        assert "REPLICATOR_HTTP_" in finding.cure

    async def test_create_makes_nothing(self) -> None:
        """The API belongs to others."""
        api = Api()
        assert await api.sink().create() == []
        assert api.requests == []

    async def test_opens_and_closes_at_any_time(self) -> None:
        """Close without open, twice, and open again."""
        api = Api()
        sink = api.sink()
        await sink.close()
        await sink.open()
        await sink.write(events(1))
        await sink.close()
        await sink.close()
        await sink.open()
        await sink.write(events(1))
        assert api.taken == [1, 1]


class TestSettings:
    """Options and secrets."""

    def test_defaults(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing set, or set to nothing as compose files do."""
        for name in ("BEARER_TOKEN", "WEBHOOK_SECRET", "CA_FILE"):
            monkeypatch.setenv(f"REPLICATOR_HTTP_{name}", "")
        settings = load(HttpSettings)
        sink = HttpSink(settings, SinkContext(EVENT))
        assert settings.http_url.get_secret_value() == "http://localhost:8000/events"
        assert (settings.http_bearer_token, settings.http_webhook_secret, settings.http_ca_file) == (None, None, None)
        assert (sink.name, sink.max_events, sink.linger_seconds, sink.concurrency) == ("http", 500, 0.0, 16)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("URL", ""),
            ("URL", "localhost:8000/hunter2"),
            ("URL", "ftp://user:hunter2@host/"),
            ("URL", "http://user:hunter2@/events"),
            ("URL", "http://user:hunter2@host:0/events"),
            ("URL", "http://user:hunter2@host:65536/events"),
            ("URL", "http://user:hunter2@ho st/events"),
            ("URL", "http://user:hunter2@host/\n"),
            ("BATCH_SIZE", "0"),
            ("BATCH_SIZE", "many"),
            ("CONCURRENCY", "0"),
            ("TIMEOUT_SECONDS", "0"),
            ("BEARER_TOKEN", "hunter2\r\nx: y"),
            ("BEARER_TOKEN", "hunter2ü"),
            ("WEBHOOK_SECRET", "hunter2"),
            ("WEBHOOK_SECRET", "whsec_"),
            ("WEBHOOK_SECRET", "whsec_hunter2!"),
            ("WEBHOOK_SECRET", "whsec_hunte"),
            ("CA_FILE", "/nowhere/ca.pem"),
            ("CA_FILE", "/dev/null"),
        ],
    )
    def test_unusable_values_are_named(self, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The message has the variable and what it takes, and not the value."""
        monkeypatch.setenv(f"REPLICATOR_HTTP_{name}", value)
        with pytest.raises(SettingsError, match=rf"REPLICATOR_HTTP_{name} .* It takes ") as caught:
            load(HttpSettings)
        assert "hunter2" not in str(caught.value)

    def test_one_authorization(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A token and a user in the URL contradict each other."""
        monkeypatch.setenv("REPLICATOR_HTTP_URL", "http://user:pass@host/")
        monkeypatch.setenv("REPLICATOR_HTTP_BEARER_TOKEN", "token")
        with pytest.raises(
            SettingsError, match="REPLICATOR_HTTP_BEARER_TOKEN is unusable: REPLICATOR_HTTP_URL carries"
        ):
            load(HttpSettings)

    @pytest.mark.parametrize("status", [401, 404, 422, 503])
    async def test_secrets_stay_secret(self, status: int, caplog: pytest.LogCaptureFixture) -> None:
        """Not in errors, refusals, findings, reprs or logs at any level."""
        caplog.set_level(logging.DEBUG)
        settings: dict[str, Any] = {
            "http_url": "http://user:hunter2@api/hunter2?key=hunter2",
            "http_webhook_secret": "whsec_" + base64.b64encode(b"hunter2").decode(),
        }
        for more in ({}, {"http_url": "http://api/hunter2", "http_bearer_token": "hunter2"}):
            api = Api(partial(_repeating, status))
            sink = api.sink(**settings | more)
            shown = [repr(sink), repr(HttpSettings(**settings | more)), repr(await sink.check())]
            with pytest.raises(SinkError) as caught:
                await sink.write(events(1))
            shown += [str(caught.value), repr(caught.value), repr(caught.value.__cause__)]
            if isinstance(caught.value, BatchRefused):
                assert caught.value.reason.startswith("422 Unprocessable Entity: you said")
                shown.append(caught.value.reason)
            assert [text for text in [*shown, caplog.text] if "hunter2" in text or "aHVudGVyMg" in text] == []
