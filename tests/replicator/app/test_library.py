"""`Replicator` without servers: what it refuses, and what it leaves alone."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

import replicator
from enrichment import EVENT
from replicator import Event, Refusal, Replicator, Settings, SettingsError, Sink
from replicator.app import App
from sinks.testing import MemorySink

ROOT = Path(__file__).parents[3]
OTHER = replace(EVENT, name="other", clickhouse_table="", redis_name="other")

pytestmark = pytest.mark.usefixtures("empty_directory")


class ShelfSettings(Settings):
    """One of its own."""

    shelf_width: int = 3


class Shelf(Sink):
    """Of another package."""

    name, max_events = "shelf", 10
    settings_class = ShelfSettings
    settings: ShelfSettings

    async def write(self, _: Sequence[Event]) -> Sequence[Refusal]:
        """Nowhere."""
        return []


class Nameless(Shelf):
    """No sink can be called so."""

    name = ""


def memory(name: str) -> partial[MemorySink]:
    """With an argument of the program around it."""
    return partial(MemorySink, name=name)


def misused() -> partial[MemorySink]:
    """It has no such argument."""
    return partial(MemorySink, color=1)  # type: ignore[call-arg]  # that is what is wrong


def app_of(made: Replicator) -> App:
    """What it is put together of."""
    return made._app  # noqa: SLF001  nobody else has to know


@pytest.mark.parametrize(
    ("stream", "sinks", "settings", "said"),
    [
        (
            EVENT,
            [Shelf],
            {"slot": "A slot"},
            "Argument slot is unusable: its form is wrong. It takes a replication slot's name",
        ),
        (EVENT, [Shelf], {"postgres_dsn": "x://"}, "Argument postgres_dsn is unusable: it can't be parsed"),
        (
            EVENT,
            [Shelf],
            {"checkpoint_url": "nodb://x"},
            "Argument checkpoint_url is unusable: SQLAlchemy has no driver nodb",
        ),
        (EVENT, [Shelf], {"sloot": "x"}, "Argument sloot is unusable: nothing here reads it, perhaps you mean slot"),
        (EVENT, [Shelf], {"admin_listen": ":1"}, "Argument admin_listen is unusable: nothing here reads it"),
        (EVENT, [Shelf], {"redis_url": "redis://x"}, "Argument redis_url is unusable: nothing here reads it"),
        (EVENT, [Shelf], {"shelf_width": "wide"}, "Argument shelf_width is unusable: it is not a whole number"),
        (EVENT, [memory("mine")], {"shelf_width": 4}, "Argument shelf_width is unusable: nothing here reads it"),
        (EVENT, [], {}, "Argument sinks is unusable: it names none"),
        (EVENT, "nowhere", {}, "Argument sinks is unusable: there is no sink 'nowhere'"),
        (EVENT, [Nameless], {}, "Argument sinks is unusable: sink '' is"),
        (EVENT, [Shelf, memory("shelf")], {}, "Argument sinks is unusable: two are called shelf"),
        (EVENT, [MemorySink()], {}, "Argument sinks is unusable: it has a value of type MemorySink"),
        (EVENT, lambda *_: MemorySink(), {}, "Argument sinks is unusable: it has a value of type function"),
        (EVENT, misused(), {}, "Argument sinks is unusable: sink 'memory' can't be made (TypeError)"),
        ("nowhere:STREAM", [Shelf], {}, "Argument stream is unusable: there is no module nowhere"),
        ([], [Shelf], {}, "Argument stream is unusable: it names none"),
        ([7], Shelf, {}, "Argument stream is unusable: it has a value of type int. It takes a Stream, or its name"),
        (EVENT, {Shelf}, {}, "Argument sinks is unusable: it has a value of type set. It takes a class of sinks, a"),
        (EVENT, [None], {}, "Argument sinks is unusable: it has a value of type NoneType"),
        (EVENT, b"shelf", {}, "Argument sinks is unusable: it has a value of type bytes"),
        (EVENT, Shelf, {"columns": 7}, "Argument columns is unusable: it has a value of type int"),
    ],
)
def test_what_can_not_be_used_is_named(stream: Any, sinks: Any, settings: Any, said: str) -> None:
    """By the name that it was given under: the product's own error, and at once."""
    with pytest.raises(SettingsError) as raised:
        Replicator(stream, sinks, **settings)
    assert str(raised.value).startswith(said)
    assert raised.value.name == said.split()[1]


def test_the_environment_has_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A keyword wins, over NAME_FILE as well, at each look; a mistake in the environment has the variable's name."""
    (tmp_path / "dsn").write_text("host=of-the-file", encoding="utf-8")
    monkeypatch.setenv("REPLICATOR_POSTGRES_DSN_FILE", str(tmp_path / "dsn"))
    monkeypatch.setenv("REPLICATOR_SLOT", "of_all")
    monkeypatch.setenv("REPLICATOR_SINKS", "nowhere")
    monkeypatch.setenv("REPLICATOR_STREAM", "nowhere:STREAM")
    made = Replicator(EVENT, [Shelf], slot="one", postgres_dsn=SecretStr("host=mine"), shelf_width=7)
    assert ("one", "host=mine") == (app_of(made).settings.slot, app_of(made).dsn())
    assert "of_all" == app_of(other := Replicator(EVENT, [Shelf])).settings.slot
    assert "host=of-the-file" == app_of(other).dsn()
    assert [7, 3] == [app_of(one).sinks[0].settings.shelf_width for one in (made, other)]  # type: ignore[attr-defined]
    monkeypatch.setenv("REPLICATOR_SLOT", "A slot")
    with pytest.raises(SettingsError, match=r"^REPLICATOR_SLOT is unusable"):
        Replicator(EVENT, [Shelf])


def test_each_stream_has_its_sinks(tmp_path: Path) -> None:
    """One for each stream, called after both."""
    checkpoint_url = f"sqlite:///{tmp_path}/checkpoint.db"
    made = Replicator([EVENT, OTHER], [Shelf, memory("mine")], checkpoint_url=checkpoint_url)
    sinks = app_of(made).sinks
    assert ["shelf/engagement", "mine/engagement", "shelf/other", "mine/other"] == [sink.name for sink in sinks]
    assert ["shelf", "mine"] * 2 == [sink.kind for sink in sinks]
    assert [EVENT, EVENT, OTHER, OTHER] == [sink.context.stream for sink in sinks]
    assert {"engagement", "other"} == set(made.status().replicator.settings["REPLICATOR_STREAM"].split(","))  # type: ignore[union-attr]


async def test_it_runs_once() -> None:
    """Stopped before it begins, it touches nothing; it is ready neither before nor after."""
    made = Replicator(EVENT, [memory("mine")], postgres_dsn="host=/nonexistent")
    before = made.status()
    assert (False, "starting") == (before.ready, before.reasons[0])
    made.stop()
    await made.run()
    assert (False, "the replicator has stopped") == (made.status().ready, made.status().reasons[0])
    with pytest.raises(RuntimeError, match="runs once"):
        await made.run()


def test_the_process_stays_as_it_is() -> None:
    """Logging, signals and the rights of files belong to the program around it."""
    root, umask = logging.getLogger(), os.umask(0o022)
    os.umask(umask)
    before = root.level, root.handlers[:], signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    Replicator(EVENT, [Shelf])
    assert before == (root.level, root.handlers, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert umask == os.umask(umask)


def test_names_are_there_when_asked_for() -> None:
    """All of them; and the import alone brings none of the slow libraries."""
    assert not [name for name in replicator.__all__ if not hasattr(replicator, name)]
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = replicator.Nonsense  # type: ignore[attr-defined]
    script = "import sys, replicator; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"pydantic", "sqlalchemy", "psycopg", "aiohttp", "asyncio"} & set(done.stdout.split())
