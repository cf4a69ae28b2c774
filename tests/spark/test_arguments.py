"""What the command takes, without Spark: `--help` and the page have every option, and mistakes are one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from replicator.cli.main import main
from replicator_spark.commands import app

PAGE = Path(__file__).parents[2] / "docs/how-to/operate/spark.md"
RANGE = ("--start", "2026-01-08", "--end", "2026-01-09")


COMMANDS = {"stream": "--master", "backfill": "--slices"}
"""With an option of each."""


@pytest.mark.parametrize(("name", "one"), COMMANDS.items())
def test_the_page_has_every_option(name: str, one: str) -> None:
    """Of both commands."""
    group: typer.core.TyperGroup = typer.main.get_command(app)  # type: ignore[assignment]  # it has two kinds
    options = [option for parameter in group.commands[name].params for option in parameter.opts]
    page = PAGE.read_text(encoding="utf-8")
    assert one in options
    assert [] == [option for option in options if option not in page and option != "--help"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """80 columns, with an example and the exit codes."""
    assert 0 == main([name, "--help"], app)
    told = capsys.readouterr().out
    assert f"Example: python -m replicator_spark {name}" in told
    assert "Exit codes: 0 done" in told
    assert [] == [line for line in told.splitlines() if len(line) > 80]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--slices", "0"], "--slices is unusable: '0' is not a whole number"),
        (["--slices", "1001"], "--slices is unusable: 1001 is more than 1000"),
        (["--conf", "executor.memory=1g"], "--conf is unusable: 'executor.memory' is no setting of Spark"),
        (["--conf", "spark.executor.memory"], "--conf is unusable: 'spark.executor.memory' has no value"),
        (
            ["--conf", "spark.executorEnv.REPLICATOR_REDIS_URL=redis://:planted@redis"],
            "spark.executorEnv.REPLICATOR_REDIS_URL is unusable: it may have a secret in it",
        ),
        (["--slice", "3"], "No such option: --slice. Did you mean --slices?"),
        (["--sinks", "kafka"], "--sinks is unusable: 'kafka' is not the name of a sink"),
    ],
)
@pytest.mark.usefixtures("empty_directory")
def test_a_mistake_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """That names the argument and what it takes; exit code 2."""
    assert 2 == main(["backfill", *RANGE, *arguments], app)
    [line] = capsys.readouterr().err.splitlines()
    assert told in line
    assert "planted" not in line


@pytest.mark.usefixtures("empty_directory")
def test_another_program_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped command is told with the name of this program."""
    assert 2 == main(["backfil"], app)
    assert "Did you mean 'backfill'? See python -m replicator_spark --help" in capsys.readouterr().err
