"""From bars to windows, tensors and quantiles. The only package that imports torch or diffusers.

What needs torch is imported by its module: `diffusion` (the forecaster), `training`, `gbm`, `ensemble` and
`checkpoint`.
"""

from barcast.models.bar import Adjustment, Bar
from barcast.models.baselines import FilteredHistoricalSimulation, HistoricalSimulation
from barcast.models.calibration import Calibrated
from barcast.models.catalog import BASELINES, MOST_STEPS, SAMPLERS, check_sampled, check_sampler, open_model
from barcast.models.errors import (
    BarcastError,
    CheckpointError,
    ConfigError,
    DataError,
    DeposedError,
    DiskFullError,
    JournalLostError,
)
from barcast.models.evaluation import Scores, compare, even_stride, score
from barcast.models.fitted import Scaled
from barcast.models.forecast import LEVELS, Card, Coverage, Forecast, Forecaster, default_horizons, usable
from barcast.models.garch import Garch
from barcast.models.window import Verdict, Window, Windows

__all__ = [
    "BASELINES",
    "LEVELS",
    "MOST_STEPS",
    "SAMPLERS",
    "Adjustment",
    "Bar",
    "BarcastError",
    "Calibrated",
    "Card",
    "CheckpointError",
    "ConfigError",
    "Coverage",
    "DataError",
    "DeposedError",
    "DiskFullError",
    "FilteredHistoricalSimulation",
    "Forecast",
    "Forecaster",
    "Garch",
    "HistoricalSimulation",
    "JournalLostError",
    "Scaled",
    "Scores",
    "Verdict",
    "Window",
    "Windows",
    "check_sampled",
    "check_sampler",
    "compare",
    "default_horizons",
    "even_stride",
    "open_model",
    "score",
    "usable",
]
