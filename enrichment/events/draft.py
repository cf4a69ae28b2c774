"""A row on its way to an event: what it and its contents are until then, and why no event can be made of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

Draft: TypeAlias = Sequence[Any]
"""A row that has been read: commit_lsn, ordinal, then the values of its own columns in the order of `Tables.own`. Its
time is a datetime; outside Python's years it is text. It is plain: that costs a third of anything with names."""

Content: TypeAlias = tuple[Any, ...]
"""The columns that an event takes over from its row of a dimension, in the order of `Join.fields`."""


class RowUnusable(Exception):
    """No event can be made of a row. The text names table, column and what is expected, never a value."""


class DerivedUnusable(RowUnusable):
    """A function of the declaration has failed, or its result does not fit."""


class ShapeUnusable(RowUnusable):
    """A column is missing, or of another type: no event can be made of any row of that shape."""
