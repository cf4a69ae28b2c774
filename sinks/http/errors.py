"""The meaning of an HTTP status: were the events taken, refused, or is it not about them? Pure; `sink.py` sends."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from replicator.contracts.errors import BatchRefused, BatchTooLarge, SinkMisconfigured, SinkUnavailable

TRY_LATER = frozenset({408, 409, 420, 423, 424, 425, 429, 430, 449, 460, 499})
"""Not now, like every 5xx. 409 and 423: the API still works on our Idempotency-Key, or on something that we need; 420,
430, 449, 460 and 499 are what services and load balancers made up for overload and hang-ups."""
TOO_LARGE = 413
CREDENTIALS_CURE = "Check REPLICATOR_HTTP_BEARER_TOKEN, or user and password in REPLICATOR_HTTP_URL"
ADDRESS_CURE = "Check that the API takes POST at the host and path of REPLICATOR_HTTP_URL"
REDIRECT_CURE = "Set REPLICATOR_HTTP_URL to the address that it redirects to (redirects are not followed)"
FORMAT_CURE = "Check in the API's documentation what it wants: it gets JSON by POST at REPLICATOR_HTTP_URL"
TURNED_AWAY = {
    **dict.fromkeys((401, 402, 403, 419, 440, 498), CREDENTIALS_CURE),
    **dict.fromkeys((404, 405, 407, 410, 414, 421, 495, 496, 497), ADDRESS_CURE),
    **dict.fromkeys((406, 411, 412, 415, 417, 426, 428, 431, 451, 463, 494), FORMAT_CURE),
}
"""About our settings or the API, not about an event: the answer stays the same until somebody changes one of them.
402, 410 and 451 mean closed to us; 406, 412, 415, 417, 426, 428, 431, 463 and 494 another protocol, format or header;
407, 414 and 421 another server or address than was meant; 411 a proxy that drops content-length; 419, 440 and 498 an
expired session or token; 495 to 497 TLS."""


def judge(response: httpx.Response, *, sink: str, origin: str, words: str = "") -> None:
    """Return if `origin` took the events.

    Raises BatchRefused or BatchTooLarge with the API's own words, SinkUnavailable or SinkMisconfigured when the answer
    is not about the events.
    """
    status = response.status_code
    if response.is_success:
        return
    detail = f"{origin} answered {status_text(status)}"
    if status in TRY_LATER or response.is_server_error:
        retry_after = retry_after_seconds(response.headers.get("retry-after"), datetime.now(UTC))
        raise SinkUnavailable(sink=sink, detail=detail, retry_after=retry_after)
    if status in TURNED_AWAY or not response.is_client_error:
        cure = REDIRECT_CURE if response.is_redirect else TURNED_AWAY.get(status, FORMAT_CURE)
        raise SinkMisconfigured(sink=sink, detail=detail, cure=cure)
    refused = BatchTooLarge if status == TOO_LARGE else BatchRefused
    raise refused(sink=sink, detail=detail, reason=f"{status_text(status)}{words and f': {words}'}")


def status_text(status: int) -> str:
    """Code and standard phrase: the answer's own phrase may repeat what was in the event."""
    return f"{status} {httpx.codes.get_reason_phrase(status)}".rstrip()


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """Seconds that a `Retry-After` header asks for, as a number or a date (RFC 9110, 10.2.3); None if unusable."""
    if not value:
        return None
    if re.fullmatch(r"\s*[0-9]{1,9}(\.[0-9]{1,9})?\s*", value):
        return float(value.strip())
    try:
        then = parsedate_to_datetime(value)
        return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - now).total_seconds())
    except (ValueError, OverflowError):
        return None
