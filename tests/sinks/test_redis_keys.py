"""What the Redis scripts are called with, and what Redis's errors mean: no server needed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ConnectionError,  # noqa: A004  redis-py's name
    InvalidResponse,
    NoScriptError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004  redis-py's name
)

from replicator.contracts.errors import SettingsError, SinkError, SinkMisconfigured, SinkUnavailable, SinkUnusable
from replicator.contracts.events import Event
from replicator.contracts.settings import load
from sinks.redis.errors import sink_error
from sinks.redis.info import Info, findings
from sinks.redis.keys import (
    CALL_CONTENTS,
    CALL_EVENTS,
    CALL_KEYS,
    FEW_CONTENTS,
    Write,
    bucket_of,
    kept_buckets,
    moment,
    pack,
    refusals,
    window_buckets,
)
from sinks.redis.settings import RedisSettings

NOW = 1_767_882_112.5
YEAR_1_US = -62_135_596_800_000_000
YEAR_9999_END_US = 253_402_300_799_999_999
times_us = st.integers(YEAR_1_US, YEAR_9999_END_US)
ids = st.integers(-(2**63), 2**63 - 1)


def event(event_id: int, ts_us: int | None, key: int = 1) -> Event:
    """An event with these."""
    return Event(commit_lsn=1, ordinal=1, id=event_id, key=key, ts_us=ts_us, json=b"{}")


def only(events: Sequence[Event], now: float) -> Write:
    """The one call that they are."""
    [write] = pack(events, now)
    return write


@given(times_us, ids, times_us, ids)
def test_moments_sort_as_the_pairs_do(ts_a: int, id_a: int, ts_b: int, id_b: int) -> None:
    """Compared as text, moments order like (event_ts, event_id), over all years and ids."""
    assert ((ts_a, id_a) < (ts_b, id_b)) == (moment(event(id_a, ts_a)) < moment(event(id_b, ts_b)))


def test_of_two_views_in_one_call_the_later_is_kept() -> None:
    """As if each had come in a call of its own: they meet in a write when a catch-up brings what the stream brings."""
    views = [Event(commit_lsn=lsn, ordinal=1, id=7, key=1, ts_us=5, json=b"%d" % lsn) for lsn in (10, 9)]
    for order in (views, views[::-1]):
        assert only(order, NOW).call.args[-1] == b"10"


def test_moments_have_one_width() -> None:
    """The extremes are as wide as everything between them."""
    extremes = [event(-(2**63), YEAR_1_US), event(2**63 - 1, YEAR_9999_END_US), event(0, 0)]
    extremes.append(Event(commit_lsn=2**64 - 1, ordinal=1, id=1, key=1, ts_us=1, json=b"{}"))
    assert {58} == {len(moment(e)) for e in extremes}


def test_the_later_view_of_an_event_is_the_newer() -> None:
    """A backfill's, which brings corrected content, and never one that is replayed from LSN 0."""
    views = [Event(commit_lsn=lsn, ordinal=1, id=7, key=1, ts_us=5, json=b"{}") for lsn in (0, 9, 10, 2**64 - 1)]
    assert sorted(map(moment, views)) == [moment(view) for view in views]
    assert moment(views[-1]) < moment(event(8, 5))
    assert moment(event(7, 5))[:38] < moment(views[0]), "what an older release has stored"


def test_an_event_without_a_time_is_refused() -> None:
    """The reason says what is wrong with it, and no value."""
    lost, kept = event(1, None), event(2, int(NOW * 1e6), key=7)
    [refusal] = refusals([lost, kept])
    assert lost == refusal.event
    assert refusal.reason.startswith("its time is infinite")


def counts(write: Write) -> list[str]:
    """The contents that a call counts."""
    return [key for key in write.call.keys if key.startswith("content:count:")]


def test_a_call_is_bounded_by_contents() -> None:
    """And by events; none is left out or comes twice. Of many contents, each comes in one call."""
    time_us = int(NOW * 1e6)
    for contents, most, calls in (
        (7, 7, 2),
        (1_000, 1_000, 2),
        (5_000, CALL_CONTENTS, 28),
        (32_000, CALL_CONTENTS, 178),
    ):
        events = [event(number, time_us, key=number % contents) for number in range(2 * CALL_EVENTS)]
        writes = list(pack(events, NOW))
        assert calls == len(writes)
        assert all(len(counts(write)) <= most for write in writes)
        found = [key for write in writes for key in counts(write)]
        assert {f"content:count:{key}" for key in range(contents)} == {*found}
        assert len(found) == (contents if contents > FEW_CONTENTS else calls * contents)


def test_a_call_is_bounded_by_pages() -> None:
    """Each page of seen bits is read: ids that are far apart make more calls."""
    far = list(pack([event(number << 16, int(NOW * 1e6)) for number in range(16_000)], NOW))
    assert all(sum(key.startswith("engagement:seen:") for key in write.call.keys) <= CALL_KEYS for write in far)
    assert [] == list(pack([], NOW))


@pytest.mark.parametrize(
    ("age_seconds", "ranked"),
    [(0, True), (890, True), (910, False), (-10_800, True), (-86_000, True), (-86_800, False)],
)
def test_what_gets_a_bucket(age_seconds: int, ranked: bool) -> None:
    """Events whose bucket would have expired don't, nor those more than a day ahead; an event 3 hours ahead does."""
    assert ranked == bool(only([event(1, int((NOW - age_seconds) * 1e6))], NOW).buckets)


@pytest.mark.parametrize("ahead_seconds", [0, 400, 850])
def test_a_bucket_outlives_the_window_whatever_our_clock_says(ahead_seconds: int) -> None:
    """It has to be there when it leaves the window, or what it holds stays in it: from its last write on for 15 min."""
    write = only([event(1, int(NOW * 1e6))], NOW + ahead_seconds)
    assert [bucket_of(NOW)] == write.buckets
    assert 900 == write.call.args[5]
    write = only([event(1, int((NOW + 3_600) * 1e6))], NOW)
    assert [bucket_of(NOW + 3_600)] == write.buckets
    assert bucket_of(NOW + 3_600) - NOW + 900 <= int(write.call.args[5])


def test_the_window_is_ten_minutes_of_buckets() -> None:
    """The newest of those that are kept, which are those that an event of now or before may be in."""
    assert (
        [*range(bucket_of(NOW) - 595, bucket_of(NOW) + 1, 5)] == [*window_buckets(NOW)] == [*kept_buckets(NOW)][-120:]
    )
    [earliest, *_] = kept_buckets(NOW)
    assert [earliest] == only([event(1, earliest * 1_000_000)], NOW).buckets
    assert [] == only([event(1, earliest * 1_000_000 - 1)], NOW).buckets


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (ConnectionError("Error 111 connecting to localhost:6379."), SinkUnavailable),
        (TimeoutError("Timeout reading from localhost:6379"), SinkUnavailable),
        (BusyLoadingError("Redis is loading the dataset in memory", status_code="LOADING"), SinkUnavailable),
        (OutOfMemoryError("command not allowed when used memory > 'maxmemory'.", status_code="OOM"), SinkUnavailable),
        (ResponseError("BUSY Redis is busy running a script."), SinkUnavailable),
        (ResponseError("MISCONF Redis is configured to save RDB snapshots, but it can't"), SinkUnavailable),
        (ResponseError("ERR Error running script (call to f_ab): @user_script: 9: -OOM no memory"), SinkUnavailable),
        (AuthenticationError("Authentication required.", status_code="NOAUTH"), SinkMisconfigured),
        (ResponseError("DB index is out of range"), SinkMisconfigured),
        (ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), SinkMisconfigured),
        (ClusterCrossSlotError("Keys in request don't hash to the same slot", status_code="CROSSSLOT"), SinkUnusable),
        (ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), SinkUnusable),
        (ResponseError("unknown command 'EVALSHA'"), SinkUnusable),
        # What nobody knows is not now: proxies and services have words of their own.
        (ResponseError("upstream failure"), SinkUnavailable),
        (ResponseError("no upstream host"), SinkUnavailable),
        (ResponseError("max daily request limit exceeded. Limit: 10000, Usage: 10000."), SinkUnavailable),
        (NoScriptError("No matching script. Please use EVAL."), SinkUnavailable),
        (ResponseError("Error running script (call to f_ab): @user_script:1: attempt to call nil"), SinkUnavailable),
        (InvalidResponse("Protocol error, got b'H' as reply type byte"), SinkUnavailable),
        (OSError(24, "Too many open files"), SinkUnavailable),
    ],
)
def test_what_errors_mean(exc: RedisError | OSError, expected: type[SinkError]) -> None:
    """The class decides what the lane does."""
    assert expected is type(sink_error("redis", exc))


def test_an_answer_is_quoted_with_care() -> None:
    """Whoever wrote it: on one line, without control characters or our password, and not at length."""
    exc = ResponseError("upstream \x1b[31m\r\nINFO all is well \u202e hush-1 " + "x" * 10_000)
    shown = sink_error("redis", exc, ["hush-1"]).detail
    assert shown.isprintable()
    assert "hush-1" not in shown
    assert 201 == len(shown)


def test_arguments_are_not_repeated() -> None:
    """Redis repeats arguments of a command it does not know; we don't."""
    exc = ResponseError("unknown command 'EVALSHA', with args beginning with: 'ab' '9' 'content:count:42'")
    assert "42" not in str(sink_error("redis", exc))


@pytest.mark.parametrize(
    "url",
    [
        "http://:secret@localhost",
        "redis://:secret@localhost:port/0",
        "redis://:secret@localhost?no_such_option=1",
        "redis://:secret@localhost?db=x",
        "redis://:secret@localhost?decode_responses=true",
        "redis://:secret@localhost?encoding=latin-1",
        "redis://:secret@localhost?protocol=3",
        "redis://:secret@localhost?retry_on_timeout=true",
        "redis://:secret@localhost?max_connections=1",
        "redis://:secret@localhost?socket_timeout=0",
        "redis://:secret@localhost?socket_connect_timeout=inf",
        "redis://:secret@localhost?socket_timeout=nan",
        "rediss://:secret@localhost?ssl_cert_reqs=perhaps",
        "rediss://:secret@localhost?ssl_min_version=TLSv1.2",
        "",
    ],
)
def test_unusable_urls_are_named_without_their_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the setting and what it takes."""
    monkeypatch.setenv("REPLICATOR_REDIS_URL", url)
    with pytest.raises(SettingsError, match=r"REPLICATOR_REDIS_URL.*rediss://") as caught:
        load(RedisSettings)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:6379/0",
        "rediss://user:secret@localhost:6380/1?ssl_cert_reqs=required&ssl_ca_certs=/etc/ssl/ca.pem",
        "unix:///run/redis.sock?db=2",
        "redis://localhost?socket_timeout=1.5",
        "redis://localhost?health_check_interval=30&client_name=replicator",
    ],
)
def test_usable_urls(url: str) -> None:
    """Every form that redis-py takes."""
    assert url == RedisSettings(redis_url=SecretStr(url)).redis_url.get_secret_value()


@pytest.mark.parametrize("prefix", ["shop", "a b:", "x" * 61 + ":", "a:b:", ":", "ключ:", "*:"])
def test_a_prefix_is_a_word_and_a_colon(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So none can be the beginning of another."""
    monkeypatch.setenv("REPLICATOR_REDIS_PREFIX", prefix)
    with pytest.raises(SettingsError, match="REPLICATOR_REDIS_PREFIX is unusable"):
        load(RedisSettings)


def test_findings_tell_what_redis_may_lose() -> None:
    """Whether and when it writes to the disk, as far as it says."""
    aof: Info = {"redis_version": "7.0.15", "aof_enabled": 1}
    said = {when: findings(aof, when)[-1] for when in ("always", "everysec", "")}
    assert [True] * 3 == [finding.ok for finding in said.values()]
    assert "appendfsync everysec" in said["everysec"].what
    assert "CONFIG is denied" in said[""].what
    assert "" == said["always"].cure
    assert "appendfsync always" in said["everysec"].cure


def test_findings_tell_what_redis_forgets() -> None:
    """Old versions and eviction fail the check; eviction without a limit, and no append-only file, don't."""
    known: Info = {"evicted_keys": 0, "maxmemory_policy": "allkeys-lru"}
    fine: Info = {**known, "redis_version": "7.0.15", "maxmemory": 0, "aof_enabled": 1}
    expected = [True, True, True]
    assert expected == [finding.ok for finding in findings(fine, "always")]
    bad: Info = {**known, "redis_version": "5.0.7", "maxmemory": 1000, "aof_enabled": 0}
    expected = [False, False, True]
    assert expected == [finding.ok for finding in findings(bad, "")]
    assert all(finding.cure for finding in findings(bad, "") if not finding.ok)


@pytest.mark.parametrize("unsaid", [None, {"evicted_keys": 0}, {"maxmemory_policy": "noeviction"}])
def test_what_redis_does_not_say_is_not_all_well(unsaid: Info | None) -> None:
    """Keys that it evicts would go unnoticed: that is said, with the cure."""
    told = findings(unsaid, "always")
    assert any("unnoticed" in finding.what and "noeviction" in finding.cure for finding in told)
    assert not any("evicts no keys" in finding.what for finding in told)
