"""Raw bars of any price -> what the network sees of them, and outcomes as it says them.

Each number of a row is a function of that row alone, and none has a unit: a price in yen and one in dollars
that moved alike look alike.

Shapes: B rows, L bars of open, high, low, close and volume, F features, T bars to come.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from barcast.models.errors import ConfigError, DataError
from barcast.models.scaling import CLIP, FLOOR, TINY

COLUMNS = ("open", "high", "low", "close", "volume")
SPANS = (1, 4, 16)
"""Bars behind the features."""
FEATURES = 4 * len(SPANS) + 4
LEAST_CONTEXT, MOST_CONTEXT = 32, 2000
"""Bars of a window, at least and at most."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the network sees of B rows, and what makes prices of what it says.

    `features` (B, F) and `sequence` (B, L - 1, 4: return, range, location, volume) have no unit; `deviation`
    (B,) is that of a bar's log return, `price` (B,) what outcomes are measured from, both float64.
    """

    features: Tensor
    sequence: Tensor
    deviation: Tensor
    price: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def only(self, at: Tensor) -> "Seen":
        """Some of the rows, by index."""
        return Seen(self.features[at], self.sequence[at], self.deviation[at], self.price[at])

    def spread(self, steps: Tensor) -> Tensor:
        """The deviation (B, n) of log returns over so many bars (n,), were they independent."""
        return self.deviation[:, None] * steps.to(self.deviation).sqrt()


def seen(ohlcv: Tensor, price: Tensor) -> Seen:
    """Checked bars (B, L, 5) and prices (B,), float64, as the network sees them."""
    o, h, low, c, v = ohlcv.unbind(-1)
    r = torch.log(c[:, 1:] / c[:, :-1])
    gap = torch.log(o[:, 1:] / c[:, :-1])
    p = torch.log(h / low)[:, 1:] ** 2 / (4 * log(2)) + gap**2  # Parkinson's variance, and the gap's
    variance = p.mean(1, keepdim=True).clamp(min=TINY)
    sigma = variance.sqrt()
    width = (h - low)[:, 1:]
    location = torch.where(width > 0, 2 * (c - low)[:, 1:] / width.clamp(min=1e-300) - 1, 0.0)
    typical = v[:, 1:].mean(1, keepdim=True)
    volume = torch.where(typical > 0, torch.log(v[:, 1:] / typical.clamp(min=1e-300) + 0.01), 0.0)
    sequence = torch.stack([r / sigma, 0.5 * torch.log(p / variance + FLOOR) + 0.5, location, volume], -1)
    told = []
    for n in SPANS:
        told.append(0.5 * torch.log(p[:, -n:].mean(1) / variance[:, 0] + FLOOR))
        told.append(r[:, -n:].sum(1) / (sigma[:, 0] * n**0.5))
        told += [location[:, -n:].mean(1), volume[:, -n:].mean(1)]
    square = (r**2).mean(1)
    told.append(0.5 * torch.log(square / variance[:, 0] + FLOOR))
    told.append((r * r.abs()).mean(1) / (square + FLOOR * variance[:, 0]))
    told += [(r == 0).double().mean(1), gap[:, -1] / sigma[:, 0]]
    features = torch.stack(told, 1)
    return Seen(features.clamp(-CLIP, CLIP).float(), sequence.clamp(-CLIP, CLIP).float(), sigma[:, 0], price)


def checked(ohlcv: Any, context: int) -> Tensor:
    """The newest `context` bars of each row, (B, context, 5) float64; `DataError` for what is no bar."""
    if not isinstance(ohlcv, Tensor):
        kind = type(ohlcv)
        raise DataError(f"ohlcv is {kind.__module__}.{kind.__name__}: give a torch tensor (B, L, 5)")
    if ohlcv.dim() != 3 or ohlcv.shape[-1] != len(COLUMNS) or not len(ohlcv):
        one = ": give ohlcv[None], a batch of one" if ohlcv.dim() == 2 else ""
        raise DataError(
            f"ohlcv has the shape {tuple(ohlcv.shape)}, not (B, L, 5), rows of bars of {', '.join(COLUMNS)}"
            + one
        )
    if ohlcv.shape[1] < context:
        raise DataError(
            f"ohlcv has {ohlcv.shape[1]} bars a row, and the model sees {context}: give at least so many"
        )
    x = ohlcv[:, -context:].double()
    price = x[..., :4]
    high, low = x[..., 1], x[..., 2]
    is_high = torch.arange(len(COLUMNS), device=x.device) == 1
    for wrong, why in (
        (~torch.isfinite(x), "is {value}, no finite number"),
        (torch.cat([price <= 0, x[..., 4:] < 0], -1), "is {value}: prices are above 0, volumes not below"),
        ((high < low)[..., None] & is_high, "is {value}, below the low"),
        ((price > high[..., None]) | (price < low[..., None]), "is {value}, outside of low and high"),
    ):
        if wrong.any():
            row, bar, column = wrong.nonzero()[0].tolist()
            value = why.format(value=f"{float(x[row, bar, column]):g}")
            raise DataError(
                f"ohlcv row {row}, bar {bar - context} (the newest is -1): {COLUMNS[column]} {value}; mend "
                "the bar, or leave the row out"
            )
    return x


def prices(current_price: Any, ohlcv: Tensor) -> Tensor:
    """A price for each row, (B,) float64: that which is given, one for all or one each, or the last close."""
    if current_price is None:
        return ohlcv[:, -1, 3]
    B = len(ohlcv)
    try:
        if isinstance(current_price, Tensor):
            found = current_price.detach().to(ohlcv)
        else:
            found = torch.from_numpy(np.array(current_price, np.float64)).to(ohlcv.device)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"current_price = {current_price!r} is no price: give a number, or one for each row"
        ) from error
    if found.shape not in ((), (1,), (B,)):
        raise DataError(
            f"current_price has the shape {tuple(found.shape)}: give one price, or one for each of {B} rows"
        )
    if not (torch.isfinite(found) & (found > 0)).all():
        raise DataError(f"current_price = {current_price!r} holds what is no price above 0: mend it")
    return found.reshape(-1).expand(B)


def outcomes(targets: Any, rows: Seen, longest: int) -> Tensor:
    """The log returns (B, T) float64 to the closes to come (B, T), T being the longest horizon in bars."""
    if not isinstance(targets, Tensor) or targets.shape != (len(rows), longest):
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise DataError(
            f"targets are {shape}: give a tensor ({len(rows)}, {longest}), the closes of the {longest} bars "
            "that follow each row"
        )
    x = targets.detach().to(rows.price)
    wrong = ~(torch.isfinite(x) & (x > 0))
    if wrong.any():
        row, bar = wrong.nonzero()[0].tolist()
        raise DataError(
            f"targets row {row}, bar {bar + 1} ahead: {float(x[row, bar]):g} is no price above 0; mend it, "
            "or leave the row out"
        )
    return torch.log(x / rows.price[:, None])


def windows(bars: Tensor, context: int, ahead: int, every: int = 1) -> tuple[Tensor, Tensor]:
    """Rows of `context` bars and the `ahead` closes that follow each, of the bars (N, 5) of one symbol.

    They are (n, context, 5) and (n, ahead), oldest first, views of `bars`; from one row to the next are
    `every` bars. Raises `DataError` for bars that make no row.
    """
    for name, value in (("context", context), ("ahead", ahead), ("every", every)):
        whole(name, value, 1)
    if not isinstance(bars, Tensor) or bars.dim() != 2 or bars.shape[1] != len(COLUMNS):
        found = tuple(bars.shape) if isinstance(bars, Tensor) else type(bars).__name__
        raise DataError(f"bars are {found}: give a tensor (N, 5) of {', '.join(COLUMNS)}")
    if len(bars) < context + ahead:
        raise DataError(f"{len(bars)} bars make no row: give at least {context} and {ahead} that follow")
    rows = bars[: len(bars) - ahead].unfold(0, context, every).transpose(1, 2)
    return rows, bars[context:, 3].unfold(0, ahead, every)


def whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise `ConfigError` for what is no whole number within these bounds."""
    if type(value) is not int or value < least or (most is not None and value > most):
        upto = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} = {value!r} is not possible: give a whole number {upto}")


def rising(name: str, values: Any, longest: int, count: int) -> tuple[int, ...]:
    """Whole numbers that rise, at most so many; raise `ConfigError` for others."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not 0 < len(values) <= count:
        raise ConfigError(f"{name} = {values!r} is not possible: give 1 to {count} of them in a list")
    for value in values:
        whole(name, value, 1, longest)
    if any(b <= a for a, b in pairwise(values)):
        raise ConfigError(f"{name} = {list(values)} do not rise: sort them, each once")
    return tuple(values)


def flag(name: str, value: Any) -> None:
    """Raise `ConfigError` for what is neither True nor False."""
    if type(value) is not bool:
        raise ConfigError(f"{name} = {value!r} is not possible: give True or False")
