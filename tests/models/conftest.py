"""A model trained once for all tests of the package, on simulated hourly bars."""

from dataclasses import replace

import pytest
import torch

from barcast.models import Window, training
from barcast.models.trained import Trained
from tests.garch import simulate

HORIZONS = (1, 4, 16)
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
BARS = 3000
STEPS = 24
HOLD_OUT = 0.1


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def histories() -> list[Window]:
    return [simulate(f"SYM{i}", BARS, seed=7, season=True).window for i in range(2)]


@pytest.fixture(scope="session")
def trained(histories: list[Window]) -> Trained:
    """A trained model whose denoiser has been made to matter, whatever its training thought of it."""
    outputs = {"timeframe": "1h", "horizons": HORIZONS, "levels": LEVELS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOOK_ORIGINS", 200)
        patch.setattr(training, "LOOK_PATHS", 40)
        model = training.train(histories, **outputs, steps=STEPS, hold_out=HOLD_OUT)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.net.denoiser.leave.weight.normal_(0, 0.05, generator=generator)
    return replace(model, record=replace(model.record, denoiser_step=STEPS))
