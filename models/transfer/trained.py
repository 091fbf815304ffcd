"""What training yields: a stress generator's parts, and the record of how they came about."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from barcast.models.trained import Past
from barcast.models.transfer.config import TransferConfig
from barcast.models.transfer.latent import LatentScale
from barcast.models.transfer.network import VelocityNetwork
from barcast.models.transfer.regimes import RegimeRule

PROBABILITIES = (0.05, *(k / 10 for k in range(1, 10)), 0.95)
"""Of the quantiles of levels: scenarios are no more extreme than nine in ten windows of their regime."""


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
class Transfer:
    """A network, the scale of its latents, the rule of regimes, what was measured of both, and their history.

    `elasticity` is by how much volume grows with volatility, both as logarithms. `levels` (R, K) are the
    quantiles, at `PROBABILITIES`, of the level of real windows of each regime: the logarithm of their
    volatility over what is usual.
    """

    net: VelocityNetwork
    scale: LatentScale
    rule: RegimeRule
    elasticity: float
    levels: NDArray[np.float64]
    config: TransferConfig
    record: TransferRecord
