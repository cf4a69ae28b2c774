"""`make prove`: the whole crash matrix, then random chaos. Writes the results to docs/reliability.md.

python -m tests.prove                                          # everything
python -m tests.prove --case answered-redis/interleaved --seed 7   # one case
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
from tests.prove import chaos
from tests.prove.failpoints import PLACES
from tests.prove.matrix import MAX_REPEATS, Case, Outcome, cases, play
from tests.prove.shapes import SHAPES

REPORT = Path(__file__).parents[2] / "docs/reliability.md"
MARKS = "<!-- written by make prove -->", "<!-- until here -->"
SINKS = ("clickhouse", "redis", "http")


def main() -> int:
    """Returns 0 if everything is exact, 1 if not, 2 for unusable arguments."""
    args = _arguments()
    if args.list:
        sys.stdout.write("".join(f"{case.name}\n" for case in cases(0)))
        return 0
    chosen = [case for case in cases(args.seed) if args.case in {None, case.name}]
    outcomes = _play(chosen)
    if args.case is not None:
        sys.stdout.write(_table(outcomes))
        return int(not outcomes[0].good)
    report = _table(outcomes)
    sys.stdout.write(report)
    if not all(outcome.good for outcome in outcomes):
        return 1
    try:
        result = chaos.run(args.minutes, args.seed)
    except chaos.WrongError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    sys.stdout.write(f"{result.line()}\n")
    _write(_report(args.seed, report, result))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.prove", description=__doc__.partition("\n")[0])
    seed = random.randrange(10**6)  # noqa: S311  not a secret
    parser.add_argument("--case", metavar="PLACE/SHAPE", help="only this one; nothing is written")
    parser.add_argument("--seed", type=int, default=seed, help="(random)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of random chaos, in whole rounds (30)")
    parser.add_argument("--list", action="store_true", help="the cases' names")
    args = parser.parse_args()
    if args.case not in {None, *(case.name for case in cases(0))}:
        parser.error(f"there is no case {args.case}; --list names them")
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


def _report(seed: int, table: str, result: chaos.Result) -> str:
    day = datetime.now(UTC).date().isoformat()
    what = f"{len(PLACES)} places in {len(SHAPES)} shapes"
    head = f"{day}, Python {platform.python_version()}, seed {seed}: {what}."
    return f"{head}\n\n{table}\nRandom chaos:\n\n```\n{result.line()}\n```\n"


def _write(report: str) -> None:
    """Replace the text between the marks; the rest is written by hand."""
    first, last = MARKS
    text = REPORT.read_text(encoding="utf-8")
    new = f"{first}\n{report}{last}"
    REPORT.write_text(re.sub(f"{first}.*{last}", lambda _: new, text, flags=re.DOTALL), encoding="utf-8")
    sys.stderr.write(f"prove: written to {REPORT.name}\n")


if __name__ == "__main__":
    sys.exit(main())
