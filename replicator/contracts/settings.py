"""Every option of the reader: type, unit in the name, default, reason. Sinks and enrichment keep theirs beside them.

A setting is the environment variable `REPLICATOR_` + the field's name in capitals; a `.env` file in the working
directory is read too, and the environment wins over it. Any setting can also come from a file whose path is in
`NAME_FILE` (Docker and Kubernetes secrets). A field's description says what it takes: it ends up in the error
message and is checked against the README's table by a test.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from replicator.contracts.errors import SettingsError

PREFIX = "REPLICATOR_"

_PLAINLY = {"too_short": "it names none", "string_pattern_mismatch": "it is not of that form"}
"""By pydantic's type of the error, where its own words are about Python."""

T = TypeVar("T", bound="Settings")


class _FileSource(PydanticBaseSettingsSource):
    """`NAME_FILE`: the value is the content of that file, without the newline at its end."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002  pydantic's signature
        """Value of one field, or None; raises SettingsError for an unreadable file and for NAME beside NAME_FILE."""
        name = variable(field_name)
        known = self._environment()
        path = known.get(f"{name}_FILE".lower())
        if not path:
            return None, field_name, False
        if known.get(name.lower()):
            raise SettingsError(name=name, problem=f"{name}_FILE is set too", expected="one of the two")
        try:
            return Path(path).read_text(encoding="utf-8").rstrip("\r\n"), field_name, False
        except (OSError, UnicodeDecodeError) as exc:
            problem = f"the file can't be read ({type(exc).__name__})"
            raise SettingsError(name=f"{name}_FILE", problem=problem, expected="the path of a readable file") from exc

    def _environment(self) -> dict[str, str | None]:
        env = EnvSettingsSource(self.settings_cls, case_sensitive=False).env_vars
        dotenv = DotEnvSettingsSource(self.settings_cls, case_sensitive=False).env_vars
        return {**dotenv, **env}

    def __call__(self) -> dict[str, Any]:
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


class Settings(BaseSettings):
    """Base of every settings class: prefix, `.env`, `NAME_FILE`. Secrets are `SecretStr` and never printed."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=False,
        extra="ignore",
        frozen=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  pydantic's signature; NAME_FILE replaces it
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then NAME_FILE, then the environment, then `.env`."""
        return init_settings, _FileSource(settings_cls), env_settings, dotenv_settings


def variable(field_name: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field_name.upper()


def unknown(settings_classes: Iterable[type[Settings]]) -> list[str]:
    """Variables with our prefix, of the environment or `.env`, that none of these classes takes."""
    fields = [variable(name).lower() for known in settings_classes for name in known.model_fields]
    taken = {*fields, *(f"{name}_file" for name in fields)}
    given = {*EnvSettingsSource(Settings).env_vars, *DotEnvSettingsSource(Settings).env_vars}
    return sorted(
        name.upper() for name in given if name.lower().startswith(PREFIX.lower()) and name.lower() not in taken
    )


def load(settings_class: type[T]) -> T:
    """Read and check all settings of a class. Raises SettingsError that names the first unusable one."""
    try:
        return settings_class()
    except (OSError, UnicodeDecodeError) as exc:  # a NAME_FILE's trouble has its own message
        problem = f"it can't be read ({type(exc).__name__})"
        raise SettingsError(name=".env", problem=problem, expected="lines of NAME=value in UTF-8") from None
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        field_name = str(first["loc"][0])
        expected = settings_class.model_fields[field_name].description or "another value"
        problem = _PLAINLY.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise SettingsError(name=variable(field_name), problem=problem, expected=expected) from None


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _conninfo(value: SecretStr) -> SecretStr:
    try:
        parts = conninfo_to_dict(value.get_secret_value())
    except ProgrammingError:
        raise ValueError("it can't be parsed") from None  # libpq's message would quote it, password and all
    if "://" in value.get_secret_value() and "@" in f"{parts.get('host', '')}{parts.get('dbname', '')}":
        # The password ended too early, and errors would name its rest as a host or database.
        raise ValueError("it has an @ too many; in user and password it is written %40, and / is %2F")
    return value


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
    sinks: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        ("clickhouse", "redis", "http"),
        min_length=1,
        description="one or more of clickhouse, redis, http, separated by commas",
    )
    checkpoint_url: SecretStr = Field(
        SecretStr("sqlite:///checkpoint.db"), description="any SQLAlchemy URL (its driver must be installed)"
    )
    checkpoint_interval_seconds: float = Field(
        0.2,  # one fsync each; also bounds what the HTTP API sees again after a crash
        ge=0.01,
        le=60,
        description="seconds between two checkpoints, 0.01 to 60",
    )
    memory_limit_mb: int = Field(
        64,  # some 150,000 events: a minute of 2,500 events/s while one sink is away
        ge=1,
        le=1_000_000,
        description="megabytes that events waiting for sinks may hold before reading stops",
    )
    dead_letters_max: int = Field(
        100_000,  # 50 MB of ordinary events on disk; an API that refuses everything gets there in minutes
        ge=1,
        le=100_000_000,
        description="the most dead letters of one sink, 1 to 100000000; one that refuses more waits",
    )
    feedback_interval_seconds: float = Field(
        10.0,  # wal_sender_timeout is 60 s by default; a sixth of it survives a few lost ones
        ge=0.1,
        le=60,
        description="seconds between two status messages to PostgreSQL, 0.1 to 60; well under wal_sender_timeout",
    )
    retry_max_seconds: float = Field(
        30.0,  # the cap of the exponential backoff, for sinks and for PostgreSQL
        ge=0.01,
        le=3600,
        description="the longest pause between two tries of a sink or of PostgreSQL, seconds",
    )
    drain_timeout_seconds: float = Field(
        25.0,  # under the 30 s that Kubernetes gives, and what docker-compose.yml gives
        ge=0,
        le=3600,
        description="seconds that writes in flight get to finish after SIGTERM",
    )
    admin_listen: str = Field(
        "127.0.0.1:8080",  # loopback: it has no authentication
        pattern=r"^(|\[[0-9a-fA-F:.]+\]:\d{1,5}|[^:\s]+:\d{1,5})$",
        description="host:port for /healthz, /readyz and /metrics; empty turns them off",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        "info", description="debug, info, warning or error"
    )
    log_format: Literal["text", "json"] = Field("text", description="text or json (one object a line)")
