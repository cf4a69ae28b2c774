"""The lines of an hour as SVG paths, which need no script. `history.py` has the values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

HEIGHT = 40
"""Of a chart, in units of its own. A value is one unit wide."""
LEAST_RATE, LEAST_LAG_SECONDS = 10.0, 1.0
"""What a chart's height stands for at least: in a quiet hour noise is no mountain."""


class Chart(NamedTuple):
    """One line with the area under it."""

    path: str
    most: float
    """The largest value."""
    width: int


def chart(values: Sequence[float | None], least: float) -> Chart:
    """The largest value, or `least`, is at the top. What is not known is a gap."""
    most = max((value for value in values if value is not None), default=0.0)
    return Chart("".join(_steps(values, HEIGHT / max(most, least))), most, len(values))


def _steps(values: Sequence[float | None], scale: float) -> Iterator[str]:
    """Up from the base line, a step a value, and down to it where a gap begins."""
    before: str | None = None
    for place, value in enumerate(values):
        height = None if value is None else f"{HEIGHT - value * scale:.3g}"
        if height == before:
            continue
        if before is not None:
            yield f"H{place}"
        if height is None:
            yield f"V{HEIGHT}"
        else:
            yield f"V{height}" if before is not None else f"M{place} {HEIGHT}V{height}"
        before = height
    if before is not None:
        yield f"H{len(values)}V{HEIGHT}"
