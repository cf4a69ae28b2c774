"""Every option of the reader: type, unit in the name, default, reason. Sinks and enrichment keep theirs beside them.

A setting is the environment variable `REPLICATOR_` + the field's name in capitals. A `.env` file in the working
directory is read too, and the environment wins over it. Any setting can also come from a file whose path is in
`NAME_FILE` (Docker and Kubernetes secrets). A field's description says what it takes, for error messages.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

from dotenv import dotenv_values
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr, ValidationError

from replicator.contracts.errors import SettingsError

PREFIX = "REPLICATOR_"
_PLAINLY = {"too_short": "it names none", "string_pattern_mismatch": "it is not of that form"}
"""By pydantic's type of the error, where its own words are about Python."""

T = TypeVar("T", bound="Settings")


class Given(NamedTuple):
    """A value that the operator set."""

    text: str
    source: str
    """`environment`, `.env`, or `file` and its path."""


class Settings(BaseModel):
    """Base of every settings class; `load` makes one. Secrets are `SecretStr` and never printed."""

    model_config = {"frozen": True, "validate_default": True}


def variable(field_name: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field_name.upper()


def variables() -> dict[str, Given]:
    """The environment and `.env`, by name in capitals. Raises SettingsError when `.env` can't be read."""
    try:
        dotenv = dotenv_values(".env")
    except (OSError, UnicodeDecodeError) as exc:
        problem = f"it can't be read ({type(exc).__name__})"
        raise SettingsError(name=".env", problem=problem, expected="lines of NAME=value in UTF-8") from None
    found = {name.upper(): Given(text, ".env") for name, text in dotenv.items() if text is not None}
    return found | {name.upper(): Given(text, "environment") for name, text in os.environ.items()}


def given(field_name: str) -> Given | None:
    """The value of a field; None: nobody set it. Raises SettingsError for an unreadable file and a double value."""
    known, name = variables(), variable(field_name)
    path = known.get(f"{name}_FILE", Given("", "")).text
    if not path:
        return known.get(name)
    if name in known and known[name].text:
        raise SettingsError(name=name, problem=f"{name}_FILE is set too", expected="one of the two")
    try:
        return Given(Path(path).read_text(encoding="utf-8").rstrip("\r\n"), f"file {path}")
    except (OSError, UnicodeDecodeError) as exc:
        problem = f"the file can't be read ({type(exc).__name__})"
        raise SettingsError(name=f"{name}_FILE", problem=problem, expected="the path of a readable file") from exc


def load(settings_class: type[T], **known: Any) -> T:
    """Read and check all settings of a class, except `known` ones. Raises SettingsError for the first unusable one."""
    fields = settings_class.model_fields
    found = {name: value.text for name in fields if name not in known and (value := given(name)) is not None}
    try:
        return settings_class(**found, **known)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        field_name = str(first["loc"][0])
        expected = fields[field_name].description or "another value"
        problem = _PLAINLY.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise SettingsError(name=variable(field_name), problem=problem, expected=expected) from None


def state_directory() -> Path:
    """Where state is kept: systemd's directory for this service, else the user's."""
    if of_service := os.environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(of_service)
    return Path(os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser(), "engagement-replicator")


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _conninfo(value: SecretStr) -> SecretStr:
    try:
        parts = conninfo_to_dict(value.get_secret_value())
    except ProgrammingError:
        raise ValueError("it can't be parsed") from None  # libpq's message would quote it, password and all
    if "://" in value.get_secret_value() and "@" in f"{parts.get('host', '')}{parts.get('dbname', '')}":
        # The password ended too early, and errors would name its rest as a host or database.
        raise ValueError("it has an @ too many; in user and password it is written %40, and / is %2F")
    return value


def _certificates(path: Path) -> Path:
    try:
        ssl.create_default_context(cafile=path)
    except OSError as exc:  # an SSLError too
        raise ValueError(f"no certificate can be read from it ({type(exc).__name__})") from None
    return path


EmptyIsNone = BeforeValidator(lambda value: None if value == "" else value)
"""Compose files pass on what may be unset as `${NAME:-}`."""
CaFile: TypeAlias = Annotated[Annotated[Path, AfterValidator(_certificates)] | None, EmptyIsNone]
"""A PEM file with certificate authorities, or None."""


def number(default: float, low: float, high: float, what: str) -> Any:
    """A field that holds a number between two bounds, both included."""
    return Field(default, ge=low, le=high, description=f"{what}, {low} to {high}")


class CoreSettings(Settings):
    """Options of the reader itself."""

    postgres_dsn: Annotated[SecretStr, AfterValidator(_conninfo)] = Field(
        SecretStr("postgresql://app:app@localhost:5432/engagement"),
        description="a postgresql:// URL or libpq keywords (sslmode and the like included)",
    )
    slot: str = Field(
        "engagement_slot",
        pattern=r"^[a-z0-9_]{1,63}$",
        description="a replication slot's name: 1 to 63 lower-case letters, digits and underscores",
    )
    sinks: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        ("clickhouse", "redis", "http"),
        min_length=1,
        description="one or more of clickhouse, redis, http, and sinks of installed packages, separated by commas",
    )
    checkpoint_url: SecretStr = Field(
        default_factory=lambda: SecretStr(f"sqlite:///{state_directory() / 'checkpoint.db'}"),
        description="any SQLAlchemy URL (its driver must be installed)",
    )
    # One fsync each. It also bounds what the HTTP API sees again after a crash.
    checkpoint_interval_seconds: float = number(0.2, 0.01, 60, "seconds between two checkpoints")
    # Some 150,000 events: a minute of 2,500 events/s while one sink is away. Beyond it reading stops.
    memory_limit_mb: int = number(64, 1, 1_000_000, "megabytes that events waiting for sinks may hold")
    # 50 MB of ordinary events on disk. An API that refuses everything gets there in minutes; then the sink waits.
    dead_letters_max: int = number(100_000, 1, 100_000_000, "the most dead letters of one sink")
    # wal_sender_timeout is 60 s by default; a sixth of it survives a few lost messages.
    feedback_interval_seconds: float = number(10.0, 0.1, 60, "seconds between two status messages to PostgreSQL")
    # The cap of the exponential backoff.
    retry_max_seconds: float = number(30.0, 0.01, 3600, "seconds between two tries of a sink or of PostgreSQL, at most")
    # Under the 30 s that Kubernetes gives, and what docker-compose.yml gives.
    drain_timeout_seconds: float = number(25.0, 0, 3600, "seconds that writes in flight get to finish after SIGTERM")
    admin_listen: str = Field(
        "127.0.0.1:8080",  # loopback: it has no authentication
        pattern=r"^(|\[[0-9a-fA-F:.]+\]:\d{1,5}|[^:\s]+:\d{1,5})$",
        description="host:port for /healthz, /readyz and /metrics; empty turns them off",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(str.lower)] = Field(
        "info", description="debug, info, warning or error"
    )
    log_format: Literal["text", "json"] = Field("text", description="text or json (one object a line)")
