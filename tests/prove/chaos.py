"""Random chaos: hostile traffic while everything is killed, stalled and cut. Afterwards every sink must be exact.

    python -m tests.prove.chaos --minutes 2 --seed 7
    python -m tests.prove.chaos --stream orders --minutes 2 --seed 7

A run has rounds of about a minute. Each begins with an empty database, slot, checkpoint and sinks. It ends with a
comparison of every field of every event with what PostgreSQL computes. `plan.py` draws what happens from the seed
alone: `--seed 7 --round 3` repeats round 3. Meanwhile the rule is checked: the confirmed position never passes the
checkpoint.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import psycopg

from checkpoint_store import SqlCheckpointStore
from devstack import DevStack
from devstack.process import Service, free_port
from devstack.proxy import Proxy
from replicator.contracts.errors import CheckpointError
from replicator.contracts.events import format_lsn, parse_lsn
from tests.prove.plan import KILLS, WEIGHTS, Deed, Strike, Victim, draw
from tests.prove.subjects import SUBJECTS, Subject
from tests.prove.traffic import settle
from tests.support import environment as ground
from tests.support.program import Program

ROUND_SECONDS = 55.0
CAUGHT_UP_SECONDS = 180.0
LOOK_SECONDS = 0.05  # between two checks of the rule
STOP_SECONDS = 60.0  # more than REPLICATOR_DRAIN_TIMEOUT_SECONDS
MAX_REPEATS = 5_000

SETTINGS = {
    "REPLICATOR_RETRY_MAX_SECONDS": "0.5",
    "REPLICATOR_HTTP_BATCH_SIZE": "250",
    "REPLICATOR_HTTP_MAX_REPEATS": str(MAX_REPEATS),
    "REPLICATOR_HTTP_TIMEOUT_SECONDS": "2",
    "REPLICATOR_CLICKHOUSE_LINGER_SECONDS": "0.2",
    "REPLICATOR_CLICKHOUSE_TIMEOUT_SECONDS": "3",
    "REPLICATOR_REDIS_TIMEOUT_SECONDS": "2",
    "REPLICATOR_FEEDBACK_INTERVAL_SECONDS": "0.5",
    "REPLICATOR_DRAIN_TIMEOUT_SECONDS": "3",
}
"""Pauses that fit into a minute. Real ones differ only in length."""

DURABLE_REDIS = {"appendonly": "yes", "appendfsync": "always"}
POSTGRES = {"max_prepared_transactions": "10"}
MISBEHAVIOUR: Mapping[Deed, Mapping[str, object]] = {
    "errors": {"status": 500, "probability": 0.5},
    "lost answers": {"close": "after", "probability": 0.5},
}
CONFIRMED = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A run that found no fault; otherwise it raises."""

    stream: str
    seed: int
    rounds: int
    seconds: float
    events: int
    repeats: int
    """Events that the API got again."""
    looks: int
    """How often the rule was checked."""
    deeds: dict[str, int]
    """Number of deeds, by victim and deed: `replicator kill`."""

    @property
    def kills(self) -> int:
        """Number of processes killed."""
        return sum(count for name, count in self.deeds.items() if name.partition(" ")[2] in KILLS)

    def line(self) -> str:
        """For a log."""
        victims = Counter[str]()
        for name, count in self.deeds.items():
            victim, _, deed = name.partition(" ")
            victims[victim] += count if deed in KILLS else 0
        killed = ", ".join(f"{victim} {count}" for victim, count in victims.items())
        others = sum(self.deeds.values()) - self.kills
        return (
            f"chaos of {self.stream}: seed {self.seed}, {self.seconds / 60:.1f} min, {self.rounds} rounds,"
            f" {self.kills} kills"
            f" ({killed}), {others} stalls, cuts and errors, {self.events} events, 0 lost, 0 wrong,"
            f" {self.repeats} repeats at the API, the rule held at {self.looks} looks"
        )


class WrongError(Exception):
    """What was found, and how to repeat it."""


class Tormentor:
    """One round: its victims and what is done to them."""

    def __init__(self, stack: DevStack, proxies: Mapping[Victim, Proxy], programs: tuple[Program, Program]) -> None:
        self.deeds = Counter[str]()
        self._services: dict[Victim, Service] = {
            "postgres": stack.postgres,
            "clickhouse": stack.clickhouse,
            "redis": stack.redis,
            "api": stack.api,
        }
        self._stack = stack
        self._proxies = proxies
        self.active, self.spare = programs
        self._over = threading.Event()
        self._failures: list[BaseException] = []

    @contextmanager
    def at_work(self, seed: str, seconds: float) -> Iterator[None]:
        """Run every victim's time line in its own thread; undo everything at the end."""
        threads = [
            threading.Thread(target=self._guarded, args=(lambda victim=victim: self._torment(victim, seed, seconds),))
            for victim in WEIGHTS
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.end()
            for thread in threads:
                thread.join()
        if self._failures:
            raise self._failures[0]

    def watch(self, look: Callable[[], None]) -> None:
        """Repeat this until the round is over. An exception ends the round."""
        while not self._over.wait(LOOK_SECONDS):
            look()
            if self._failures:
                raise self._failures[0]

    def end(self) -> None:
        """Begin no further deeds; undo those under way."""
        self._over.set()

    def wait(self, seconds: float) -> None:
        """Sleep, at most until the round is over."""
        self._over.wait(seconds)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:  # noqa: BLE001  raised again in the round's thread
            self._failures.append(exc)

    def _torment(self, victim: Victim, seed: str, seconds: float) -> None:
        for strike in draw(seed, victim, seconds):
            if self._over.wait(strike.after_seconds):
                return
            self.deeds[f"{victim} {strike.deed}"] += 1
            if victim == "replicator":
                self._torment_replicator(strike)
            else:
                self._torment_server(victim, strike)

    def _torment_server(self, victim: Victim, strike: Strike) -> None:
        service = self._services[victim]
        match strike.deed:
            case "kill":
                service.kill()
                self.wait(strike.seconds)
                service.start()
            case "pause":
                service.pause()
                self.wait(strike.seconds)
                service.resume()
            case "errors" | "lost answers":
                server = self._stack.api if victim == "api" else self._stack.clickhouse
                server.behave(**MISBEHAVIOUR[strike.deed])
                self.wait(strike.seconds)
                server.behave()
            case "down" | "reset" | "stalled" | "mute" | "no answers" | "slow":
                self._proxies[victim].behave(strike.deed)
                self.wait(strike.seconds)
                self._proxies[victim].behave("whole")
            case _:
                raise ValueError(strike.deed)

    def _torment_replicator(self, strike: Strike) -> None:
        active = self.active
        alive(active)
        match strike.deed:
            case "kill":
                end(active)
                self.wait(strike.seconds)
                active.spawn()
            case "pause":
                active.pause()
                self.wait(strike.seconds)
                active.resume()
            case "stop":
                active.process.terminate()
                code = active.process.wait(STOP_SECONDS)
                if not active.ended_in_order:
                    raise WrongError(f"SIGTERM ended it with {code}:\n{active.log[-3000:]}")
                active.spawn()
            case "take over" | "take over from a paused one":
                self._take_over(strike)
            case _:
                raise ValueError(strike.deed)

    def _take_over(self, strike: Strike) -> None:
        """With a standby: the active one dies, or is taken for dead and comes back."""
        first, second = self.active, self.spare
        second.spawn()
        self.wait(strike.seconds)
        if strike.deed == "take over":
            end(first)
        else:
            first.pause()
            self.wait(strike.seconds)
            first.resume()
            self.wait(strike.seconds)
            end(first)
        self.active, self.spare = second, first


def alive(program: Program) -> None:
    """The replicator must not end by itself."""
    if not program.running:
        raise WrongError(f"the replicator ended by itself, with {program.process.returncode}:\n{program.log[-3000:]}")


def end(program: Program) -> None:
    """Send SIGKILL. It must have been alive until then."""
    alive(program)
    program.process.kill()
    program.process.wait()


class Rule:
    """confirmed ≤ checkpoint, at any moment."""

    def __init__(self, dsn: str, program: Program) -> None:
        self.looks = 0
        self._dsn = dsn
        self._program = program
        self._store = SqlCheckpointStore(program.environment["REPLICATOR_CHECKPOINT_URL"])

    def look(self) -> None:
        """Reads the confirmed position first: the checkpoint can only grow until it is read."""
        try:
            with psycopg.connect(self._dsn, connect_timeout=2) as connection:
                row = connection.execute(CONFIRMED, [self._program.slot]).fetchone()
            stored = self._store.load(self._program.slot)
        except (psycopg.OperationalError, CheckpointError):
            return  # one of the databases is down: nothing to compare
        if row is None or row[0] is None or stored is None:
            return
        self.looks += 1
        if parse_lsn(row[0]) > stored.end_lsn:
            raise WrongError(f"confirmed {row[0]}, but the checkpoint is at {format_lsn(stored.end_lsn)}")

    def close(self) -> None:
        """Close the checkpoint store."""
        self._store.close()


class Round:
    """One round, from an empty environment to the comparison."""

    def __init__(self, stack: DevStack, subject: Subject, proxies: Mapping[Victim, Proxy], seed: str) -> None:
        self._stack = stack
        self._subject = subject
        self._proxies = proxies
        self._seed = seed
        self.deeds = Counter[str]()
        self.events = self.repeats = self.looks = 0

    def run(self, seconds: float) -> None:
        """Raises AssertionError or WrongError if anything is wrong."""
        with ExitStack() as cleanup:
            dsn = cleanup.enter_context(ground.fresh_database(self._stack))
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
            environment = self._environment(dsn, folder)
            self._subject.create(dsn)
            programs = [
                Program({**environment, "REPLICATOR_ADMIN_LISTEN": f"127.0.0.1:{free_port()}"}, dsn, folder / name)
                for name in ("first", "second")
            ]
            for program in programs:
                cleanup.callback(program.end)
            programs[0].start()
            tormentor = Tormentor(self._stack, self._proxies, (programs[0], programs[1]))
            try:
                self._break(tormentor, dsn, seconds)
                self._judge(tormentor.active, dsn)
            except Exception as exc:
                logs = "\n".join(program.log[-6000:] for program in programs)
                raise WrongError(f"{type(exc).__name__}: {exc}\n--- logs ---\n{logs}") from exc

    def _environment(self, dsn: str, folder: Path) -> dict[str, str]:
        """Every connection of the replicator goes through a proxy."""
        ground.empty_redis(self._stack)
        ground.empty_clickhouse(self._stack)
        ground.empty_api(self._stack)
        urls: dict[Victim, str] = {
            "postgres": ground.plain_role(self._stack, dsn),
            "clickhouse": self._stack.clickhouse.url,
            "redis": self._stack.redis.url,
            "api": self._stack.api.url,
        }
        ports = {"postgres": self._stack.postgres.port, "clickhouse": self._stack.clickhouse.port}
        ports |= {"redis": self._stack.redis.port, "api": self._stack.api.port}
        through = {name: url.replace(f":{ports[name]}/", f":{self._proxies[name].port}/") for name, url in urls.items()}
        settings = ground.environment(
            through["postgres"], through["clickhouse"], through["redis"], through["api"], folder=folder
        )
        return {**settings, **SETTINGS, **self._subject.settings}

    def _break(self, tormentor: Tormentor, dsn: str, seconds: float) -> None:
        chance = random.Random(f"{self._seed} traffic")  # noqa: S311  not a secret
        rule = Rule(dsn, tormentor.active)
        try:
            with self._subject.traffic(dsn, chance), tormentor.at_work(self._seed, seconds):
                deadline = threading.Timer(seconds, tormentor.end)
                deadline.start()
                try:
                    tormentor.watch(rule.look)
                finally:
                    deadline.cancel()
        finally:
            rule.close()
            self.looks += rule.looks
            self.deeds += tormentor.deeds
        with psycopg.connect(dsn) as connection:
            settle(connection, chance)

    def _judge(self, program: Program, dsn: str) -> None:
        alive(program)
        program.wait_until_caught_up(CAUGHT_UP_SECONDS)
        self.events, self.repeats = self._subject.judge(dsn, self._stack)
        if code := program.stop():
            raise WrongError(f"SIGTERM ended it with {code}")


def run(
    minutes: float,
    seed: int,
    *,
    stream: str = "engagement",
    first_round: int = 1,
    round_seconds: float = ROUND_SECONDS,
) -> Result:
    """Run whole rounds for so long, at least one. Raises WrongError with what was found."""
    started = time.monotonic()
    rounds: list[Round] = []
    with DevStack(*DevStack.SERVICES, postgres_settings=POSTGRES, redis_settings=DURABLE_REDIS) as stack:
        while not rounds or time.monotonic() - started < minutes * 60:
            number = first_round + len(rounds)
            done = play(stack, stream, seed, number, round_seconds)
            rounds.append(done)
            sys.stderr.write(
                f"chaos of {stream}: round {number}: {done.events} events, {sum(done.deeds.values())} deeds, exact\n"
            )
    return Result(
        stream=stream,
        seed=seed,
        rounds=len(rounds),
        seconds=time.monotonic() - started,
        events=sum(one.events for one in rounds),
        repeats=sum(one.repeats for one in rounds),
        looks=sum(one.looks for one in rounds),
        deeds=dict(sum((one.deeds for one in rounds), Counter[str]())),
    )


def play(stack: DevStack, stream: str, seed: int, number: int, seconds: float) -> Round:
    """One round on a stack whose Redis is durable."""
    ports: dict[Victim, int] = {
        "postgres": stack.postgres.port,
        "clickhouse": stack.clickhouse.port,
        "redis": stack.redis.port,
        "api": stack.api.port,
    }
    with ExitStack() as cleanup:
        proxies = {name: cleanup.enter_context(Proxy(port)) for name, port in ports.items()}
        subject = SUBJECTS[stream](random.Random(f"{seed}/{number} subject"))  # noqa: S311  not a secret
        this = Round(stack, subject, proxies, f"{seed}/{number}")
        try:
            this.run(seconds)
        except WrongError as exc:
            again = f"python -m tests.prove.chaos --stream {stream} --seed {seed} --round {number}"
            raise WrongError(f"seed {seed}, round {number} ({again}): {exc}") from exc
    return this


def main() -> int:
    """Returns 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.prove.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--stream", choices=SUBJECTS, default="engagement", help="(engagement)")
    parser.add_argument("--minutes", type=float, default=30.0, help="at least so long, in whole rounds (30)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="(random)")  # noqa: S311  not a secret
    parser.add_argument("--round", type=int, default=1, help="begin with this one (1)")
    args = parser.parse_args()
    try:
        result = run(args.minutes, args.seed, stream=args.stream, first_round=args.round)
    except WrongError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    sys.stdout.write(f"{result.line()}\n{msgspec.json.encode(result.deeds).decode()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
