"""PostgreSQL's timeline history files, as they are written."""

from __future__ import annotations

import pytest

from replicator.source.timeline import parse_history

AFTER_TWO_FAILOVERS = """\
1\t0/3000148\tno recovery target specified

# somebody's note
2\t1A/B374D848\tbefore 2026-01-08 09:12:44+00
"""


def test_where_each_earlier_timeline_was_left() -> None:
    """Reasons, empty lines and comments do not matter."""
    assert {1: 0x3000148, 2: 0x1A_B374D848} == parse_history(AFTER_TWO_FAILOVERS)
    assert {} == parse_history("")


@pytest.mark.parametrize("content", ["one\t0/1\tx", "1\tnowhere\tx"])
def test_what_is_no_history_is_an_error(content: str) -> None:
    """Nothing is taken for shared because it could not be read."""
    with pytest.raises(ValueError, match=r"one|nowhere"):
        parse_history(content)
