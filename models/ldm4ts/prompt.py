"""What a few numbers say of a history: extremes, trend, turbulence, and the lags at which it repeats itself.

Zhong et al. 2025 (arXiv:2502.14887) put such statistics into a sentence for a language model; here the
numbers themselves become tokens. All numbers of a row are functions of that row alone.
"""

import torch
from torch import Tensor

LAGS = 5
"""The strongest lags that are told, as in the paper."""
COUNT = 6 + 2 * LAGS
"""Numbers of a history."""


def numbers(way: Tensor, moves: Tensor, ranges: Tensor) -> Tensor:
    """What is told of histories, (B, `COUNT`), of the way (B, L) to the newest bar, moves and ranges (B, L).

    In order: least, most and median of the way, where it began, the moves' deviation, that of their newest
    quarter, the strongest lags of the ranges as shares of all that are looked at, and how strong they are.
    """
    L = way.shape[1]
    strength, lag = autocorrelation(ranges).topk(min(LAGS, L // 2), -1)
    lack = (0, LAGS - strength.shape[1])
    told = [
        way.amin(1),
        way.amax(1),
        way.median(1).values,
        way[:, 0],
        moves.std(1, correction=0),
        moves[:, -(-3 * L // 4) :].std(1, correction=0),
    ]
    lags = torch.nn.functional.pad((lag + 1) / (L // 2), lack)
    return torch.cat([torch.stack(told, 1), lags, torch.nn.functional.pad(strength, lack)], 1)


def autocorrelation(x: Tensor) -> Tensor:
    """That of series (B, L) at lags 1 to L // 2, (B, L // 2); 0 of a series of equal values."""
    L = x.shape[1]
    centred = (x - x.mean(1, keepdim=True)).double()
    power = torch.fft.rfft(centred, 2 * L).abs() ** 2
    found = torch.fft.irfft(power, 2 * L)[:, : 1 + L // 2]
    size = found[:, :1]
    return torch.where(size > 1e-12, found[:, 1:] / size.clamp(min=1e-12), 0.0).to(x.dtype)
