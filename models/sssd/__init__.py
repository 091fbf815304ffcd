"""SSSD: a quantile map for every horizon, and a diffusion model of how the horizons move together.

What is named here stands beside the network that serves: the same parts behind the interface of published
SSSD models, for sequences of features of several timeframes. It is imported when it is asked for, so that the
network does not bring diffusers with it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barcast.models.sssd.config import SSSDConfig
    from barcast.models.sssd.features import Bars, closed_windows
    from barcast.models.sssd.model import ImprovedSSSDModel, SSSDModel, fit
    from barcast.models.sssd.pipeline import NOISE_SCHEDULE, SSSDPipeline
    from barcast.models.sssd.timing import benchmark_improvement

__all__ = [
    "NOISE_SCHEDULE",
    "Bars",
    "ImprovedSSSDModel",
    "SSSDConfig",
    "SSSDModel",
    "SSSDPipeline",
    "benchmark_improvement",
    "closed_windows",
    "fit",
]

_MODULES = {
    "config": ("SSSDConfig",),
    "features": ("Bars", "closed_windows"),
    "model": ("ImprovedSSSDModel", "SSSDModel", "fit"),
    "pipeline": ("NOISE_SCHEDULE", "SSSDPipeline"),
    "timing": ("benchmark_improvement",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
