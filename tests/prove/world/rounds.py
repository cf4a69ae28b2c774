"""The environment matrix: the world does what it does to a replicator in the field, at random, under steady traffic.

    python -m tests.prove --only environment --minutes 2 --seed 7
    python -m tests.prove --only environment --seed 7 --round 3
    python -m tests.prove --only environment --fault "events: renamed and back"

Every fault is a card (`world.FAULTS`). The seed shuffles the cards; each round plays the next of them, spread over a
minute, those of one victim one after the other, those of different victims at the same time. Each round begins with an
empty database, slot, checkpoint and sinks. It ends with a comparison of every field of every event with what PostgreSQL
has, and of every dead letter with the events that deserve one. Meanwhile `observer.py` watches the light, and
`chaos.Rule` the order of the positions.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import msgspec
import psycopg

from devstack import DevStack
from devstack.process import wait_until
from tests.prove.chaos import DURABLE_REDIS, POSTGRES, Rule
from tests.prove.subjects import Orders
from tests.prove.traffic import settle
from tests.prove.world import answers, servers, tables
from tests.prove.world.observer import Observer, OrdersObserver
from tests.prove.world.truth import Truth, differences
from tests.prove.world.world import FAULTS, Fault, Victim, World, WrongError, clean
from tests.prove.world.writers import Application, write
from tests.support import environment as ground
from tests.support.destinations import Destinations
from tests.support.load import Load
from tests.support.orders import Shop
from tests.support.program import succeed

ROUND_SECONDS = 60.0
CARDS = 12
"""Of a round: some of them meet, and there are moments between them."""
LONGEST_SECONDS = 25.0
"""How long a fault lasts at most: longer than the observer is patient."""
CAUGHT_UP_SECONDS = 180.0
READY_SECONDS = 60.0
RULE_SECONDS = 0.1
LOG_SHOWN = 8_000
TRACEBACK_SHOWN = 4_000
EXPECTED = re.compile("dead letter of sink .* event_ts is|dead letter of sink .* its time is")
"""What the log says of odd events."""

assert FAULTS, (answers, servers, tables)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A run that found no fault; otherwise it raises."""

    stream: str
    seed: int
    rounds: int
    seconds: float
    events: int
    letters: int
    """Dead letters, each of them about its event."""
    repeats: int
    """Events that the API got again."""
    rule_looks: int
    looks: dict[str, int]
    """At /readyz, by what it said."""
    faults: dict[str, int]
    """How often each was played, by its full name."""

    def line(self) -> str:
        """For a log."""
        looks = ", ".join(f"{count} {said}" for said, count in sorted(self.looks.items()))
        return (
            f"environment of {self.stream}: seed {self.seed}, {self.seconds / 60:.1f} min, {self.rounds} rounds,"
            f" {sum(self.faults.values())} faults of {len(self.faults)} kinds, {self.events} events, 0 lost, 0 wrong,"
            f" {self.letters} dead letters, all about the event, {self.repeats} repeats at the API, the rule held at"
            f" {self.rule_looks} looks; /readyz: {looks}, never ready over an event that was lost or stood still"
        )

    def table(self) -> str:
        """For the report: a line for each victim."""
        rows = []
        for victim in sorted({name.partition(":")[0] for name in self.faults}):
            played = {name: count for name, count in self.faults.items() if name.partition(":")[0] == victim}
            rows.append(f"| {victim} | {len(played)} | {sum(played.values())} | 0 | 0 | 0 |\n")
        head = ("what the world changes", "kinds of fault", "played", "lost", "wrong", "ready over it")
        return f"| {' | '.join(head)} |\n{'|---' * len(head)}|\n{''.join(rows)}"


OF_TABLES = ("events", "content")
OF_ENGAGEMENT = (
    "api: refuses one event among good ones",
    "clickhouse: a view is broken",
    "replicator: events change while it is down",
    "replicator: content changes while it is down",
)
OF_ORDERS = [one for one in FAULTS if one.victim not in OF_TABLES and one.full_name not in OF_ENGAGEMENT]
"""Those that leave the tables alone."""


def deal(seed: int, number: int, cards: int = CARDS, faults: Sequence[Fault] = FAULTS) -> list[Fault]:
    """The cards of a round; no card comes again before all have been played."""
    first = (number - 1) * cards
    return [_shuffled(faults, seed, at // len(faults))[at % len(faults)] for at in range(first, first + cards)]


def _shuffled(faults: Sequence[Fault], seed: int, game: int) -> list[Fault]:
    return random.Random(f"{seed} {game}").sample(faults, len(faults))  # noqa: S311  not a secret


class Round:
    """One round, from an empty environment to the comparison."""

    def __init__(self, stack: DevStack, seed: str, cards: Sequence[Fault]) -> None:
        self._stack = stack
        self._seed = seed
        self._cards = cards
        self._began = time.monotonic()
        self._failures: list[BaseException] = []
        self.notes: list[str] = []
        self.events = self.repeats = self.letters = self.rule_looks = 0
        self.looks = Counter[str]()
        self.played = Counter[str]()

    def run(self, seconds: float) -> None:
        """Raises WrongError if anything is wrong."""
        with ExitStack() as cleanup:
            dsn = cleanup.enter_context(ground.fresh_database(self._stack))
            cleanup.callback(clean, self._stack)
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="world-")))
            world = World(self._stack, dsn, folder, cleanup)
            try:
                self._prepare(world)
                world.program.start()
                self._play(world, seconds)
                self._judge(world)
            except Exception as exc:
                notes = "\n".join(self.notes)
                lines = [line for line in world.program.log.splitlines() if not EXPECTED.search(line)]
                log = "\n".join(lines)[-LOG_SHOWN:]
                raise WrongError(f"{type(exc).__name__}: {exc}\n--- notes ---\n{notes}\n--- log ---\n{log}") from exc

    def _prepare(self, world: World) -> None:
        """The tables are there."""

    def _observer(self, world: World) -> Observer:
        return Observer(world, self._note)

    def _traffic(self, world: World, chance: random.Random) -> Load:
        return Application(world.dsn, chance, world.place)

    def _write_last(self, world: World, chance: random.Random) -> None:
        with psycopg.connect(world.dsn) as connection:
            write(connection, world.place.table, chance, 80, "last")

    def _note(self, text: str) -> None:
        self.notes.append(f"{time.monotonic() - self._began:6.1f} s  {text.strip()}")

    def _play(self, world: World, seconds: float) -> None:
        chance = random.Random(f"{self._seed} traffic")  # noqa: S311  not a secret
        observer, rule = self._observer(world), Rule(world.dsn, world.program)
        stop = threading.Event()
        by_victim: dict[Victim, list[Fault]] = {}
        for card in self._cards:
            by_victim.setdefault(card.victim, []).append(card)
        watching = [
            self._thread(lambda: observer.watch(stop), stop),
            self._thread(lambda: _repeat(rule.look, stop), stop),
        ]
        playing = [self._thread(partial(self._time_line, world, cards, seconds), stop) for cards in by_victim.values()]
        try:
            with self._traffic(world, chance):
                for thread in playing:
                    thread.join()
            if not self._failures:
                self._settle(world, chance)
        finally:
            world.over.set()
            stop.set()
            for thread in (*playing, *watching):
                thread.join()
            rule.close()
            self.looks += observer.looks
            self.rule_looks += rule.looks
        if self._failures:
            raise self._failures[0]

    def _thread(self, work: Callable[[], None], stop: threading.Event) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except BaseException as exc:  # noqa: BLE001  raised again in the round's thread
                self._failures.append(exc)
                self._note(f"FAILED: {type(exc).__name__}: {exc}")
                stop.set()

        thread = threading.Thread(target=guarded)
        thread.start()
        return thread

    def _time_line(self, world: World, cards: Sequence[Fault], seconds: float) -> None:
        """One victim's faults, each in its share of the time."""
        chance = random.Random(f"{self._seed} {cards[0].victim}")  # noqa: S311  not a secret
        share = seconds / len(cards)
        for card in cards:
            drawn = random.Random(f"{self._seed} {card.full_name}")  # noqa: S311  as above
            lasts = chance.choice((0.0, chance.uniform(0.5, 3), chance.uniform(3, 10), LONGEST_SECONDS))
            lasts = lasts if len(self._cards) > 1 else LONGEST_SECONDS
            before = chance.uniform(0.05, 0.3) * share
            world.wait(before)
            if world.over.is_set() or self._failures:
                return
            with world.tables.get(card.victim, nullcontext()):
                self._note(f"begins: {card.full_name}")
                fault = card.script(world, drawn)
                next(fault)
                self.played[card.full_name] += 1
                try:
                    world.wait(min(lasts, 0.6 * share))
                finally:
                    self._note(f"ends: {card.full_name}")
                    for _ in fault:
                        pass
            world.wait(share - before - min(lasts, 0.6 * share))

    def _settle(self, world: World, chance: random.Random) -> None:
        """The world is whole: everything arrives, and the light says so."""
        with psycopg.connect(world.dsn) as connection:
            settle(connection, chance)
        self._write_last(world, chance)
        wait_until(lambda: world.program.running, "the replicator to run", 1)
        world.program.wait_until_caught_up(CAUGHT_UP_SECONDS)
        wait_until(lambda: "ready\n" == world.program.admin("/readyz"), "/readyz to be ready", READY_SECONDS)

    def _judge(self, world: World) -> None:
        found = [*self._differences(world), *sorted(world.complaints)]
        if world.elsewhere.requests:
            found.append(f"a redirect was followed {world.elsewhere.requests} times")
        _, traceback, rest = world.program.log.partition("Traceback")
        found += [traceback + rest[:TRACEBACK_SHOWN]] * bool(traceback)
        found += [ground.SECRET] * (ground.SECRET in world.program.log)
        if found:
            raise WrongError("\n".join(found))
        if code := world.program.stop():
            raise WrongError(f"SIGTERM ended it with {code}")

    def _differences(self, world: World) -> list[str]:
        destinations = Destinations(self._stack)
        with contextlib.closing(destinations.redis):
            truth = Truth(world.dsn)
            letters = [*self._letters(world, truth.odd, world.place.poison)]
            wrong, self.repeats = differences(truth, destinations)
        self.events = len(truth.events)
        return letters + wrong

    def _letters(self, world: World, odd: set[int], poison: set[int]) -> Iterator[str]:
        """Dead letters that are not about their event, and those that are missing. What the API refused is replayed."""
        listed = msgspec.json.decode(succeed(world.program.run("dead-letters", "list", "--json")))["dead_letters"]
        got = {(letter["sink"] or letter["stage"], letter["event_id"]): letter["reason"] for letter in listed}
        wanted = {(sink, key) for sink in ("clickhouse", "redis", "http") for key in odd}
        wanted |= {("http", key) for key in poison}
        self.letters = len(got)
        for (sink, key), reason in got.items():
            if (sink, key) not in wanted:
                yield f"a dead letter of {sink} that is not about event {key}: {reason}"
        for sink, key in sorted(wanted - got.keys()):
            yield f"no dead letter of {sink} for event {key}"
        if mended := [str(letter["id"]) for letter in listed if letter["event_id"] in poison]:
            self._stack.api.behave()
            ids = [word for letter in mended for word in ("--id", letter)]
            succeed(world.program.run("dead-letters", "replay", *ids))


class OrdersRound(Round):
    """The same of the example's orders: what the world does to servers, secrets and the replicator itself.

    In half of the rounds the tables are altered as well (`subjects.py`).
    """

    def __init__(self, stack: DevStack, seed: str, cards: Sequence[Fault]) -> None:
        super().__init__(stack, seed, cards)
        self._subject = Orders(random.Random(f"{seed} subject"))  # noqa: S311  not a secret

    def _prepare(self, world: World) -> None:
        self._subject.create(world.dsn)
        world.program.environment |= self._subject.settings

    def _observer(self, world: World) -> Observer:
        return OrdersObserver(world, self._note)

    def _traffic(self, world: World, chance: random.Random) -> Load:
        return self._subject.traffic(world.dsn, chance)

    def _write_last(self, world: World, chance: random.Random) -> None:
        with psycopg.connect(world.dsn, autocommit=True) as connection:
            Shop(connection, chance).trade(5)

    def _differences(self, world: World) -> list[str]:
        letters = [*self._letters(world, set(), set())]
        try:
            self.events, self.repeats = self._subject.judge(world.dsn, self._stack)
        except AssertionError as exc:
            return [*letters, str(exc)]
        return letters


def _repeat(look: Callable[[], None], stop: threading.Event) -> None:
    while not stop.wait(RULE_SECONDS):
        look()


def run(
    minutes: float,
    seed: int,
    *,
    first_round: int = 1,
    round_seconds: float = ROUND_SECONDS,
    cards: int = CARDS,
    only: str = "",
    stream: str = "engagement",
) -> Result:
    """Play whole rounds for so long, at least one. Raises WrongError with what was found."""
    started = time.monotonic()
    rounds: list[Round] = []
    with DevStack(*DevStack.SERVICES, postgres_settings=POSTGRES, redis_settings=DURABLE_REDIS) as stack:
        while not rounds or time.monotonic() - started < minutes * 60:
            number = first_round + len(rounds)
            faults = OF_ORDERS if stream == "orders" else FAULTS
            dealt = [card for card in faults if card.full_name == only] or deal(seed, number, cards, faults)
            this = play(stack, seed, number, dealt, round_seconds, stream=stream)
            rounds.append(this)
            sys.stderr.write(
                f"environment of {stream}: round {number}: {this.events} events, {sum(this.played.values())} faults,"
                f" {dict(this.looks)}, exact\n"
            )
    return Result(
        stream=stream,
        seed=seed,
        rounds=len(rounds),
        seconds=time.monotonic() - started,
        events=sum(one.events for one in rounds),
        letters=sum(one.letters for one in rounds),
        repeats=sum(one.repeats for one in rounds),
        rule_looks=sum(one.rule_looks for one in rounds),
        looks=_sum(one.looks for one in rounds),
        faults=_sum(one.played for one in rounds),
    )


def _sum(counters: Iterator[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for counter in counters:
        total.update(counter)
    return dict(total)


def play(
    stack: DevStack, seed: int, number: int, cards: Sequence[Fault], seconds: float, *, stream: str = "engagement"
) -> Round:
    """One round on a stack whose Redis is durable."""
    this = (OrdersRound if stream == "orders" else Round)(stack, f"{seed}/{number}", cards)
    try:
        this.run(seconds)
    except WrongError as exc:
        again = f"python -m tests.prove --only environment --stream {stream} --seed {seed} --round {number}"
        raise WrongError(f"seed {seed}, round {number} ({again}): {exc}") from exc
    return this
