"""What an error of ClickHouse, or of what stands before it, means for the sink.

ClickHouse has some 700 error codes. Those that say more than "not now" are named here. Every other code, and every
failure of the network, is tried again until it succeeds, and each failure is reported. Messages keep the code and its
name and drop the server's text, because that text quotes the row.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import NamedTuple

import aiohttp

from replicator.contracts.errors import (
    SinkEmptied,
    SinkError,
    SinkMisconfigured,
    SinkUnavailable,
    command,
    network_words,
)

CODE = re.compile(rb"Code: (\d{1,9})\. DB::")
"""How ClickHouse's text of an error begins, or stands in a body that was begun before the error."""
_NAME = re.compile(rb"\(([A-Z][A-Z0-9_]{2,63})\)(?: \(version [^()]*(?:\([^()]*\))?\))?\s*$")
"""How it ends. Only there: a word of the row may look like a name."""

# fmt: off
REFUSED = {  # a value can't be stored
    6: "CANNOT_PARSE_TEXT", 25: "CANNOT_PARSE_ESCAPE_SEQUENCE", 26: "CANNOT_PARSE_QUOTED_STRING",
    27: "CANNOT_PARSE_INPUT_ASSERTION_FAILED", 38: "CANNOT_PARSE_DATE", 41: "CANNOT_PARSE_DATETIME",
    53: "TYPE_MISMATCH", 69: "ARGUMENT_OUT_OF_BOUND", 70: "CANNOT_CONVERT_TYPE", 72: "CANNOT_PARSE_NUMBER",
    131: "TOO_LARGE_STRING_SIZE", 321: "VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE",
    349: "CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN", 407: "DECIMAL_OVERFLOW", 469: "VIOLATED_CONSTRAINT",
    691: "UNKNOWN_ELEMENT_OF_ENUM",
}
NOT_FITTING = {  # something is missing, or of another shape; 117: the table lacks a field
    16: "NO_SUCH_COLUMN_IN_TABLE", 44: "ILLEGAL_COLUMN", 47: "UNKNOWN_IDENTIFIER", 48: "NOT_IMPLEMENTED",
    60: "UNKNOWN_TABLE", 62: "SYNTAX_ERROR", 73: "UNKNOWN_FORMAT", 81: "UNKNOWN_DATABASE", 115: "UNKNOWN_SETTING",
    116: "THERE_IS_NO_DEFAULT_VALUE", 117: "INCORRECT_DATA", 727: "UNEXPECTED_TABLE_ENGINE",
}
TURNED_AWAY = {  # the user is unknown or lacks a right
    164: "READONLY", 192: "UNKNOWN_USER", 193: "WRONG_PASSWORD", 194: "REQUIRED_PASSWORD",
    195: "IP_ADDRESS_NOT_ALLOWED", 291: "DATABASE_ACCESS_DENIED", 452: "SETTING_CONSTRAINT_VIOLATION",
    497: "ACCESS_DENIED", 516: "AUTHENTICATION_FAILED", 720: "USER_EXPIRED",
}
TOO_LARGE = {  # for the memory or a limit of the server
    158: "TOO_MANY_ROWS", 173: "CANNOT_ALLOCATE_MEMORY", 229: "QUERY_IS_TOO_LARGE", 241: "MEMORY_LIMIT_EXCEEDED",
    307: "TOO_MANY_BYTES", 396: "TOO_MANY_ROWS_OR_BYTES",
}
LIMITED = {  # by what the user's profile or quota sets: until somebody raises that
    158: "max_rows_to_read", 159: "max_execution_time", 160: "min_execution_speed", 161: "max_columns_to_read",
    165: "max_temporary_columns", 167: "max_ast_depth", 168: "max_ast_elements",
    191: "max_rows_in_set", 201: "its quota", 277: "force_primary_key, force_index_by_date",
    307: "max_bytes_to_read", 396: "max_result_rows, max_result_bytes",
}
# fmt: on
UNKNOWN_SETTING = 115
_NAMES = REFUSED | NOT_FITTING | TURNED_AWAY | TOO_LARGE  # for an answer whose text was lost on the way

_URL_CURE = "Check that REPLICATOR_CLICKHOUSE_URL names the right server, user and password"
_RIGHTS_CURE = f"{_URL_CURE}, and that the user may INSERT into the table, SELECT from it and change settings"
_LIMIT_CURE = (
    "Raise, or remove, what limits the replicator's user in ClickHouse ({limit}; `SELECT name, value FROM"
    " system.settings WHERE changed` shows what its profile sets)"
)
_VERSION_CURE = "Upgrade ClickHouse to 23.10 or newer: this one does not know a setting that it gets"
_FITTING_CURE = f"Compare the table, its defaults included, with what {command('sql clickhouse')} prints"
_FRONT_CURE = (
    "Check what is between the replicator and ClickHouse (a proxy, a load balancer, a maintenance page), and that"
    " REPLICATOR_CLICKHOUSE_URL leads to ClickHouse's HTTP port"
)
_REDIRECT_CURE = "Set REPLICATOR_CLICKHOUSE_URL to the address of ClickHouse itself: redirects are not followed"
_CA_CURE = (
    "Check that the certificate is in date and names the host in REPLICATOR_CLICKHOUSE_URL, and that "
    "REPLICATOR_CLICKHOUSE_CA_FILE holds the authority that signed it, if that is a private one"
)
_TLS_CURE = "Write http:// in REPLICATOR_CLICKHOUSE_URL, or use the port that speaks TLS (8443 by default)"
_ENGINE_CURE = "Check REPLICATOR_CLICKHOUSE_URL, and who holds its directory"

_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}
_LATER_STATUSES = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}


class Unanswered(SinkUnavailable):
    """It was sent, perhaps, and nobody answered to the end."""


class Failed(Exception):
    """ClickHouse, or what stands before it, answers with an error. `str` is fit for messages: nothing of the row."""

    def __init__(self, detail: str, *, code: int = 0, text: str = "", too_large: bool = False) -> None:
        super().__init__(detail)
        self.code = code
        """ClickHouse's; 0: it is not ClickHouse's error."""
        self.text = text or detail
        """What was answered; it may quote the row."""
        self.too_large = too_large
        """For certain. An error of ClickHouse's may also arise because a server is short of memory (`TOO_LARGE`)."""
        self.in_view = "while pushing to view" in text
        """It arose in a materialized view of the table, if the table has any."""


def failed(code: int, body: bytes) -> Failed:
    """The error of ClickHouse's that is in an answer."""
    name = _NAME.search(body[-200:])
    detail = f"ClickHouse error {code} {name[1].decode() if name else _NAMES.get(code, '')}".rstrip()
    return Failed(detail, code=code, text=body.decode(errors="replace"))


class Errors(NamedTuple):
    """What goes wrong with one server, as the errors of one sink."""

    sink: str
    server: str
    """Without secrets."""

    def answered(self, failure: Failed) -> SinkError:
        """The error as it is for any statement; `sink.py` knows more about an insert."""
        if failure.code in TURNED_AWAY:
            return SinkMisconfigured(sink=self.sink, detail=str(failure), cure=_RIGHTS_CURE)
        if failure.code == UNKNOWN_SETTING:
            return SinkMisconfigured(sink=self.sink, detail=str(failure), cure=_VERSION_CURE)
        if failure.code in NOT_FITTING:
            return SinkMisconfigured(sink=self.sink, detail=str(failure), cure=_FITTING_CURE)
        if failure.code in LIMITED:
            cure = _LIMIT_CURE.format(limit=LIMITED[failure.code])
            return SinkMisconfigured(sink=self.sink, detail=str(failure), cure=cure)
        return SinkUnavailable(sink=self.sink, detail=str(failure))

    def not_clickhouse(self, why: str) -> SinkMisconfigured:
        """Something answers with success and not as ClickHouse does: nothing was written."""
        detail = f"{self.server} answers, but not as ClickHouse does: {why}"
        return SinkMisconfigured(sink=self.sink, detail=detail, cure=_FRONT_CURE)

    def not_from_clickhouse(self, status: int) -> SinkError | Failed:
        """The status comes from a proxy, or from something that is not ClickHouse."""
        detail = f"{self.server} answers with HTTP status {status}"
        if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return Failed(detail, too_large=True)
        if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
            return SinkMisconfigured(sink=self.sink, detail=detail, cure=_REDIRECT_CURE)
        if status in _LATER_STATUSES or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return SinkUnavailable(sink=self.sink, detail=detail)
        return SinkMisconfigured(sink=self.sink, detail=detail, cure=_FRONT_CURE)

    def unreadable_ca(self, exc: OSError) -> SinkMisconfigured:
        """The file was in order when the program started."""
        detail = f"REPLICATOR_CLICKHOUSE_CA_FILE can't be read ({type(exc).__name__})"
        return SinkMisconfigured(sink=self.sink, detail=detail, cure=_CA_CURE)

    def emptied(self, table: str) -> SinkEmptied:
        """What was written is gone."""
        return SinkEmptied(
            sink=self.sink,
            detail=f"ClickHouse table {table} was emptied, or another one has taken its place: its events are missing."
            " Meanwhile new ones are written",
            cure=f"{command('init')} prints the backfill command that restores the others; add --sinks {self.sink} to"
            f" it. If they need not come back, stop the replicator, run {command('init --accept-gap')}, and start it"
            " again",
        )

    def unopened(self, directory: str, exc: Exception) -> SinkMisconfigured:
        """The embedded engine does not begin."""
        detail = f"the embedded engine can't open {directory}: {exc}"
        return SinkMisconfigured(sink=self.sink, detail=detail, cure=_ENGINE_CURE)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise failures of the network as a SinkError."""
        try:
            yield
        except (aiohttp.ClientError, TimeoutError, UnicodeError) as exc:  # UnicodeError: an impossible host name
            raise self._unanswered(exc) from exc

    def _unanswered(self, exc: Exception) -> SinkError:
        causes: list[Exception] = []
        cause: BaseException | None = exc
        while isinstance(cause, Exception):  # under a time-out is a CancelledError, which says nothing
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
            detail = f"the certificate of {self.server} is not trusted"
            return SinkMisconfigured(sink=self.sink, detail=detail, cure=_CA_CURE)
        if any(getattr(cause, "reason", None) in _NO_TLS for cause in causes):  # an ssl.SSLError; aiohttp's has none
            return SinkMisconfigured(sink=self.sink, detail=f"{self.server} does not speak TLS", cure=_TLS_CURE)
        if isinstance(exc, aiohttp.ClientResponseError):
            return self.not_clickhouse("the answer is not HTTP")
        error = SinkUnavailable if isinstance(exc, aiohttp.ClientConnectorError) else Unanswered
        return error(sink=self.sink, detail=f"no answer from {self.server} ({network_words(exc)})")
