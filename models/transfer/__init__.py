"""Stress scenarios by regime transfer: the same market, with the texture of a crisis. Not a forecast.

What is named here is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barcast.models.transfer.config import TransferConfig
    from barcast.models.transfer.dataset import (
        References,
        RegimeLatentDataset,
        build_style_indices_cache,
        collected,
    )
    from barcast.models.transfer.generator import Scenario, StressScenarioGenerator
    from barcast.models.transfer.regimes import REGIMES, RegimeRule
    from barcast.models.transfer.stored import load_generator, save_generator
    from barcast.models.transfer.trained import Transfer
    from barcast.models.transfer.training import train

__all__ = [
    "REGIMES",
    "References",
    "RegimeLatentDataset",
    "RegimeRule",
    "Scenario",
    "StressScenarioGenerator",
    "Transfer",
    "TransferConfig",
    "build_style_indices_cache",
    "collected",
    "load_generator",
    "save_generator",
    "train",
]

_MODULES = {
    "config": ("TransferConfig",),
    "dataset": ("References", "RegimeLatentDataset", "build_style_indices_cache", "collected"),
    "generator": ("Scenario", "StressScenarioGenerator"),
    "regimes": ("REGIMES", "RegimeRule"),
    "stored": ("load_generator", "save_generator"),
    "trained": ("Transfer",),
    "training": ("train",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
