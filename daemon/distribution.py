"""Counts of values by size: what a histogram of the metrics is read from."""

from bisect import bisect_left
from collections.abc import Sequence


class Distribution:
    """How many values were at most as large as each bound; for one thread.

    The state is the number of values up to each of the rising `bounds` and above the one before, with those
    above all of them last, and the sum of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value; one below 0, such as a span between two clocks, counts as 0."""
        value = max(0.0, value)
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
