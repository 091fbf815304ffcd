"""Series as images, three channels: segments by period, Gramian angular field, recurrence plot.

An image shows what was on its left, three quarters of its width, and what is to come on its right. What is
to come can be left out; nothing on the left depends on it. All numbers of a row of a batch are functions of
that row alone.

Shapes: B series, L bars of history, G steps to come, P pixels of a side.
"""

from math import sqrt

import torch
from torch import Tensor

SIZES = (64, 128, 224, 256)
"""Pixels of a side that an image can have: the autoencoder halves them three times."""
AHEAD = 4
"""The share of an image's width that shows what is to come is one in so many."""
LIKELY = (4, 64)
"""Bars of a period, at least and at most."""
REACH = 2.0
"""What `squashed` brings to tanh(1): deviations of a bar's return, of a whole history or of an outcome."""


def squashed(x: Tensor) -> Tensor:
    """Numbers in units of their deviation as pixels, between -1 and 1."""
    return torch.tanh(x / REACH)


def period(x: Tensor) -> Tensor:
    """The period (B,) in bars, a whole number, of each series x (B, L): that of its strongest wave.

    Each series is told by its own values alone. One of no waves, such as of equal values, has the longest
    period.
    """
    L = x.shape[-1]
    most = min(LIKELY[1], L)
    window = torch.hann_window(L, periodic=False, dtype=torch.float64, device=x.device)
    centred = (x - x.mean(-1, keepdim=True)).double() * window
    waves = torch.arange(max(1, -(-L // most)), max(2, L // LIKELY[0] + 1), device=x.device)  # in L bars
    angle = 2 * torch.pi * waves[:, None].double() * torch.arange(L, device=x.device) / L
    power = (centred @ angle.cos().T) ** 2 + (centred @ angle.sin().T) ** 2  # (B, waves)
    strongest = waves[power.argmax(-1)]
    flat = power.amax(-1) <= 1e-12
    found = torch.where(flat, torch.full_like(strongest, most), torch.round(L / strongest).long())
    return found.clamp(min(LIKELY[0], most), most)


def segments(history: Tensor, periods: Tensor, height: int, width: int) -> Tensor:
    """History (B, L) as columns of a period each, the newest bar at the bottom right: (B, height, width).

    `periods` (B,) are in bars. Columns that reach before the first bar show it.
    """
    L, at = history.shape[-1], history.device
    T = periods[:, None, None]
    columns = (L + T - 1) // T
    row = torch.arange(height, device=at)[:, None] * T // height  # 0 .. T - 1
    column = torch.arange(width, device=at) * columns // width  # 0 .. columns - 1
    back = (columns - 1 - column) * T + (T - 1 - row)  # bars before the newest
    place = (L - 1 - back).clamp(min=0)
    return history.gather(1, place.reshape(len(history), -1)).reshape(place.shape)


def images(history: Tensor, periods: Tensor, ahead: Tensor | None, size: int) -> Tensor:
    """Series and what is to come as images (B, 3, P, P), values between -1 and 1.

    `history` (B, L) is the way to the newest bar, which is 0, in deviations of the whole way; `ahead` (B, G)
    the way from there, each step in deviations of its own. Without it the right of the image is 0. The rows
    of its segments are the steps; those of its other channels the bars of history, its columns the steps.
    """
    B, at = len(history), history.device
    left = size - size // AHEAD
    x = squashed(history)
    rows, columns = (_spread(x, n) for n in (size, left))
    shown = [segments(x, periods, size, left), gramian(rows, columns), recurrence(rows, columns)]
    known = torch.stack(shown, 1)
    if ahead is None:
        return torch.cat([known, known.new_zeros(B, 3, size, size - left)], -1)
    y = squashed(ahead)
    steps, across = _spread(y, size), _spread(y, size - left)
    coming = [steps[:, :, None].expand(-1, -1, size - left), gramian(rows, across), recurrence(rows, across)]
    return torch.cat([known, torch.stack(coming, 1)], -1).to(at)


def gramian(rows: Tensor, columns: Tensor) -> Tensor:
    """cos(a + b) of a = arccos of rows (B, n) and b = arccos of columns (B, m): (B, n, m).

    The Gramian angular summation field (Wang and Oates 2015) of values between -1 and 1.
    """
    x, y = rows[:, :, None], columns[:, None, :]
    beside: Tensor = ((1 - x**2).clamp(min=0) * (1 - y**2).clamp(min=0)).sqrt()
    return x * y - beside


def recurrence(rows: Tensor, columns: Tensor) -> Tensor:
    """How near rows (B, n) and columns (B, m) are, from -1, far apart, to 1, equal: (B, n, m).

    An unthresholded recurrence plot (Eckmann et al. 1987) with a Gaussian kernel.
    """
    apart = rows[:, :, None] - columns[:, None, :]
    return 2 * torch.exp(-((apart * sqrt(2)) ** 2)) - 1


def _spread(x: Tensor, n: int) -> Tensor:
    """x (B, L) at n places from its first to its last, (B, n)."""
    L = x.shape[-1]
    at = torch.arange(n, device=x.device, dtype=torch.float64) * ((L - 1) / max(1, n - 1))
    return x[:, at.round().long()]
