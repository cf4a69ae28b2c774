"""`make prove`: crash matrix, random chaos, environment matrix, every type. Writes the results to docs/reliability.md.

python -m tests.prove                                              # everything
python -m tests.prove --case answered-redis/interleaved --seed 7   # one case
python -m tests.prove --only environment --seed 7 --round 3        # one round
python -m tests.prove --only environment --fault "events: renamed and back"
python -m tests.prove --list
"""

from __future__ import annotations

import argparse
import platform
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from devstack import DevStack
from tests.prove import chaos, types
from tests.prove.failpoints import PLACES
from tests.prove.matrix import MAX_REPEATS, Case, Outcome, cases, play
from tests.prove.shapes import SHAPES
from tests.prove.subjects import SUBJECTS
from tests.prove.world import rounds as environment
from tests.prove.world.world import FAULTS, WrongError

REPORT = Path(__file__).parents[2] / "docs/reliability.md"
MARKS = "<!-- written by make prove -->", "<!-- until here -->"
OF_ENVIRONMENT = "<!-- written by make prove, environment -->", MARKS[1]
SINKS = ("clickhouse", "redis", "http")
CHAOS_MINUTES, ENVIRONMENT_MINUTES = 30.0, 20.0
ORDERS_SHARE = 0.1
"""Of the time for chaos and for the environment, as much again for orders."""
TYPED_ROWS = 100_000


def main() -> int:
    """Returns 0 if everything is exact, 1 if not, 2 for unusable arguments."""
    args = _arguments()
    if args.list:
        names = [*(case.name for case in cases(0)), *(fault.full_name for fault in FAULTS)]
        sys.stdout.write("".join(f"{name}\n" for name in names))
        return 0
    good = args.only == "environment" or _crashes(args)
    return int(not (good and (args.case or args.only == "crashes" or _environment(args))))


def _crashes(args: argparse.Namespace) -> bool:
    """The crash matrix and chaos."""
    outcomes = _play([case for case in cases(args.seed) if args.case in {None, case.name}])
    report = _table(outcomes)
    sys.stdout.write(report)
    good = all(outcome.good for outcome in outcomes)
    if args.case is not None or not good:
        return good
    minutes = CHAOS_MINUTES if args.minutes is None else args.minutes
    try:
        lines = [
            chaos.run(minutes, args.seed).line(),
            chaos.run(minutes * ORDERS_SHARE, args.seed, stream="orders").line(),
            types.run(args.seed, TYPED_ROWS),
        ]
    except (chaos.WrongError, types.WrongError) as exc:
        sys.stderr.write(f"{exc}\n")
        return False
    found = "\n".join(lines)
    sys.stdout.write(f"{found}\n")
    _write(MARKS, _report(args.seed, report, found))
    return True


def _environment(args: argparse.Namespace) -> bool:
    """The environment matrix. Only a whole run is written down."""
    minutes = ENVIRONMENT_MINUTES if args.minutes is None else args.minutes
    whole = args.round == 1 and not args.fault and args.stream == "engagement"
    try:
        result = environment.run(minutes, args.seed, first_round=args.round, only=args.fault, stream=args.stream)
        lines = [result.line()]
        if whole:
            lines.append(environment.run(minutes * ORDERS_SHARE, args.seed, stream="orders").line())
    except WrongError as exc:
        sys.stderr.write(f"{exc}\n")
        return False
    found = "\n".join(lines)
    sys.stdout.write(f"{found}\n")
    if whole:
        _write(OF_ENVIRONMENT, f"{_day(args.seed)}.\n\n{result.table()}\n```\n{found}\n```\n")
    return True


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.prove", description=__doc__.partition("\n")[0])
    seed = random.randrange(10**6)  # noqa: S311  not a secret
    parser.add_argument("--only", choices=("crashes", "environment"), help="half of it")
    parser.add_argument("--case", metavar="PLACE/SHAPE", help="only this one of the crash matrix; nothing is written")
    parser.add_argument("--fault", default="", metavar="NAME", help="only this one of the environment; likewise")
    parser.add_argument("--stream", choices=SUBJECTS, default="engagement", help="of the environment; likewise")
    parser.add_argument("--round", type=int, default=1, help="of the environment, begin with this one; likewise")
    parser.add_argument("--seed", type=int, default=seed, help="(random)")
    parser.add_argument(
        "--minutes", type=float, help="in whole rounds, of random chaos (30) and of the environment matrix (20)"
    )
    parser.add_argument("--list", action="store_true", help="the cases' and the faults' names")
    args = parser.parse_args()
    if args.case not in {None, *(case.name for case in cases(0))}:
        parser.error(f"there is no case {args.case}; --list names them")
    if args.fault not in {"", *(fault.full_name for fault in FAULTS)}:
        parser.error(f"there is no fault {args.fault!r}; --list names them")
    return args


def _play(chosen: Sequence[Case]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with DevStack(*DevStack.SERVICES) as stack:
        for number, case in enumerate(chosen, 1):
            began = time.monotonic()
            outcome = play(stack, case)
            outcomes.append(outcome)
            verdict = "exact" if outcome.good else f"WRONG, {case.again}: {outcome}"
            seconds = time.monotonic() - began
            sys.stderr.write(f"prove: {number}/{len(chosen)} {case.name}, {seconds:.0f} s: {verdict}\n")
    return outcomes


def _table(outcomes: Sequence[Outcome]) -> str:
    return "".join(f"{line}\n" for line in _lines(outcomes))


def _lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    head = (
        "killed at / shape",
        "events",
        "lost: ClickHouse, Redis, API",
        "wrong: ClickHouse, Redis, API",
        "double under FINAL",
        "replaced by merges",
        "Redis counts, top list: differ",
        f"repeats at the API, at most {MAX_REPEATS:,}",
    )
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for outcome in outcomes:
        cells = (
            f"`{outcome.case.name}`",
            f"{outcome.events:,}",
            ", ".join(str(outcome.lost.get(sink, "?")) for sink in SINKS),
            ", ".join(str(outcome.wrong.get(sink, "?")) for sink in SINKS),
            str(outcome.double),
            f"{outcome.replaced:,}",
            str(outcome.counts),
            f"{outcome.repeats:,}" if not outcome.trouble else "FAILED",
        )
        yield f"| {' | '.join(cells)} |"


def _report(seed: int, table: str, found: str) -> str:
    what = f"{len(PLACES)} places in {len(SHAPES)} shapes"
    return f"{_day(seed)}: {what}.\n\n{table}\nRandom chaos, and every type:\n\n```\n{found}\n```\n"


def _day(seed: int) -> str:
    return f"{datetime.now(UTC).date().isoformat()}, Python {platform.python_version()}, seed {seed}"


def _write(marks: tuple[str, str], report: str) -> None:
    """Replace the text between the marks; the rest is written by hand."""
    first, last = marks
    text = REPORT.read_text(encoding="utf-8")
    new = f"{first}\n{report}{last}"
    REPORT.write_text(re.sub(f"{first}.*?{last}", lambda _: new, text, flags=re.DOTALL), encoding="utf-8")
    sys.stderr.write(f"prove: written to {REPORT.name}\n")


if __name__ == "__main__":
    sys.exit(main())
