"""What an error of the driver means for the sink; the clients translate with it.

ClickHouse has some 700 error codes. The ones that mean "never like this" are named here. Every other code, and every
failure of the network, means "not now": the insert is retried until it succeeds, and each failure is reported.
Messages keep the code and drop the server's text, because that text quotes the row.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

import aiohttp
from clickhouse_connect.driver.exceptions import ClickHouseError, ProgrammingError

from replicator.contracts.errors import SinkError, SinkMisconfigured, SinkUnavailable, SinkUnusable, command

SINK = "clickhouse"


# fmt: off
_REFUSED = {  # a value can't be stored; the event is at fault if the table is as it should be
    6: "CANNOT_PARSE_TEXT", 25: "CANNOT_PARSE_ESCAPE_SEQUENCE", 26: "CANNOT_PARSE_QUOTED_STRING",
    27: "CANNOT_PARSE_INPUT_ASSERTION_FAILED", 38: "CANNOT_PARSE_DATE", 41: "CANNOT_PARSE_DATETIME",
    53: "TYPE_MISMATCH", 69: "ARGUMENT_OUT_OF_BOUND", 70: "CANNOT_CONVERT_TYPE", 72: "CANNOT_PARSE_NUMBER",
    131: "TOO_LARGE_STRING_SIZE", 321: "VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE",
    349: "CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN", 407: "DECIMAL_OVERFLOW", 469: "VIOLATED_CONSTRAINT",
    691: "UNKNOWN_ELEMENT_OF_ENUM",
}
_UNUSABLE = {  # the table does not fit, so no event can be written; 117: it lacks a field
    16: "NO_SUCH_COLUMN_IN_TABLE", 44: "ILLEGAL_COLUMN", 47: "UNKNOWN_IDENTIFIER", 48: "NOT_IMPLEMENTED",
    60: "UNKNOWN_TABLE", 73: "UNKNOWN_FORMAT", 81: "UNKNOWN_DATABASE", 115: "UNKNOWN_SETTING",
    116: "THERE_IS_NO_DEFAULT_VALUE", 117: "INCORRECT_DATA", 727: "UNEXPECTED_TABLE_ENGINE",
}
_MISCONFIGURED = {  # the user is unknown or lacks a right
    164: "READONLY", 192: "UNKNOWN_USER", 193: "WRONG_PASSWORD", 194: "REQUIRED_PASSWORD",
    195: "IP_ADDRESS_NOT_ALLOWED", 291: "DATABASE_ACCESS_DENIED", 452: "SETTING_CONSTRAINT_VIOLATION",
    497: "ACCESS_DENIED", 516: "AUTHENTICATION_FAILED", 720: "USER_EXPIRED",
}
_NOT_NOW = {  # retried, like every code that is not listed; named because an operator may have to act
    75: "CANNOT_WRITE_TO_FILE_DESCRIPTOR", 76: "CANNOT_OPEN_FILE", 159: "TIMEOUT_EXCEEDED",
    202: "TOO_MANY_SIMULTANEOUS_QUERIES", 241: "MEMORY_LIMIT_EXCEEDED", 242: "TABLE_IS_READ_ONLY",
    243: "NOT_ENOUGH_SPACE", 252: "TOO_MANY_PARTS", 394: "QUERY_WAS_CANCELLED",
}
# fmt: on
_NAMES = _REFUSED | _UNUSABLE | _MISCONFIGURED | _NOT_NOW  # the driver's own `name` may be a word of the row

_UNUSABLE_CURE = f"Run {command('init')}, then {command('check')}, which names what is wrong"
_URL_CURE = "Check that REPLICATOR_CLICKHOUSE_URL names the right server, user and password"
_RIGHTS_CURE = f"{_URL_CURE}, and that the user may INSERT into the table and change settings"
_CA_CURE = (
    "Check that the certificate is in date and names the host in REPLICATOR_CLICKHOUSE_URL, and that "
    "REPLICATOR_CLICKHOUSE_CA_FILE holds the authority that signed it, if that is a private one"
)
_CLIENT_CURE = "Check REPLICATOR_CLICKHOUSE_URL, the user's settings profile and, for chdb, who holds its directory"

_TURNED_AWAY_STATUSES = {"401", "403", "404", "405", "407"}  # from a proxy or something that is not ClickHouse


class ValueRefused(Exception):
    """ClickHouse refused a value in the insert; the message is fit for a dead letter."""


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Raise the driver's errors as a SinkError or ValueRefused; `where` is the server, without secrets."""
    try:
        yield
    except (JSONDecodeError, UnicodeDecodeError):
        raise not_clickhouse(where) from None
    except (ClickHouseError, aiohttp.ClientError, TimeoutError) as exc:
        code = getattr(exc, "code", None)
        if code is None:
            raise _unanswered(exc, where) from exc
        raise _answered(code) from None  # the driver's message quotes the row


def not_clickhouse(where: str) -> SinkMisconfigured:
    """Something answers with success and not as ClickHouse does: nothing was written."""
    return SinkMisconfigured(sink=SINK, detail=f"{where} answers, but not as ClickHouse does", cure=_URL_CURE)


def _answered(code: int) -> SinkError | ValueRefused:
    detail = f"ClickHouse error {code} {_NAMES.get(code, '')}".rstrip()
    if code in _REFUSED:
        return ValueRefused(detail)
    if code in _UNUSABLE:
        return SinkUnusable(sink=SINK, detail=detail, cure=_UNUSABLE_CURE)
    if code in _MISCONFIGURED:
        return SinkMisconfigured(sink=SINK, detail=detail, cure=_RIGHTS_CURE)
    return SinkUnavailable(sink=SINK, detail=detail)


def _unanswered(exc: Exception, where: str) -> SinkError:
    """ClickHouse itself did not answer: the network failed, something in between, or the driver."""
    causes: list[Exception] = []
    cause: BaseException | None = exc
    while isinstance(cause, Exception):  # under a time-out is a CancelledError, which says nothing
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return SinkMisconfigured(sink=SINK, detail=f"the certificate of {where} is not trusted", cure=_CA_CURE)
    if isinstance(exc, ProgrammingError):
        return SinkMisconfigured(sink=SINK, detail=str(exc), cure=_CLIENT_CURE)
    status = re.search(r"HTTP status (\d+)", str(exc))
    if status is not None:
        detail = f"{where} answers with HTTP status {status[1]}"
        if status[1] in _TURNED_AWAY_STATUSES:
            return SinkMisconfigured(sink=SINK, detail=detail, cure=_URL_CURE)
        return SinkUnavailable(sink=SINK, detail=detail)
    if str(exc).startswith("Unexpected response"):  # to the driver's first question
        return not_clickhouse(where)
    return SinkUnavailable(sink=SINK, detail=f"no answer from {where} ({type(causes[-1]).__name__})")
