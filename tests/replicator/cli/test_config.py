"""`config show` and `config check`: every setting, every mistake, no secret, no server; and the default checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from replicator.app import App
from replicator.app.environment import all_settings, masked, unknown_settings
from replicator.cli.main import main
from replicator.contracts.settings import CoreSettings, load, state_directory, variable
from sinks import known_sinks
from tests.support.plugin import install

pytestmark = pytest.mark.usefixtures("empty_directory")


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """`config show --json` by name."""
    assert 0 == main(["config", "show", "--json"])
    found = json.loads(capsys.readouterr().out)
    return {setting["name"]: setting for setting in found["settings"]}


def test_every_setting_is_shown_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Name, value, source, unit, default and what it takes."""
    found = shown(capsys)
    fields = [variable(name) for settings_class in all_settings() for name in settings_class.model_fields]
    assert fields == list(found)
    assert {"default"} == {setting["source"] for setting in found.values()}
    assert {
        "name": "REPLICATOR_RETRY_MAX_SECONDS",
        "value": "30.0",
        "source": "default",
        "unit": "s",
        "default": "30.0",
        "takes": "seconds between two tries of a sink or of PostgreSQL, at most, 0.01 to 3600",
    } == found["REPLICATOR_RETRY_MAX_SECONDS"]
    values = {name: found[f"REPLICATOR_{name}"]["value"] for name in ("SINKS", "FAILOVER_SLOT", "COLUMNS")}
    assert {"SINKS": "clickhouse,redis,http", "FAILOVER_SLOT": "true", "COLUMNS": ""} == values
    assert 0 == main(["config", "show"])
    assert "REPLICATOR_DECODING_MEMORY_MB =   (default)" in capsys.readouterr().out


def test_where_a_value_comes_from(
    empty_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The environment before `.env`, a file by its path; secrets are masked in both forms."""
    (empty_directory / ".env").write_text("REPLICATOR_SLOT=of_file\nREPLICATOR_MEMORY_LIMIT_MB=7\n", encoding="utf-8")
    (empty_directory / "token").write_text("hunter2\n", encoding="utf-8")
    monkeypatch.setenv("REPLICATOR_SLOT", "of_environment")
    monkeypatch.setenv("REPLICATOR_HTTP_BEARER_TOKEN_FILE", "token")
    monkeypatch.setenv("REPLICATOR_POSTGRES_DSN", "postgresql://app:hunter2@db:5432/engagement")
    found = shown(capsys)
    expected = {
        "REPLICATOR_SLOT": ("of_environment", "environment"),
        "REPLICATOR_MEMORY_LIMIT_MB": ("7", ".env"),
        "REPLICATOR_HTTP_BEARER_TOKEN": ("***", "file token"),
        "REPLICATOR_POSTGRES_DSN": ("postgresql://app:***@db:5432/engagement", "environment"),
    }
    assert expected == {name: (found[name]["value"], found[name]["source"]) for name in expected}
    assert 0 == main(["config", "show"])
    out = capsys.readouterr().out
    assert "REPLICATOR_MEMORY_LIMIT_MB = 7 MB  (.env; default: 64)\n" in out
    assert "hunter2" not in out


@pytest.mark.parametrize(
    ("secret", "expected"),
    [
        ("postgresql://app:hunter2@db:5432/engagement?sslmode=require", "postgresql://app:***@db:5432/engagement?***"),
        ("postgresql://app@db/engagement", "postgresql://app@db/engagement"),
        ("host=db dbname=engagement user=app password=hunter2", "host=db dbname=engagement user=app"),
        ("redis://:hunter2@cache:6379/0", "redis://:***@cache:6379/0"),
        ("https://hunter2@api/hunter2?key=hunter2", "https://***@api/***?***"),
        ("http://localhost:8000/", "http://localhost:8000/"),
        ("sqlite:////var/lib/checkpoint.db", "sqlite:////var/lib/checkpoint.db"),
        ("postgresql://app:hun/ter2@db/engagement", "***"),
        ("postgresql://app:hun#ter2@db/engagement", "***"),
        ("postgresql://app@[half/engagement", "***"),
        ("hunter2", "***"),
        ("host=db password=hunter2 nonsense", "***"),
        ("host=db password=hunter2://x", "host=db"),
    ],
)
def test_secrets_are_masked(secret: str, expected: str) -> None:
    """What is left says where it leads."""
    assert expected == masked(secret)


def test_all_mistakes_at_once(
    empty_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each on a line, with what it takes; a misspelt name with the one that was meant."""
    (empty_directory / ".env").write_text("REPLICATOR_HTTP_BATCHSIZE=5\n", encoding="utf-8")
    for name, value in {
        "SLOT": "Bad-Slot",
        "MEMORY_LIMIT_MB": "much",
        "REDIS_URL": "ftp://hunter2@h",
        "HTTP_BEARER_TOKEN_FILE": "/nonexistent",
        "HTTP_BATCH_SIZE": "0",
        "PROGRAM": "docker compose run --rm replicator",
    }.items():
        monkeypatch.setenv(f"REPLICATOR_{name}", value)
    assert 2 == main(["config", "check"])
    out = capsys.readouterr().out
    assert [
        "REPLICATOR_SLOT is unusable: ",
        "REPLICATOR_MEMORY_LIMIT_MB is unusable: ",
        "REPLICATOR_REDIS_URL is unusable: ",
        "REPLICATOR_HTTP_BEARER_TOKEN_FILE is unusable: ",
        "REPLICATOR_HTTP_BATCH_SIZE is unusable: ",
        "REPLICATOR_HTTP_BATCHSIZE is not a setting; did you mean REPLICATOR_HTTP_BATCH_SIZE?",
    ] == [line.partition("unusable: ")[0] + "unusable: " * ("unusable" in line) for line in out.splitlines()]
    assert all("It takes " in line for line in out.splitlines()[:-1])
    assert "hunter2" not in out


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SINKS", "redis,kafka", "there is no sink 'kafka'"),
        ("CHECKPOINT_URL", "oracel://app:hunter2@db/x", "SQLAlchemy has no driver oracel"),
        ("CHECKPOINT_URL", "postgresql://app:hunter2@db:port/x", "it can't be parsed"),
        ("CHECKPOINT_URL", "", "it can't be parsed"),
        ("ADMIN_LISTEN", "a..b:80", "its host is impossible"),
        ("ADMIN_LISTEN", "localhost:99999", "its port is impossible"),
    ],
)
def test_a_mistake_that_the_program_would_stop_at(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`config check` finds it too, once, and every command says it the same way."""
    monkeypatch.setenv(f"REPLICATOR_{name}", value)
    assert 2 == main(["config", "check"])
    out = capsys.readouterr().out
    assert out.startswith(f"REPLICATOR_{name} is unusable: {words}")
    assert 1 == out.count("\n")
    assert 2 == main(["status"])
    assert f"replicator: {out}" == capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "line"), [("\n\nREPLICATOR_SINKS redis\n", 3), ("A=b\nREPLICATOR_SLOT\n", 2), ('A="b\n', 1)]
)
def test_a_line_that_would_be_skipped(
    text: str, line: int, empty_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its setting would be the default, without a word."""
    (empty_directory / ".env").write_text(text, encoding="utf-8")
    assert 2 == main(["config", "check"])
    assert f".env is unusable: line {line} can't be parsed. It takes lines of NAME=value in UTF-8." in "".join(
        capsys.readouterr()
    )


NEEDY = """
from pydantic import Field, SecretStr
from replicator.contracts.settings import Settings
from replicator.contracts.sink import Sink
class Needs(Settings):
    needy_url: SecretStr = Field(description="where it leads")
    needy_rows: int = 5
    needy_ports: tuple[int, ...] = (1, 2)
class NeedySink(Sink):
    name, max_events, settings_class = "needy", 1, Needs
    async def write(self, events): return []
"""


@pytest.fixture
def needy(empty_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed sink that can't do without a setting."""
    (empty_directory / "needy.py").write_text(NEEDY, encoding="utf-8")
    install(empty_directory, "needy", {"needy": "needy:NeedySink", "gone": "gone:Sink"})
    monkeypatch.syspath_prepend(empty_directory)
    known_sinks.cache_clear()
    yield
    known_sinks.cache_clear()


@pytest.mark.usefixtures("needy")
def test_settings_of_an_installed_sink_are_like_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shown and masked, checked where the sink is named, and guessed when misspelt."""
    assert 0 == main(["config", "check"]), "nobody named it, so it needs nothing"
    capsys.readouterr()
    found = shown(capsys)
    expected = ("REPLICATOR_NEEDY_URL", None, "missing", "", None, "where it leads")
    assert expected == tuple(found["REPLICATOR_NEEDY_URL"].values())
    assert "1,2" == found["REPLICATOR_NEEDY_PORTS"]["value"]
    main(["config", "show"])
    assert "REPLICATOR_NEEDY_URL =   (missing)\n" in capsys.readouterr().out
    monkeypatch.setenv("REPLICATOR_SINKS", "http,needy")
    monkeypatch.setenv("REPLICATOR_NEEDY_ROWS", "many")
    monkeypatch.setenv("REPLICATOR_NEEDY_ROW", "5")
    assert 2 == main(["config", "check"])
    assert [
        "REPLICATOR_NEEDY_URL is unusable: it is not set. It takes where it leads.",
        "REPLICATOR_NEEDY_ROWS is unusable: it is not a whole number. It takes another value.",
        "REPLICATOR_NEEDY_ROW is not a setting; did you mean REPLICATOR_NEEDY_ROWS?",
    ] == capsys.readouterr().out.splitlines()
    monkeypatch.setenv("REPLICATOR_NEEDY_URL", "x://app:hunter2@db/x")
    assert "x://app:***@db/x" == shown(capsys)["REPLICATOR_NEEDY_URL"]["value"]


@pytest.mark.usefixtures("needy")
@pytest.mark.parametrize("command", [["config", "check"], ["check"], ["status"], ["init"]])
@pytest.mark.parametrize(
    ("sinks", "problem"),
    [
        ("needy", "REPLICATOR_NEEDY_URL is unusable: it is not set."),
        (
            "gone",
            "REPLICATOR_SINKS is unusable: sink 'gone' can't be loaded: ModuleNotFoundError: No module named 'gone'.",
        ),
    ],
)
def test_a_sink_that_can_not_be_used_is_one_line(
    sinks: str, problem: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every command, with exit code 2."""
    monkeypatch.setenv("REPLICATOR_SINKS", sinks)
    assert 2 == main(command)
    out, err = capsys.readouterr()
    assert problem in (out if command == ["config", "check"] else err.removeprefix("replicator: "))


def test_a_token_is_no_address(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of it is shown, whatever it looks like."""
    monkeypatch.setenv("REPLICATOR_HTTP_BEARER_TOKEN", "hunter2://hunter2")
    assert "***" == shown(capsys)["REPLICATOR_HTTP_BEARER_TOKEN"]["value"]


def test_usable_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """The defaults are."""
    assert 0 == main(["config", "check"])
    assert "all settings are usable\n" == capsys.readouterr().out


def test_every_command_names_an_unknown_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a warning beside what it prints."""
    monkeypatch.setenv("REPLICATOR_SLTO", "x")
    App.load()
    assert "REPLICATOR_SLTO is not a setting; did you mean REPLICATOR_SLOT?" in capsys.readouterr().err


def test_unknown_names(monkeypatch: pytest.MonkeyPatch, empty_directory: Path) -> None:
    """Misspelt ones, of the environment and of `.env`; not those of sinks that are left out, nor NAME_FILE."""
    (empty_directory / ".env").write_text(
        "REPLICATOR_HTTP_BATCHSIZE=5\nREPLICATOR_HTTP_URL_FILE=/u\n", encoding="utf-8"
    )
    monkeypatch.setenv("REPLICATOR_SINK", "http")
    monkeypatch.setenv("REPLICATOR_CLICKHOUSE_MAX_EVENTS", "7")
    found = [message.partition(" ")[0] for message in unknown_settings()]
    assert ["REPLICATOR_HTTP_BATCHSIZE", "REPLICATOR_SINK"] == found


@pytest.mark.usefixtures("empty_directory")
def test_kubernetes_variables_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets them for every service, and a service has the name of what it serves. Others are still named."""
    for service in ("REPLICATOR", "REPLICATOR_ADMIN"):
        for name in (
            "SERVICE_HOST",
            "SERVICE_PORT",
            "SERVICE_PORT_HTTP",
            "PORT",
            "PORT_8080_TCP",
            "PORT_8080_TCP_ADDR",
        ):
            monkeypatch.setenv(f"{service}_{name}", "tcp://10.0.0.1:8080")
    assert [] == list(unknown_settings())
    monkeypatch.setenv("REPLICATOR_REDIS_PORT", "6379")
    monkeypatch.setenv("REPLICATOR_SERVICE", "x")
    assert ["REPLICATOR_REDIS_PORT", "REPLICATOR_SERVICE"] == [line.split()[0] for line in unknown_settings()]


def test_the_default_checkpoint_is_not_in_the_working_directory(
    empty_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systemd's directory, else XDG's, else the user's; made for its owner alone."""
    assert empty_directory / "home/.local/state/engagement-replicator" == state_directory()
    monkeypatch.setenv("XDG_STATE_HOME", "xdg")
    assert empty_directory / "home/.local/state/engagement-replicator" == state_directory()
    monkeypatch.setenv("HOME", "~")  # what is left of it where a user has none
    assert Path("/var/lib/engagement-replicator") == state_directory()
    monkeypatch.setenv("XDG_STATE_HOME", str(empty_directory / "xdg"))
    assert empty_directory / "xdg/engagement-replicator" == state_directory()
    monkeypatch.setenv("STATE_DIRECTORY", f"{empty_directory}/systemd:/var/lib/other")
    assert f"sqlite:///{empty_directory}/systemd/checkpoint.db" == load(CoreSettings).checkpoint_url.get_secret_value()
    App.load()
    assert 0o700 == (empty_directory / "systemd").stat().st_mode & 0o777


def test_the_first_lines_say_what_runs(monkeypatch: pytest.MonkeyPatch, empty_directory: Path) -> None:
    """Version, source, slot, checkpoint, sinks, admin address; no secrets."""
    monkeypatch.setenv("REPLICATOR_POSTGRES_DSN", "postgresql://app:hunter2@db/engagement")
    monkeypatch.setenv("REPLICATOR_HTTP_URL", "https://api/hunter2")
    version, *lines = App.load().introduce()
    assert version.startswith("engagement-replicator 0.1.0, Python 3.")
    assert [
        "source postgresql://app:***@db/engagement, slot engagement_slot",
        f"checkpoint sqlite:///{empty_directory}/home/.local/state/engagement-replicator/checkpoint.db",
        "sinks clickhouse http://***@localhost:8123/***, redis redis://localhost:6379/0, http https://api/***",
        "admin http://127.0.0.1:8080",
    ] == lines


@pytest.mark.parametrize("command", ["config check", "check", "run", "init", "status", "backfill --last 1h", "trace 1"])
def test_a_declaration_that_can_not_be_used(
    command: str, empty_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line of every command that needs it, exit code 2; no server is asked."""
    text = "from replicator import *\nSTREAM = Stream('orders', 'shop.orders', (Field('id', BIGINT.nullable),))\n"
    (empty_directory / "unusable_orders.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("REPLICATOR_STREAM", "unusable_orders:STREAM")
    assert 2 == main(command.split())
    said = capsys.readouterr()
    [line] = (said.out + said.err).splitlines()
    assert "REPLICATOR_STREAM is unusable: stream 'orders': type of the field id is a method; it takes a type" in line
    assert "(unusable_orders.py, line 2)" in line
