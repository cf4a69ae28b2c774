"""A row on its way to an event: what it and its contents are until then, and why no event can be made of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from enrichment.tables.declared import Join

Draft: TypeAlias = Sequence[Any]
"""A row that has been read: commit_lsn, ordinal, then the values of its own columns in the order of `Tables.own`. Its
time is a datetime; outside Python's years it is text. It is plain: that costs a third of anything with names."""

Content: TypeAlias = tuple[Any, ...]
"""The columns that an event takes over from its row of a dimension, in the order of `Join.fields`."""


class UnfitContent(tuple[Any, ...]):  # noqa: SLOT001  a tuple takes none that hold something
    """One with a value that fits no event. Whoever takes it over is told so; it costs those nothing that do fit."""

    why = ""

    def __iter__(self) -> Iterator[Any]:
        """Raises DerivedUnusable."""
        raise DerivedUnusable(self.why)


def fitting(join: Join, content: Content) -> Content:
    """A content of that dimension, marked if it does not fit."""
    for place, field in join.numbers:
        if not field.type.fits(content[place]):
            unfit = UnfitContent(content)
            unfit.why = f"{join.name}.{field.joined} is not {field.type.words}"
            return unfit
    return content


class RowUnusable(Exception):
    """No event can be made of a row. The text names table, column and what is expected, never a value."""


class DerivedUnusable(RowUnusable):
    """A function of the declaration has failed, or its result, or what an event takes over, does not fit."""


class ShapeUnusable(RowUnusable):
    """A column is missing, or of another type: no event can be made of any row of that shape."""
