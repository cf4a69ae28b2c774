"""`check` as a whole: one part that breaks hides no other, and it agrees with the replicator that runs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec import structs

from replicator.contracts.errors import SourceUnavailable
from replicator.contracts.events import Finding
from replicator.contracts.settings import CoreSettings
from replicator.operations import check, server
from replicator.operations.status.form import CheckpointStatus, SlotStatus, Status
from sinks.testing import MemorySink

LIVE = Status(
    reasons=[],
    replicator=None,
    slot=SlotStatus(name="engagement_slot"),
    checkpoint=CheckpointStatus(),
    sinks={},
    dead_letters=None,
)


class Breaking(MemorySink):
    """A sink of another package, with a bug."""

    async def check(self) -> list[Finding]:
        """Raise."""
        raise OSError("s3cret")


class Hanging(MemorySink):
    """Another one, which waits without end."""

    async def check(self) -> list[Finding]:
        """Never return."""
        await asyncio.Event().wait()
        return []


class Wordy(MemorySink):
    """Another one: its check returns a text for each finding."""

    async def check(self) -> list[Finding]:
        """Return no findings."""
        return ["well"]  # type: ignore[list-item]  # its author has no type checker


class Silent(MemorySink):
    """Another one: its check ends without a `return`."""

    async def check(self) -> list[Finding]:
        """Return nothing."""
        return None  # type: ignore[return-value]  # its author has no type checker


class Unhashable(MemorySink):
    """Another one: a finding has a list in it."""

    async def check(self) -> list[Finding]:
        """Return what can't be compared with others."""
        return [Finding(True, ["well"])]  # type: ignore[arg-type]  # its author has no type checker


class Leaving(MemorySink):
    """Another one, which ends the program."""

    async def check(self) -> list[Finding]:
        """Try to."""
        raise SystemExit(7)


class Meeting(MemorySink):
    """A sink whose check ends when another one's has begun."""

    both = asyncio.Barrier(2)

    async def check(self) -> list[Finding]:
        """Wait for it."""
        await self.both.wait()
        return [Finding(True, f"{self.name} has met the other")]


async def found(
    monkeypatch: pytest.MonkeyPatch,
    live: Status | None,
    *sinks: MemorySink,
    paused: Sequence[str] = (),
    **settings: object,
) -> list[Finding]:
    """Everything, without PostgreSQL."""

    async def away(*_: object) -> None:
        raise SourceUnavailable(detail="away")

    async def ask(_: object) -> tuple[Status | None, str]:
        return live, ""

    monkeypatch.setattr(server, "look", away)
    monkeypatch.setattr(check, "ask_replicator", ask)
    settings = {"sinks": ",".join(sink.name for sink in sinks) or "redis", "admin_listen": "127.0.0.1:0", **settings}
    core = CoreSettings.model_validate(settings)
    kept = {f"paused: {name}": "{}" for name in paused}
    store: Any = SimpleNamespace(files=list, load_progress=lambda _, task: kept.get(task))
    return [finding async for finding in check.findings(core, cast("Any", None), sinks, store)]


async def test_a_check_that_does_not_end_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a finding, too."""
    monkeypatch.setattr(check, "CHECK_SECONDS", 0.01)
    _, hanging, well, *_ = await found(monkeypatch, None, Hanging(name="lines"), MemorySink(name="redis"))
    assert (False, "sink lines: its check has not ended within 0.01 s") == hanging[:2]
    assert well.ok


async def test_a_check_that_breaks_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a finding with the kind of the error, whose text may be anything; the next sink is looked at."""
    sinks = Breaking(name="lines"), Silent(name="rows"), Wordy(name="words"), Unhashable(name="lists")
    others = Leaving(name="exits"), MemorySink(name="redis")
    _, broken, silent, wordy, unhashable, leaving, well, *_ = await found(monkeypatch, None, *sinks, *others)
    assert (False, "sink lines: its check failed in an unexpected way (OSError)") == broken[:2]
    assert (False, "sink rows: its check failed in an unexpected way (TypeError)") == silent[:2]
    assert (False, "sink words: its check failed in an unexpected way (TypeError)") == wordy[:2]
    assert (False, "sink lists: its check failed in an unexpected way (ValidationError)") == unhashable[:2]
    assert (False, "sink exits: its check failed in an unexpected way (SystemExit)") == leaving[:2]
    assert (True, "memory") == well[:2]


async def test_all_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several that are silent are waited for together, and are said in their order all the same."""
    findings = await found(monkeypatch, None, Meeting(name="lines"), Meeting(name="rows"))
    assert ["lines has met the other", "rows has met the other"] == [finding.what for finding in findings[1:3]]


async def test_what_two_sinks_say_alike_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sinks of two streams have one server."""
    findings = await found(monkeypatch, None, MemorySink(name="redis/orders"), MemorySink(name="redis/engagement"))
    assert [finding.what for finding in findings].count("memory") == 1


@pytest.mark.parametrize(
    ("reasons", "standby", "expected"),
    [
        ([], "", (True, "the running replicator is ready")),
        ([], "held by process 7", (True, "the running replicator is the standby")),
        (["sink http answered 401"], "", (False, "the running replicator is not ready: sink http answered 401")),
    ],
)
async def test_check_asks_the_running_replicator(
    reasons: list[str], standby: str, expected: tuple[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only shows while events flow: an API that refuses every POST."""
    findings = await found(monkeypatch, structs.replace(LIVE, reasons=reasons, standby=standby))
    assert expected == findings[-1][:2]


async def test_an_address_that_run_could_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program has it; while our own replicator has it, and says so, all is well."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        last = (await found(monkeypatch, None, admin_listen=address))[-1]
        assert (False, True) == (last.ok, f"{address} can't be listened on" in last.what)
        assert "host:port" in last.cure
        assert (await found(monkeypatch, LIVE, admin_listen=address))[-1].ok
    assert not [finding for finding in await found(monkeypatch, None, admin_listen=address) if address in finding.what]


async def test_a_paused_sink_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be away."""
    findings = await found(monkeypatch, None, Breaking(name="lines"), MemorySink(name="redis"), paused=["lines"])
    assert (True, "sink lines is paused until somebody resumes it, and not asked") == findings[-1][:2]
    assert not [finding for finding in findings if "its check failed" in finding.what]


async def test_an_address_that_others_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `run` does; it is no failure."""
    first, *_ = await found(monkeypatch, None, admin_listen="0.0.0.0:8080")
    assert first.ok
    assert "0.0.0.0:8080" in first.what


@pytest.mark.parametrize("begun", [False, True])
async def test_what_init_makes(monkeypatch: pytest.MonkeyPatch, *, begun: bool) -> None:
    """It need not be there before the first `init`, and has to be afterwards."""

    class Empty(MemorySink):
        """Its table is not there."""

        async def check(self) -> list[Finding]:
            """Say so."""
            return [Finding(False, "no table", "Run init", made_by_init=True)]

    async def beginning(*_: object) -> list[Finding]:
        return [Finding(True, "slot", made_by_init=not begun)]

    async def look(*_: object) -> object:
        return SimpleNamespace(findings=[], may_stream=True)

    async def tables() -> list[Finding]:
        return []

    sink = Empty(name="redis")
    await found(monkeypatch, None, sink)  # replaces the rest
    monkeypatch.setattr(server, "look", look)
    monkeypatch.setattr(check, "_beginning", beginning)
    core: Any = CoreSettings.model_validate({"sinks": "redis"})
    enricher, store = SimpleNamespace(check=tables), SimpleNamespace(files=list, load_progress=lambda *_: None)
    findings = [finding async for finding in check.findings(core, cast("Any", enricher), [sink], cast("Any", store))]
    assert (not begun, "no table", "Run init") == findings[-1][:3]
