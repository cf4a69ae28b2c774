"""Settings: where they come from, what is said of an unusable one, and that secrets are never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from replicator.contracts.errors import SettingsError
from replicator.contracts.settings import CoreSettings, fresh, load

SECRET = "postgresql://app:hunter2@localhost/engagement"  # noqa: S105  what must not be shown


pytestmark = pytest.mark.usefixtures("empty_directory")


def refused(name: str) -> str:
    """The message of the error that names this setting."""
    with pytest.raises(SettingsError) as caught:
        load(CoreSettings)
    assert name == caught.value.name
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_environment_wins_over_the_file(empty_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.env` for the defaults of a machine, the environment for this run."""
    (empty_directory / ".env").write_text("REPLICATOR_SLOT=from_file\nREPLICATOR_SINKS=redis\n", encoding="utf-8")
    assert "from_file" == load(CoreSettings).slot
    monkeypatch.setenv("REPLICATOR_SLOT", "from_environment")
    settings = load(CoreSettings)
    assert ("from_environment", ("redis",)) == (settings.slot, settings.sinks)


def test_a_value_from_a_file(empty_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted secret ends with a newline more often than not; spaces are part of it."""
    (empty_directory / "dsn").write_text(f"{SECRET}\r\n", encoding="utf-8")
    monkeypatch.setenv("REPLICATOR_POSTGRES_DSN_FILE", str(empty_directory / "dsn"))
    assert SECRET == load(CoreSettings).postgres_dsn.get_secret_value()


def test_the_name_of_a_file_may_stand_in_the_env_file(empty_directory: Path) -> None:
    """As any other setting."""
    (empty_directory / "slot").write_text("from_a_file", encoding="utf-8")
    (empty_directory / ".env").write_text("REPLICATOR_SLOT_FILE=slot\n", encoding="utf-8")
    assert "from_a_file" == load(CoreSettings).slot


def test_a_value_and_a_file_are_one_too_many(empty_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one is meant can't be known."""
    (empty_directory / "slot").write_text("a", encoding="utf-8")
    monkeypatch.setenv("REPLICATOR_SLOT_FILE", str(empty_directory / "slot"))
    monkeypatch.setenv("REPLICATOR_SLOT", "b")
    assert "REPLICATOR_SLOT_FILE is set too" in refused("REPLICATOR_SLOT")


@pytest.mark.parametrize("path", ["missing", ".", "binary", "/dev/zero"])
def test_a_file_that_can_not_be_read_is_named(
    path: str, empty_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not there, a directory, no text, a device without an end."""
    (empty_directory / "binary").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setenv("REPLICATOR_SLOT_FILE", str(empty_directory / path))
    assert "can't be read" in refused("REPLICATOR_SLOT_FILE")


def test_an_env_file_that_can_not_be_read_is_named(empty_directory: Path) -> None:
    """No text in UTF-8; not a traceback."""
    (empty_directory / ".env").write_bytes(b"REPLICATOR_SLOT=\xff\xfe\n")
    assert "can't be read" in refused(".env")


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("POSTGRES_DSN", "postgresql://app:hunter2@[half", "postgresql:// URL"),
        ("POSTGRES_DSN", " ", "it is empty. It takes a postgresql:// URL"),
        ("SLOT", "Engagement-Slot", "lower-case letters"),
        ("SLOT", "", "lower-case letters"),
        (
            "SINKS",
            " , ",
            "it names none. It takes one or more of clickhouse, redis, http, and sinks of",
        ),
        ("CHECKPOINT_INTERVAL_SECONDS", "0", "0.01 to 60"),
        ("MEMORY_LIMIT_MB", "much", "it is not a whole number. It takes megabytes"),
        ("FAILOVER_SLOT", "maybe", "it is neither true nor false. It takes true or false"),
        (
            "FEEDBACK_INTERVAL_SECONDS",
            "61",
            "it is out of range. It takes seconds between two status messages to PostgreSQL, 0.1 to 60",
        ),
        ("RETRY_MAX_SECONDS", "-1", "seconds"),
        ("DRAIN_TIMEOUT_SECONDS", "nan", "seconds"),
        ("ADMIN_LISTEN", "8080", "its form is wrong. It takes host:port"),
        ("LOG_LEVEL", "loud", "debug, info, warning or error"),
        ("LOG_FORMAT", "xml", "text or json"),
    ],
)
def test_an_unusable_value_is_named_with_what_it_takes(
    name: str, value: str, takes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting, what is wrong and what would be right; a secret is not quoted."""
    monkeypatch.setenv(f"REPLICATOR_{name}", value)
    message = refused(f"REPLICATOR_{name}")
    assert takes in message
    assert "hunter2" not in message


@pytest.mark.parametrize("listen", ["", "127.0.0.1:8080", "localhost:1", "[::1]:8080", "0.0.0.0:65535"])
def test_addresses_to_listen_on(listen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """IPv4, a name, IPv6 in brackets; empty turns the endpoints off."""
    monkeypatch.setenv("REPLICATOR_ADMIN_LISTEN", listen)
    assert listen == load(CoreSettings).admin_listen


def test_sinks_are_a_list_with_room_for_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As people write lists."""
    monkeypatch.setenv("REPLICATOR_SINKS", "redis, http,")
    assert ("redis", "http") == load(CoreSettings).sinks


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a log line nor in a traceback."""
    monkeypatch.setenv("REPLICATOR_POSTGRES_DSN", SECRET)
    monkeypatch.setenv("REPLICATOR_CHECKPOINT_URL", SECRET)
    settings = load(CoreSettings)
    shown = f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"
    assert "hunter2" not in shown


def test_levels_are_levels_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """As other programs take them."""
    monkeypatch.setenv("REPLICATOR_LOG_LEVEL", "INFO")
    assert "info" == load(CoreSettings).log_level


def test_a_secret_in_a_file_is_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only that: a file that is being replaced, and what came from elsewhere, stays as it was."""
    file = tmp_path / "dsn"
    file.write_text("host=before")
    monkeypatch.setenv("REPLICATOR_POSTGRES_DSN_FILE", str(file))
    settings = load(CoreSettings)
    monkeypatch.setenv("REPLICATOR_SLOT", "another")
    assert fresh(settings) is settings
    file.write_text("host=after")
    found = fresh(settings)
    assert ("host=after", settings.slot) == (found.postgres_dsn.get_secret_value(), found.slot)
    for unusable in ("postgresql://half@of@it", "", None):
        if unusable is not None:
            file.write_text(unusable)
        else:
            file.unlink()
        assert fresh(found) is found


def test_without_files_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is rotated."""
    settings = load(CoreSettings)
    monkeypatch.setenv("REPLICATOR_POSTGRES_DSN", "host=another")
    assert fresh(settings) is settings
