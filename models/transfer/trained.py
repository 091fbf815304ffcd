"""What training yields: a stress generator's parts, and the record of how they came about."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barcast.models.trained import Past
from barcast.models.transfer.config import TransferConfig
from barcast.models.transfer.latent import LatentScale
from barcast.models.transfer.network import PLAIN, VelocityNetwork
from barcast.models.transfer.regimes import RegimeRule

PROBABILITIES = (0.02, *(k / 10 for k in range(1, 10)), 0.98)
"""Of the quantiles by which levels are compared."""


@dataclass(frozen=True, slots=True)
class TransferRecord(Past):
    """How a stress generator came about; `origins` are windows."""

    timeframe: str
    seed: int
    windows: tuple[int, ...]  # of each regime
    flow_step: int  # chosen on windows that were not learnt from
    energy_step: int
    flow_error: float  # of the velocity on these, before the second phase
    distance: float  # of texture and content on these, after it
    capped: bool  # the cap on seconds ended a phase early: not reproducible


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """How volatile made windows came out, and how volatile real ones of their regime are.

    `made` (R, R, K) are quantiles of the level of windows of one regime in another, `real` (R, K) those of
    real windows; a level is the logarithm of the volatility over what is usual.
    """

    made: NDArray[np.float64]
    real: NDArray[np.float64]

    def shift(self, r: Tensor, own: Tensor, target: Tensor, cfg_scale: float) -> Tensor:
        """By which factor (B, 1) returns (B, N) of regimes (B,) in others (B,) are as volatile as real ones.

        The level goes from its quantile among what was made to that of what is real; beyond the outermost
        ones the step is theirs, so that more severe stays more severe. With less than plain guidance it goes
        a part of that way.
        """
        level = r.square().mean(1).sqrt().log().numpy()
        found = np.empty(len(r))
        for k, (a, b) in enumerate(zip(own.tolist(), target.tolist(), strict=True)):
            found[k] = np.interp(level[k], self.made[a, b], self.real[b] - self.made[a, b])
        return torch.from_numpy(np.exp(min(1.0, cfg_scale / PLAIN) * found))[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """A network, the scale of its latents, the rule of regimes, what was measured of both, and their history.

    `elasticity` is by how much volume grows with volatility, both as logarithms.
    """

    net: VelocityNetwork
    scale: LatentScale
    rule: RegimeRule
    elasticity: float
    levels: Levels
    config: TransferConfig
    record: TransferRecord
