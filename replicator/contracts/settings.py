"""Every option of the reader: type, unit in the name, default, reason. Sinks and enrichment keep theirs beside them.

A setting is the environment variable `REPLICATOR_` + the field's name in capitals. A `.env` file in the working
directory is read too, and the environment wins over it. Any setting can also come from a file whose path is in
`NAME_FILE` (Docker and Kubernetes secrets). A field's description says what it takes, for error messages.
"""

from __future__ import annotations

import os
import re
import shlex
import ssl
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar
from urllib.parse import urlsplit

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
)

from replicator.contracts.errors import SettingsError
from replicator.contracts.events import Finding

PREFIX = "REPLICATOR_"
_SECRET_FILE = f"{PREFIX}.+(?<!_CA)_FILE"
_FILE = "file "
FILE_CHARACTERS_MAX = 65_536
"""Of a file with one setting. A device, or a wrong path, may have no end."""
_DOTENV_TAKES = "lines of NAME=value in UTF-8"
_PLAINLY = {
    "missing": "it is not set",
    "too_short": "it names none",
    "string_too_short": "a name is empty",
    "string_pattern_mismatch": "its form is wrong",
    "int_parsing": "it is not a whole number",
    "int_parsing_size": "it is out of range",
    "float_parsing": "it is not a number",
    "bool_parsing": "it is neither true nor false",
    "literal_error": "there is no such value",
    "greater_than_equal": "it is out of range",
    "less_than_equal": "it is out of range",
}
"""By pydantic's type of the error, where its own words are about Python."""

DECISIVE = ("columns", "redis_prefix", "stream")
"""Where two programs differ in these, what the one writes the other does not find. An address may have two names."""

T = TypeVar("T", bound="Settings")


class Given(NamedTuple):
    """A value that the operator set."""

    text: str
    source: str
    """`environment`, `.env`, or `file` and its path."""


class Settings(BaseModel):
    """Base of every settings class; `load` makes one. Secrets are `SecretStr` and never printed."""

    model_config = {"frozen": True, "validate_default": True}
    _of_files: frozenset[str] = PrivateAttr(frozenset())

    @property
    def of_files(self) -> frozenset[str]:
        """The fields that came from NAME_FILE: what else was given to `load`, or to the class, stays as it is."""
        return self._of_files

    def came_from_files(self, names: Iterable[str]) -> None:
        """`load` says it of what it has made."""
        self._of_files = frozenset(names)


def variable(field_name: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field_name.upper()


def variables() -> dict[str, Given]:
    """The environment and `.env`, by name in capitals. Raises SettingsError when `.env` can't be read."""
    try:
        with Path(".env").open(encoding="utf-8") as lines:
            bad = [*_bad_lines(lines)]
        dotenv = {} if bad else dotenv_values(".env")
    except (FileNotFoundError, IsADirectoryError):
        bad, dotenv = [], {}
    except (OSError, UnicodeDecodeError) as exc:
        problem = f"it can't be read ({type(exc).__name__})"
        raise SettingsError(name=".env", problem=problem, expected=_DOTENV_TAKES) from None
    if bad:
        raise SettingsError(name=".env", problem=f"line {bad[0]} can't be parsed", expected=_DOTENV_TAKES)
    found = {name.upper(): Given(text, ".env") for name, text in dotenv.items() if text is not None}
    return found | {name.upper(): Given(text, "environment") for name, text in os.environ.items()}


def _bad_lines(lines: IO[str]) -> Iterator[int]:
    """The numbers of those that `dotenv_values` skips: what they set would be missing without a word."""
    for binding in parse_stream(lines):
        text, key = binding.original.string, binding.key or ""
        if binding.error or (binding.value is None and key.upper().startswith(PREFIX)):
            yield binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")


def given(field_name: str) -> Given | None:
    """The value of a field; None: nobody set it. Raises SettingsError for an unreadable file and a double value."""
    known, name = variables(), variable(field_name)
    path = known.get(f"{name}_FILE", Given("", "")).text
    if not path:
        return known.get(name)
    if name in known and known[name].text:
        raise SettingsError(name=name, problem=f"{name}_FILE is set too", expected="one of the two")
    takes = "the path of a readable file"
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(FILE_CHARACTERS_MAX + 1)
    except (OSError, UnicodeDecodeError) as exc:
        problem = f"the file can't be read ({type(exc).__name__})"
        raise SettingsError(name=f"{name}_FILE", problem=problem, expected=takes) from exc
    if len(text) > FILE_CHARACTERS_MAX:
        problem = f"the file can't be read: it is longer than {FILE_CHARACTERS_MAX} characters"
        raise SettingsError(name=f"{name}_FILE", problem=problem, expected=takes)
    return Given(text.rstrip("\r\n"), f"{_FILE}{path}")


def decisive(**known: Any) -> dict[str, str]:
    """The settings that decide what data is written and are the same wherever a command runs, as they are now."""
    found = {name: given(name) for name in DECISIVE if name not in known}
    values = known | {name: value.text if value else "" for name, value in found.items()}
    return {variable(name): ",".join(sorted(split(str(values[name])))) for name in DECISIVE}


def load(settings_class: type[T], **known: Any) -> T:
    """Read and check all settings of a class; `known` ones are not read. Raises SettingsError for the first mistake.

    What the class has no field for is another class's.
    """
    made, mistakes = examine(settings_class, **known)
    if made is None or mistakes:
        raise mistakes[0]
    return made


def examine(settings_class: type[T], **known: Any) -> tuple[T | None, list[SettingsError]]:
    """As `load`, with everything that is wrong. A setting whose file can't be read is checked at its default."""
    values, of_files, mistakes, made = dict[str, Any](), list[str](), list[SettingsError](), None
    for name in settings_class.model_fields:
        try:
            if name in known:
                values[name] = known[name]
            elif value := given(name):
                values[name] = value.text
                of_files += [name] if value.source.startswith(_FILE) else []
        except SettingsError as error:
            mistakes.append(error)
    try:
        made = settings_class(**values)
        made.came_from_files(of_files)
    except ValidationError as exc:
        found = exc.errors(include_url=False, include_input=False, include_context=False)
        mistakes += [_mistake(settings_class, error["loc"], error["type"], error["msg"]) for error in found]
    except Exception as exc:  # noqa: BLE001  of another package's sink; its own words may hold a secret
        problem = f"their validation failed ({type(exc).__name__})"
        mistakes.append(SettingsError(name=settings_class.__name__, problem=problem, expected="a corrected package"))
    return made, mistakes


def _mistake(settings_class: type[Settings], at: tuple[int | str, ...], kind: str, words: str) -> SettingsError:
    problem = _PLAINLY.get(kind, words.removeprefix("Value error, "))
    if not at:  # of several fields together
        return SettingsError(name=settings_class.__name__, problem=problem, expected="settings that go together")
    field_name = str(at[0])
    expected = settings_class.model_fields[field_name].description or "another value"
    return SettingsError(name=variable(field_name), problem=problem, expected=expected)


def secret_files() -> list[Path]:
    """The files that hold settings: `.env`, and those that NAME_FILE names."""
    named = [Path(value.text) for name, value in variables().items() if re.fullmatch(_SECRET_FILE, name)]
    return [Path(".env"), *named]


def open_to_all(paths: Iterable[Path]) -> list[Finding]:
    """Advice for those of our files and directories that every user of this machine can read."""
    found = [str(path) for path in paths if _open_to_all(path)]
    cure = f"chmod o= {shlex.join(found)}"
    return [Finding(True, f"every user of this machine can read {', '.join(found)}", cure)] if found else []


def _open_to_all(path: Path) -> bool:
    try:
        found, ways = path.stat(), [parent.stat().st_mode for parent in path.absolute().parents]
        ours = found.st_uid == os.geteuid()  # a mounted secret is not, and can't be changed
        return ours and bool(found.st_mode & stat.S_IROTH) and all(mode & stat.S_IXOTH for mode in ways)
    except OSError:  # it is not there, or not ours to see
        return False


def fresh(settings: T) -> T:
    """The settings with what their NAME_FILE files hold now: secrets are rotated in place.

    The same object if nothing has changed, or if a file can't be used at the moment: it is being replaced.
    """
    files = settings.of_files
    values = {name: getattr(settings, name) for name in type(settings).model_fields if name not in files}
    try:
        found = load(type(settings), **values) if files else settings
    except SettingsError:
        return settings
    return found if found.of_files == files and found != settings else settings


def state_directory() -> Path:
    """Where state is kept: systemd's directory for this service, else the user's."""
    if of_service := os.environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(of_service)
    # Never a relative one (XDG's specification: ignore it). A user without a home keeps its `~`, so is relative too.
    places = (os.environ.get("XDG_STATE_HOME", ""), os.path.expanduser("~/.local/state"), "/var/lib")  # noqa: PTH111
    return Path(next(place for place in places if place.startswith("/")), "engagement-replicator")


def split(text: str) -> tuple[str, ...]:
    """A list as it is written in a setting."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


LISTED = BeforeValidator(lambda value: split(value) if isinstance(value, str) else value)
"""A list may come as that, or as a tuple."""


def _conninfo(value: SecretStr) -> SecretStr:
    try:
        parts = conninfo_to_dict(value.get_secret_value())
    except ProgrammingError:
        raise ValueError("it can't be parsed") from None  # libpq's message would quote it, password and all
    if not parts:
        raise ValueError("it is empty")  # libpq would connect to wherever it does by default
    if "://" in value.get_secret_value() and "@" in f"{parts.get('host', '')}{parts.get('dbname', '')}":
        # The password ended too early, and errors would name its rest as a host or database.
        raise ValueError("it has an @ too many; in user and password write it as %40, and / as %2F")
    return value


def unbroken(value: SecretStr) -> SecretStr:
    """A URL without an @ behind its host: there a password has ended too early, and errors would name parts of it."""
    try:
        url = urlsplit(value.get_secret_value())
    except ValueError:
        return value  # whoever reads it says what is wrong
    if "@" in f"{url.path}{url.fragment}":
        raise ValueError("it has an @ behind its host; in user and password write / as %2F, in a path @ as %40")
    return value


def http_url(value: SecretStr) -> SecretStr:
    """It, if it is an address of that kind. Raises ValueError, which does not quote it."""
    try:
        url = urlsplit(unbroken(value).get_secret_value())
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError as exc:
        raise ValueError("its host or port is impossible" if "@" not in str(exc) else str(exc)) from None
    if not usable:
        raise ValueError("it is not an http:// or https:// URL with a host")
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
PostgresDsn: TypeAlias = Annotated[SecretStr, AfterValidator(_conninfo)]
"""A postgresql:// URL or libpq keywords."""
HttpUrl: TypeAlias = Annotated[Annotated[SecretStr, AfterValidator(http_url)] | None, EmptyIsNone]
"""An address that is a secret as a whole, as those of chat services are, or None."""


def number(default: float, low: float, high: float, what: str) -> Any:
    """A field that holds a number between two bounds, both included."""
    return Field(default, ge=low, le=high, description=f"{what}, {low} to {high}")


class CoreSettings(Settings):
    """Options of the reader itself."""

    postgres_dsn: PostgresDsn = Field(
        SecretStr("postgresql://app:app@localhost:5432/engagement"),
        description="a postgresql:// URL or libpq keywords (sslmode and the like included)",
    )
    slot: str = Field(
        "engagement_slot",
        pattern=r"^[a-z0-9_]{1,63}$",
        description="a replication slot's name: 1 to 63 lower-case letters, digits and underscores",
    )
    # Off where a standby that is away should not hold up the stream (PostgreSQL's synchronized_standby_slots).
    failover_slot: bool = Field(
        True, description="true or false: on PostgreSQL 17 and later, standbys keep a copy of the slot"
    )
    sinks: Annotated[tuple[str, ...], LISTED] = Field(
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
    # PostgreSQL's memory, not ours. Measured with 256 on 500,000 rows in one transaction: its CPU a row 6.3 → 4.8 µs.
    decoding_memory_mb: Annotated[Annotated[int, Field(ge=1, le=1_000_000)] | None, EmptyIsNone] = Field(
        None, description="megabytes of PostgreSQL's memory for decoding, 1 to 1000000; empty leaves it to PostgreSQL"
    )
    # 50 MB of ordinary events on disk. An API that refuses everything gets there in minutes; then the sink waits.
    dead_letters_max: int = number(100_000, 1, 100_000_000, "the most dead letters of one sink")
    # wal_sender_timeout is 60 s by default; a sixth of it survives a few lost messages.
    feedback_interval_seconds: float = number(10.0, 0.1, 60, "seconds between two status messages to PostgreSQL")
    # The cap of the exponential backoff.
    retry_max_seconds: float = number(30.0, 0.01, 3600, "seconds between two tries of a sink or of PostgreSQL, at most")
    # Under the 45 s that the unit, the manifests and the compose file give.
    drain_timeout_seconds: float = number(25.0, 0, 3600, "seconds that writes in flight get to finish after SIGTERM")
    admin_listen: str = Field(
        "127.0.0.1:8080",  # loopback: it has no authentication
        pattern=r"^(|\[[0-9a-fA-F:.]+\]:\d{1,5}|[^:\s]+:\d{1,5})$",
        description="host:port for /healthz, /readyz and /metrics; empty turns them off",
    )

    notify_url: HttpUrl = Field(
        None, description="an http:// or https:// URL that takes JSON by POST, such as an incoming webhook of Slack"
    )
    heartbeat_url: HttpUrl = Field(
        None, description="an http:// or https:// URL of a service that tells you when it is no longer asked"
    )

    @field_validator("admin_listen")
    @classmethod
    def _possible(cls, listen: str) -> str:
        host, _, port = listen.rpartition(":")
        try:
            host.encode("idna")
        except UnicodeError:
            raise ValueError("its host is impossible") from None
        if listen and int(port) > 65_535:  # noqa: PLR2004  the last port
            raise ValueError("its port is impossible")
        return listen

    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(str.lower)] = Field(
        "info", description="debug, info, warning or error"
    )
    log_format: Annotated[Literal["text", "json"], BeforeValidator(str.lower)] = Field(
        "text", description="text or json (one object a line)"
    )
