"""LDM4TS: latent diffusion over images of series (arXiv:2502.14887), made a forecaster of returns.

What is named here stands beside the forecaster that serves: its network behind the interface of published
LDM4TS models, for bars of one's own. It is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barcast.models.ldm4ts.bars import windows
    from barcast.models.ldm4ts.fitting import Validation, fit, validate
    from barcast.models.ldm4ts.model import LDM4TSModel

__all__ = ["LDM4TSModel", "Validation", "fit", "validate", "windows"]

_MODULES = {
    "bars": ("windows",),
    "fitting": ("Validation", "fit", "validate"),
    "model": ("LDM4TSModel",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
