"""The log's lines: one a record whatever servers and rows hold, with fields for programs."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replicator.contracts.errors import SinkUnavailable
from replicator.delivery.retry import Trouble
from replicator.operations.logs import configure_logging, printable
from tests.support.codes import UNCODED
from tests.support.environment import SECRET

HOSTILE = "FATAL\x1b[2J\x07\r2026-11-26T00:00:00.000Z INFO    replicator: all is well\nforged \u202egnp\x9b0m\x00\ud800"


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_server_writes_a_line_of_its_own(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters, and those that turn text around, are escaped; a traceback keeps its lines."""
    configure_logging("info", form)  # type: ignore[arg-type]  # parametrized
    try:
        int(HOSTILE)
    except ValueError:
        logging.getLogger("replicator.x").exception("it said %s", HOSTILE)
    said = capsys.readouterr().err
    assert said.replace("\n", "").isprintable()
    assert "FATAL\\x1b[2J" in said or "FATAL\\u001b[2J" in said
    assert not [line for line in said.splitlines() if line.startswith("2026-11-26T00:00")]
    if form == "json":
        [line] = said.splitlines()
        assert json.loads(line)["message"] == f"it said {HOSTILE}"


def test_the_frames_of_a_sink_keep_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """An indented line can't be taken for another one of the log."""
    configure_logging("info", "text")
    logging.getLogger("replicator.x").error("sink lines raised %s\n%s", "OSError", '  File "x.py", line 1\nforged')
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("sink lines raised OSError")
    assert '  File "x.py", line 1\\nforged' == second


def test_a_line_without_a_code_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    """By what every acceptance test looks for in the program's log."""
    configure_logging("info", "text")
    log = logging.getLogger("replicator.x")
    for say in (log.info, log.warning, log.error, log.critical):
        say("without")
        say("%s", SinkUnavailable(sink="http", detail="with"))
    found = UNCODED.findall(capsys.readouterr().err)
    assert ["WARNING", "ERROR", "CRITICAL"] == [line.split()[1] for line in found]
    assert all(line.endswith("without") for line in found)


def test_what_is_printed_as_it_is() -> None:
    """Letters of any script, and what a caller keeps."""
    assert "größer → 漢字 👍🏽" == printable("größer → 漢字 👍🏽")
    assert "a\nb\\t" == printable("a\nb\t", keep="\n")
    text = "\x7f\x80\x9f\u061c\u2028\u202e\u2069"
    assert text == json.loads(printable(json.dumps(text, ensure_ascii=False))), "JSON stays JSON"


def _lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return _parsed(capsys.readouterr().err)


def test_a_json_line_has_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """Slot, sink, LSN and event id where they are known: from the caller, the error, or the module of the sink."""
    configure_logging("info", "json", "engagement_slot")
    log = logging.getLogger("replicator.delivery.dead_letters")
    log.error("dead letter", extra={"sink": "http", "lsn": "0/1#2", "event_id": 7})
    log.error("%s", SinkUnavailable(sink="redis", detail="away"))
    logging.getLogger("sinks.clickhouse.sink").error("empty")
    log.info("plain")
    trouble = Trouble(over="sink http takes events again after {:.0f} s".format, sink="http")
    trouble.begin()
    trouble.end()
    Trouble(code="R310").say("the slot stands still")
    lines = _lines(capsys)
    assert {"engagement_slot"} == {line["slot"] for line in lines}
    assert ["http", "redis", "clickhouse", None, "http", None] == [line.get("sink") for line in lines]
    assert [None, "R501", None, None, None, "R310"] == [line.get("code") for line in lines]
    assert ("0/1#2", 7) == (lines[0]["lsn"], lines[0]["event_id"])
    assert {"time", "level", "logger", "message", "slot"} == set(lines[3])


def test_a_line_of_text_has_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    """After the level, so that it is found and the message stays the last; plain lines have none."""
    configure_logging("info", "text")
    log = logging.getLogger("replicator.x")
    log.error("%s", SinkUnavailable(sink="redis", detail="away"))
    log.warning("%s was truncated", "t", extra={"code": "R407"})
    log.info("plain")
    error, warning, plain = (line[25:] for line in capsys.readouterr().err.splitlines())
    assert error.startswith("ERROR   R501 replicator.x: Sink redis did not take the batch: away.")
    assert warning == "WARNING R407 replicator.x: t was truncated"
    assert plain == "INFO    replicator.x: plain"


@pytest.mark.parametrize(
    ("arguments", "variables", "code"),
    [
        (["status"], {"REPLICATOR_SLOT": "No Good"}, 2),
        (["backfill"], {}, 2),
        (["statsu"], {}, 2),
        (["init"], {"REPLICATOR_POSTGRES_DSN": "postgresql://app@127.0.0.1:1/x", "REPLICATOR_SINKS": "redis"}, 1),
    ],
)
def test_the_last_line_has_the_form_of_the_log(
    arguments: list[str], variables: dict[str, str], code: int, tmp_path: Path
) -> None:
    """Whoever collects JSON gets the reason for the end as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "replicator", *arguments],
        env={"REPLICATOR_LOG_FORMAT": "JSON", "XDG_STATE_HOME": str(tmp_path), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert code == done.returncode, done.stderr
    last = [json.loads(line) for line in done.stderr.splitlines()][-1]
    assert "critical" == last["level"]
    assert last["message"]


def leak() -> None:
    """What a sink of another package may do."""
    try:
        int(f"not {SECRET}")
    except ValueError as exc:
        raise ConnectionError(f"http://me:{SECRET}@h/") from exc


class Leaks:
    """Fails where nobody can be told."""

    def __del__(self) -> None:
        leak()


async def _task() -> None:
    async def fails() -> None:
        leak()

    task = asyncio.create_task(fails())
    await asyncio.wait([task])
    del task
    gc.collect()


async def _callback() -> None:
    asyncio.get_running_loop().call_soon(leak)
    await asyncio.sleep(0)


async def _connection() -> None:
    done = asyncio.Event()

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        done.set()
        leak()

    server = await asyncio.start_server(serve, "127.0.0.1")
    async with server:
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        await done.wait()
        writer.close()
        await writer.wait_closed()
    await asyncio.sleep(0)


def _formatted() -> None:
    try:
        leak()
    except ConnectionError as exc:
        logging.getLogger("library").exception(f"failed: {exc}")  # noqa: G004, TRY401  as libraries do


def _given() -> None:
    try:
        leak()
    except ConnectionError as exc:
        logging.getLogger("library").warning("retry after %r", exc)
        logging.getLogger("library").warning("retry after %(error)s: ConnectionError", {"error": exc})
        logging.getLogger("library").error(exc)


def _several() -> None:
    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_fails())

    async def _fails() -> None:
        leak()

    try:
        asyncio.run(all_of_them())
    except ExceptionGroup:
        logging.getLogger("replicator.x").exception("several")


def _thread() -> None:
    thread = threading.Thread(target=leak)
    thread.start()
    thread.join()


def _ignored() -> None:
    Leaks()


def _warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"ConnectionError to http://me:{SECRET}@h/", UserWarning, stacklevel=1)


LEAKING: dict[str, Callable[[], object]] = {
    "a task": lambda: asyncio.run(_task()),
    "a callback": lambda: asyncio.run(_callback()),
    "a connection": lambda: asyncio.run(_connection()),
    "in the message": _formatted,
    "as an argument": _given,
    "a group": _several,
    "a thread": _thread,
    "a destructor": _ignored,
    "a warning": _warning,
}


@pytest.mark.parametrize("way", LEAKING)
@pytest.mark.parametrize("form", ["text", "json"])
def test_no_error_of_others_is_quoted(way: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever logs it: of what is none of our errors the log has the type and where it was raised, not the words."""
    configure_logging("debug", form)  # type: ignore[arg-type]  # parametrized
    LEAKING[way]()
    said = capsys.readouterr().err
    assert SECRET not in said
    assert ("UserWarning at " if way == "a warning" else "ConnectionError") in said
    assert (way in {"as an argument", "a warning"}) == ("in leak" not in said)
    if form == "json":
        assert _parsed(said)


def _parsed(said: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.splitlines()]


def test_a_thread_may_end_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """`sys.exit` in a thread is no failure: Python says nothing of it either."""
    configure_logging("info", "text")
    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()
    assert not capsys.readouterr().err


def test_what_led_to_an_error_of_ours_is_not_quoted_either(capsys: pytest.CaptureFixture[str]) -> None:
    """Its own words are; they hold no secret."""
    configure_logging("info", "text")
    try:
        try:
            leak()
        except ConnectionError as exc:
            raise SinkUnavailable(sink="http", detail="away") from exc
    except SinkUnavailable:
        logging.getLogger("replicator.x").exception("it failed")
    said = capsys.readouterr().err
    assert SECRET not in said
    assert "\nSinkUnavailable: Sink http did not take the batch: away." in said
    assert ["ValueError", "ConnectionError"] == [line for line in said.splitlines() if line.endswith("Error")]
