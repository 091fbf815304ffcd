"""Windows of known regimes as latents, and references of a regime that are never the source."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Generator, Tensor

from barcast.models.errors import DataError
from barcast.models.transfer.latent import LatentScale
from barcast.models.transfer.regimes import (
    BARS,
    LEAST,
    REFERENCE,
    REGIMES,
    Ints,
    Measures,
    RegimeRule,
    first_end,
    measured,
    usable,
)
from barcast.models.window import Window

MOST = 20_000
"""Windows that are learnt from: their latents take 80 MB."""
STRIDE = 16
"""Bars from a window to the next, where there are no more than `MOST`."""
FEWEST = 16
"""Windows of a regime, below which it is not learnt."""
PIECE = 1024  # windows that are encoded at once


@dataclass(frozen=True, slots=True, eq=False)
class Collected:
    """n windows of several histories: returns over what was usual, measures, and where they are.

    `returns` (n, BARS) float32; `symbol` (n,) the history's number, `end` (n,) the number of its last bar and
    `close` (n,) its close in nanoseconds; `volume` (n,) the logarithm of the mean volume over that of the
    bars before, not finite where there was none. They are in order of symbol and end.
    """

    returns: NDArray[np.float32]
    measures: Measures
    symbol: Ints
    end: Ints
    close: Ints
    volume: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.end)

    def begun(self, histories: Collection[Window]) -> Ints:
        """The closes before the windows' first bars, (n,) nanoseconds."""
        parts = [w.close_times[self.end[self.symbol == k] - BARS] for k, w in enumerate(histories)]
        return np.concatenate(parts)

    def only(self, keep: NDArray[np.bool_]) -> "Collected":
        """Some of the windows."""
        return Collected(
            self.returns[keep],
            self.measures.only(keep),
            self.symbol[keep],
            self.end[keep],
            self.close[keep],
            self.volume[keep],
        )


def collected(histories: Collection[Window], most: int = MOST) -> Collected:
    """Windows of histories, at most about `most`, evenly spread; those that stand still are left out.

    Raises `DataError` where there is none.
    """
    ends = [len(w) - first_end() for w in histories]
    stride = max(STRIDE, -(-sum(max(0, n) for n in ends) // most))
    parts = [_of(w, number, stride) for number, w in enumerate(histories) if len(w) > first_end()]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise DataError(
            f"no window of {BARS} bars that move has {LEAST} bars before it: give longer histories, or other "
            "symbols"
        )
    measures = [[getattr(p.measures, name) for p in parts] for name in ("usual", "level", "way", "fall")]
    return Collected(
        np.concatenate([p.returns for p in parts]),
        Measures(*(np.concatenate(each) for each in measures)),
        np.concatenate([p.symbol for p in parts]),
        np.concatenate([p.end for p in parts]),
        np.concatenate([p.close for p in parts]),
        np.concatenate([p.volume for p in parts]),
    )


def _of(w: Window, number: int, stride: int) -> Collected:
    ends = np.arange(first_end(), len(w), stride)
    measures = measured(w, ends)
    moving = usable(measures)
    ends, measures = ends[moving], measures.only(moving)
    r = np.diff(np.log(w.values[:, 3]), prepend=np.log(w.values[0, 3]))
    returns = sliding_window_view(r, BARS)[ends - BARS + 1] / measures.usual[:, None]
    sums = np.concatenate([[0.0], np.cumsum(w.values[:, 4])])
    start = ends - BARS + 1
    before = np.maximum(start - REFERENCE, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        own, usual = (sums[ends + 1] - sums[start]) / BARS, (sums[start] - sums[before]) / (start - before)
        volume = np.log(own / usual)
    whose = np.full(len(ends), number)
    return Collected(returns.astype(np.float32), measures, whose, ends, w.close_times[ends], volume)


@dataclass(frozen=True, slots=True, eq=False)
class RegimeLatentDataset:
    """n windows as latents (n, 4, H, W) float32, their regimes (n,), symbols (n,) and last bars (n,).

    They are in order of symbol and bar; regimes are places in `REGIMES`.
    """

    latents: Tensor
    regimes: Tensor
    symbols: Tensor
    ends: Tensor
    scale: LatentScale

    def __len__(self) -> int:
        return len(self.regimes)

    @classmethod
    def of(
        cls, windows: Collected, rule: RegimeRule, scale: LatentScale | None = None
    ) -> "RegimeLatentDataset":
        """Encode windows; by their own scale where none is given."""
        returns = torch.from_numpy(windows.returns)
        scale = scale or LatentScale.measure(returns)
        latents = torch.cat([scale.encode(some) for some in torch.split(returns, PIECE)])
        regimes = torch.from_numpy(rule.labels(windows.measures))
        return cls(latents, regimes, torch.from_numpy(windows.symbol), torch.from_numpy(windows.end), scale)


def build_style_indices_cache(dataset: RegimeLatentDataset) -> dict[int, Tensor]:
    """The windows of each regime that there is, rising: made once, so that a draw looks nothing up."""
    found = {k: (dataset.regimes == k).nonzero()[:, 0] for k in range(len(REGIMES))}
    return {k: at for k, at in found.items() if len(at)}


class References:
    """Real windows of a regime, for sources of another or the same one: none that shares a bar with it.

    Each draw takes as long as any other, however many windows there are.
    """

    def __init__(self, dataset: RegimeLatentDataset) -> None:
        self.dataset = dataset
        self.indices = build_style_indices_cache(dataset)
        key = dataset.symbols * (int(dataset.ends.max()) + 2 * BARS) + dataset.ends
        self._first = torch.zeros(len(REGIMES), len(dataset), dtype=torch.int64)
        self._count = torch.zeros_like(self._first)  # of those of a regime, the ones that overlap a source
        for regime, at in self.indices.items():
            self._first[regime] = torch.searchsorted(key[at], key - BARS, right=True)
            self._count[regime] = torch.searchsorted(key[at], key + BARS) - self._first[regime]

    def draw(self, regimes: Tensor, generator: Generator, sources: Tensor | None = None) -> Tensor:
        """Windows of the regimes (B,), by index (B,); none shares a bar with its source (B,).

        Raise `DataError` for a regime that has no such window.
        """
        found = torch.empty_like(regimes)
        uniform = torch.rand(len(regimes), generator=generator, dtype=torch.float64)
        for regime in sorted(set(regimes.tolist())):
            rows = (regimes == regime).nonzero()[:, 0]
            at = self.indices.get(regime)
            own = torch.zeros(2, len(rows), dtype=torch.int64)
            if sources is not None:
                own = torch.stack([self._first[regime, sources[rows]], self._count[regime, sources[rows]]])
            left = (0 if at is None else len(at)) - own[1]
            if at is None or int(left.min()) < 1:
                raise DataError(
                    f"no window of the regime {REGIMES[regime]} is left to refer to: give longer histories"
                )
            place = (uniform[rows] * left).long()
            found[rows] = at[torch.where(place >= own[0], place + own[1], place)]
        return found

    def sample_style_batch(
        self, target_ids: Tensor, generator: Generator, sources: Tensor | None = None
    ) -> Tensor:
        """Latents (B, 4, H, W) of real windows of the regimes `target_ids` (B,), see `draw`."""
        return self.dataset.latents[self.draw(target_ids, generator, sources)]
