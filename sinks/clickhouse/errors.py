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
from enum import IntEnum
from json import JSONDecodeError

import aiohttp
from clickhouse_connect.driver.exceptions import ClickHouseError, ProgrammingError

from replicator.contracts.errors import SinkError, SinkMisconfigured, SinkUnavailable, SinkUnusable, command

SINK = "clickhouse"


class _Refused(IntEnum):
    """A value can't be stored. The event is at fault if the table is as it should be."""

    CANNOT_PARSE_TEXT = 6
    CANNOT_PARSE_ESCAPE_SEQUENCE = 25
    CANNOT_PARSE_QUOTED_STRING = 26
    CANNOT_PARSE_INPUT_ASSERTION_FAILED = 27
    CANNOT_PARSE_DATE = 38
    CANNOT_PARSE_DATETIME = 41
    TYPE_MISMATCH = 53
    ARGUMENT_OUT_OF_BOUND = 69
    CANNOT_CONVERT_TYPE = 70
    CANNOT_PARSE_NUMBER = 72
    TOO_LARGE_STRING_SIZE = 131
    VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE = 321
    CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN = 349
    DECIMAL_OVERFLOW = 407
    VIOLATED_CONSTRAINT = 469
    UNKNOWN_ELEMENT_OF_ENUM = 691


class _Unusable(IntEnum):
    """The table does not fit: no event can be written."""

    NO_SUCH_COLUMN_IN_TABLE = 16
    ILLEGAL_COLUMN = 44
    UNKNOWN_IDENTIFIER = 47
    NOT_IMPLEMENTED = 48
    UNKNOWN_TABLE = 60
    UNKNOWN_FORMAT = 73
    UNKNOWN_DATABASE = 81
    UNKNOWN_SETTING = 115
    THERE_IS_NO_DEFAULT_VALUE = 116
    INCORRECT_DATA = 117  # the table lacks a field
    UNEXPECTED_TABLE_ENGINE = 727


class _Misconfigured(IntEnum):
    """The user is unknown or lacks a right."""

    READONLY = 164
    UNKNOWN_USER = 192
    WRONG_PASSWORD = 193
    REQUIRED_PASSWORD = 194
    IP_ADDRESS_NOT_ALLOWED = 195
    DATABASE_ACCESS_DENIED = 291
    SETTING_CONSTRAINT_VIOLATION = 452
    ACCESS_DENIED = 497
    AUTHENTICATION_FAILED = 516
    USER_EXPIRED = 720


class _NotNow(IntEnum):
    """Retried, like every code that is not listed. Named because an operator may have to act."""

    CANNOT_WRITE_TO_FILE_DESCRIPTOR = 75
    CANNOT_OPEN_FILE = 76
    TIMEOUT_EXCEEDED = 159
    TOO_MANY_SIMULTANEOUS_QUERIES = 202
    MEMORY_LIMIT_EXCEEDED = 241
    TABLE_IS_READ_ONLY = 242
    NOT_ENOUGH_SPACE = 243
    TOO_MANY_PARTS = 252
    QUERY_WAS_CANCELLED = 394


_KINDS: tuple[type[IntEnum], ...] = (_Refused, _Unusable, _Misconfigured, _NotNow)
_KNOWN: dict[int, IntEnum] = {code.value: code for kind in _KINDS for code in kind}

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
    known = _KNOWN.get(code)
    detail = f"ClickHouse error {code}" if known is None else f"ClickHouse error {code} {known.name}"
    match known:
        case _Refused():
            return ValueRefused(detail)
        case _Unusable():
            return SinkUnusable(sink=SINK, detail=detail, cure=_UNUSABLE_CURE)
        case _Misconfigured():
            return SinkMisconfigured(sink=SINK, detail=detail, cure=_RIGHTS_CURE)
        case _:
            return SinkUnavailable(sink=SINK, detail=detail)


def _unanswered(exc: Exception, where: str) -> SinkError:
    """ClickHouse itself did not answer: the network failed, something in between, or the driver."""
    causes = list(_causes(exc))
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


def _causes(exc: Exception) -> Iterator[Exception]:
    """The error and what lies behind it."""
    seen: BaseException | None = exc
    while isinstance(seen, Exception):  # behind a time-out is a CancelledError, which says nothing
        yield seen
        seen = seen.__cause__ or seen.__context__
