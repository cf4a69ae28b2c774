"""One request to an address that is a secret as a whole. `notifier.py` says what is sent, and tries again."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from replicator.contracts.errors import ReplicatorError, network_words
from replicator.contracts.settings import variable
from sinks.http.errors import retry_after_seconds, status_text

TIMEOUT_SECONDS = 10.0
"""For a whole request: chat services answer within one."""
REFUSED = frozenset({400, 413, 422})
"""It is this message that is not taken: the same one again would not be."""
HEADERS = {"user-agent": "engagement-replicator"}


class NotTaken(ReplicatorError):
    """The address did not take it."""

    code = "R105"

    def __init__(self, *, name: str, detail: str, cure: str, retry_after: float = 0.0, refused: bool = False) -> None:
        super().__init__(f"{variable(name)}: {detail}", cure, detail=detail)
        self.retry_after = retry_after
        """Seconds that it asked to be left alone."""
        self.refused = refused
        """Another message may be taken."""


async def ask(name: str, url: SecretStr, body: bytes | None = None) -> str:
    """POST the body as JSON, or GET if there is none, to the setting's address; what it answered. Raises NotTaken.

    Redirects are not followed: they may lead anywhere. The system's proxy and SSL_CERT_FILE are used.
    """
    address, headers = url.get_secret_value(), HEADERS | ({"content-type": "application/json"} if body else {})
    origin = _origin(address)
    try:
        trusted = await asyncio.to_thread(httpx.create_ssl_context)  # 70 ms, in which the stream would stand still
        async with (
            asyncio.timeout(TIMEOUT_SECONDS),
            httpx.AsyncClient(timeout=None, verify=trusted, headers=headers) as client,  # noqa: S113  the one above
            client.stream("POST" if body else "GET", address, content=body) as response,
        ):
            status, after = response.status_code, response.headers.get("retry-after")
    except TimeoutError:
        detail = f"no answer from {origin} within {TIMEOUT_SECONDS:g} s"
        raise NotTaken(name=name, detail=detail, cure=f"Check that {origin} can be reached from here") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as exc:
        cure = f"Check that {origin} can be reached from here"
        raise NotTaken(name=name, detail=_why(exc, origin), cure=cure) from exc
    if httpx.codes.is_success(status):
        return f"{origin} answered {status_text(status)}"
    raise NotTaken(
        name=name,
        detail=f"{origin} answered {status_text(status)}",
        cure=f"Check the address in {variable(name)}",
        retry_after=retry_after_seconds(after, datetime.now(UTC)) or 0.0,
        refused=status in REFUSED,
    )


def _origin(address: str) -> str:
    """Without user, path and query: chat services put the secret there."""
    url = urlsplit(address)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}"


def _why(exc: Exception, origin: str) -> str:
    cause: BaseException | None = exc
    while cause:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the certificate of {origin} is not accepted"
        cause = cause.__cause__ or cause.__context__
    return f"no answer from {origin} ({network_words(exc)})"
