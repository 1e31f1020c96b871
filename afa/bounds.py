"""Allowed values of a setting, given with its default: `bounded(1e-3, above=0)`.

`afa.checks` checks them. For a tuple, they apply to each value.
"""

import dataclasses
from typing import Any

KEY = "bounds"
# Error texts for a value that is not of the field's type.
KINDS = {
    int: "is not a whole number",
    float: "is not a number",
    bool: "is neither True nor False",
    tuple: "is not a list of values separated by spaces",
    str: "is not text",
}
Number = int | float


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Limits of a number, or of each value of a tuple; None: no limit.

    Attributes:
      above, least: lower limit, exclusive and inclusive.
      below, most: upper limit, exclusive and inclusive.
      unique: no value of a tuple may occur twice.
      lengths: allowed lengths of a tuple; empty: any.
    """

    above: Number | None = None
    least: Number | None = None
    below: Number | None = None
    most: Number | None = None
    unique: bool = False
    lengths: tuple[int, ...] = ()

    def contains(self, value: Number) -> bool:
        """Whether a number is within the limits; False for NaN."""
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
    """Limits of a duration ("500", "20ep", "40%").

    Attributes:
      share: whether a percentage is allowed.
      most: largest percentage; None: no limit.
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
    """Returns a dataclass field with a default and `Bounds`."""
    bounds = Bounds(above, least, below, most, unique, lengths)
    return dataclasses.field(default=default, metadata={KEY: bounds})


def duration(default: str, *, share: bool = True, most: Number | None = None) -> Any:
    """Returns a dataclass field for a duration, with a default and `Duration`."""
    return dataclasses.field(default=default, metadata={KEY: Duration(share, most)})
