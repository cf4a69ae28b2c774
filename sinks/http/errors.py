"""Reads from the status of an HTTP answer what became of the events in the request; pure. `http_api.py` sends them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from replicator.contracts.errors import SinkMisconfigured, SinkUnavailable

TRY_LATER = frozenset({408, 425, 429})  # and every 5xx
# Not about any one event: whatever we send, the answer stays the same until somebody changes the settings or the API.
# 402, 410, 451: closed to us. 406, 415, 417, 426, 428, 431: another protocol, format or header is wanted. 407, 421:
# not the server that was meant. 411: something on the way loses content-length.
TURNED_AWAY = frozenset({401, 402, 403, 404, 405, 406, 407, 410, 411, 415, 417, 421, 426, 428, 431, 451})

CREDENTIALS_CURE = (
    "See that REPLICATOR_HTTP_BEARER_TOKEN, or user and password in REPLICATOR_HTTP_URL, are what the API gave you"
)
ADDRESS_CURE = "See that host and path of REPLICATOR_HTTP_URL are those at which the API takes POST"
REDIRECT_CURE = "Set REPLICATOR_HTTP_URL to the address that it redirects to (redirects are not followed)"
FORMAT_CURE = "See in the API's documentation what it wants: it gets JSON by POST at REPLICATOR_HTTP_URL"
CURES = dict.fromkeys((401, 402, 403), CREDENTIALS_CURE) | dict.fromkeys((404, 405, 407, 410, 421), ADDRESS_CURE)


def refusal(response: httpx.Response, *, sink: str, origin: str) -> str | None:
    """Why `origin` refused the events, None when it took them.

    Raises SinkUnavailable or SinkMisconfigured when the answer is not about the events.
    """
    status = response.status_code
    if httpx.codes.is_success(status):
        return None
    detail = f"{origin} answered {status_text(status)}"
    if status in TRY_LATER or status >= httpx.codes.INTERNAL_SERVER_ERROR:
        retry_after = retry_after_seconds(response.headers.get("retry-after"), datetime.now(UTC))
        raise SinkUnavailable(sink=sink, detail=detail, retry_after=retry_after)
    if status in TURNED_AWAY or not httpx.codes.is_client_error(status):
        cure = REDIRECT_CURE if httpx.codes.is_redirect(status) else CURES.get(status, FORMAT_CURE)
        raise SinkMisconfigured(sink=sink, detail=detail, cure=cure)
    return status_text(status)


def status_text(status: int) -> str:
    """Code and standard phrase: the answer's own phrase and body may repeat what was in the event."""
    return f"{status} {httpx.codes.get_reason_phrase(status)}".rstrip()


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """What a `Retry-After` header asks for, a number of seconds or a date; None when it says nothing usable."""
    if not value:
        return None
    if re.fullmatch(r"\s*[0-9]{1,9}(\.[0-9]{1,9})?\s*", value):
        return float(value.strip())
    try:
        then = parsedate_to_datetime(value)
        return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - now).total_seconds())
    except (ValueError, OverflowError):
        return None
