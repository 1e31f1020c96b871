"""Allowed values of a setting, written beside its default: `bounded(1e-3, above=0)`.

`afa.checks` reads them. A tuple keeps its bounds when each of its values does.
"""

import dataclasses
from typing import Any

KEY = "bounds"
# What is wrong with a text that is no value of a field's type.
KINDS = {
    int: "is no whole number",
    float: "is no number",
    bool: "is neither True nor False",
    tuple: "is no list of such values with spaces between them",
    str: "is no text",
}
Number = int | float


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a number, or each value of a tuple, must keep to; None: no such limit.

    Attributes:
      above, least: the smallest value, without and with the limit itself.
      below, most: the largest value, likewise.
      unique: no value of a tuple may stand in it twice.
      lengths: allowed lengths of a tuple; empty: any.
    """

    above: Number | None = None
    least: Number | None = None
    below: Number | None = None
    most: Number | None = None
    unique: bool = False
    lengths: tuple[int, ...] = ()

    def hold(self, value: Number) -> bool:
        """Whether a number lies inside; NaN never does."""
        return (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        smallest = self.least if self.above is None else self.above
        largest = self.most if self.below is None else self.below
        if smallest is None or largest is None:
            if self.least == 0:
                return "must not be negative"
            words = {"above": self.above, "at least": self.least,
                     "below": self.below, "at most": self.most}  # fmt: skip
            return "must be " + next(f"{k} {v}" for k, v in words.items() if v is not None)
        left, right = "[" if self.above is None else "(", "]" if self.below is None else ")"
        return f"must lie in {left}{smallest}, {largest}{right}"


@dataclasses.dataclass(frozen=True)
class Duration:
    """What a duration ("500", "20ep", "40%") must keep to, beside its form.

    Attributes:
      share: it may be a percentage.
      most: largest percentage; None: any.
    """

    share: bool = True
    most: Number | None = None


def bounded(
    default: Any,
    *,
    above: Number | None = None,
    least: Number | None = None,
    below: Number | None = None,
    most: Number | None = None,
    unique: bool = False,
    lengths: tuple[int, ...] = (),
) -> Any:
    """A dataclass field with a default and `Bounds`."""
    bounds = Bounds(above, least, below, most, unique, lengths)
    return dataclasses.field(default=default, metadata={KEY: bounds})


def duration(default: str, *, share: bool = True, most: Number | None = None) -> Any:
    """A dataclass field that holds a duration, with its default and `Duration`."""
    return dataclasses.field(default=default, metadata={KEY: Duration(share, most)})
