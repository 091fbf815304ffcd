"""Sequences of features by the bars that had closed: what a multi-timeframe model may know at a time."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barcast.models.errors import DataError


class Bars(NamedTuple):
    """Features of the bars of one timeframe: closes (N,) int64 nanoseconds, rising, and values (N, F)."""

    close_times: NDArray[np.int64]
    values: NDArray[np.floating]


def closed_windows(
    bars: Mapping[str, Bars], at: Sequence[int] | NDArray[np.int64], lookback: Mapping[str, int]
) -> dict[str, Tensor]:
    """The last bars of each timeframe that had closed at each of the times `at` (B,), {name: (B, L, F)}.

    A bar counts from its close on: one that is still forming bears a later close, and is left out. Rows of
    timeframes are matched by time alone. Raises `DataError` where a timeframe has not closed enough bars.
    """
    moments = np.asarray(at, np.int64)
    found = {}
    for timeframe, length in lookback.items():
        if timeframe not in bars:
            raise DataError(f"there are no bars of {timeframe}: give those of {', '.join(lookback)}")
        times, values = bars[timeframe]
        if len(times) != len(values) or (np.diff(times) <= 0).any():
            raise DataError(f"the closes of {timeframe} do not rise with its rows: sort them, each once")
        ends = np.searchsorted(times, moments, side="right")  # (B,): how many had closed
        if len(ends) and ends.min() < length:
            raise DataError(
                f"{timeframe} had {ends.min()} closed bars at {moments[ends.argmin()]}, and {length} are "
                "needed: give a longer history, or begin later"
            )
        rows = ends[:, None] - length + np.arange(length)  # (B, L)
        found[timeframe] = torch.from_numpy(values[rows]).float()
    return found
