"""Options of the HTTP sink. Messages about a value never repeat it: it may be a secret."""

from __future__ import annotations

import base64
import re
from typing import Annotated, TypeAlias

import httpx
from pydantic import AfterValidator, Field, SecretStr, ValidationInfo, field_validator

from replicator.contracts.settings import CaFile, EmptyIsNone, Settings, http_url, number


def _usable_url(value: SecretStr) -> SecretStr:
    try:
        url = httpx.URL(http_url(value).get_secret_value())
    except httpx.InvalidURL as exc:
        raise ValueError("it is not a URL") from exc
    if re.search(r"[%\s]", url.host):
        raise ValueError("its host or port is impossible")
    return value


def _usable_token(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
        raise ValueError("a header can't carry it")
    return value


def _usable_secret(value: SecretStr) -> SecretStr:
    prefix, _, text = value.get_secret_value().partition("_")
    if prefix != "whsec" or not text:
        raise ValueError("it is not of that form")
    base64.b64decode(text, validate=True)  # says what is wrong; `Webhook` skips what is not base64
    return value


_Token: TypeAlias = Annotated[SecretStr, AfterValidator(_usable_token)]
_Secret: TypeAlias = Annotated[SecretStr, AfterValidator(_usable_secret)]


class HttpSettings(Settings):
    """Where the API is and how it is spoken to."""

    http_url: Annotated[SecretStr, AfterValidator(_usable_url)] = Field(
        SecretStr("http://localhost:8000/events"),
        description="an http:// or https:// URL, with user:password@ where the API wants basic authentication",
    )
    # 140 kB. With 100 an event costs 1 µs more of our CPU and as much of the API's (measured).
    http_batch_size: int = number(500, 1, 10_000, "events a request (a JSON array; with 1 a single JSON object)")
    # Measured: 100,000 events/s where the API answers in 5 ms, 50,000 at 20 ms.
    http_concurrency: int = number(16, 1, 256, "requests in flight at once (1 keeps the order of events)")
    # Four checkpoints' worth at 25,000 events/s; a lane that gets there asks for the next one at once.
    http_max_repeats: int = number(
        20_000, 1, 10_000_000, "the most events (never less than a batch) that the API may see again after a crash"
    )
    # The lower end of what Standard Webhooks recommends; a request that timed out may be seen twice.
    http_timeout_seconds: float = number(
        15.0, 0.01, 3600, "seconds that a request may take as a whole, connecting included"
    )
    http_bearer_token: Annotated[_Token | None, EmptyIsNone] = Field(
        None, description="the token of an Authorization: Bearer header (visible ASCII characters)"
    )
    http_webhook_secret: Annotated[_Secret | None, EmptyIsNone] = Field(
        None, description="whsec_ and base64, the secret that requests are signed with (Standard Webhooks)"
    )
    http_ca_file: CaFile = Field(
        None, description="a PEM file with the certificate authorities to trust instead of the public ones"
    )

    @field_validator("http_bearer_token")
    @classmethod
    def _one_authorization(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        url = info.data.get("http_url")
        if value and url and httpx.URL(url.get_secret_value()).userinfo:
            raise ValueError("REPLICATOR_HTTP_URL carries a user as well, and a request has one Authorization header")
        return value
