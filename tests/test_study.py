"""The study: every variant changes what is forecast, and what is computed is not computed again."""

import json

import pytest

from barcast.models import optimiser, training
from tests.bench import study
from tests.bench.study import Cells, Fold, markdown, summary
from tests.bench.variants import VARIANTS
from tests.garch import HOUR, windows

QUICK = {
    "LEAST_STEPS": 8,
    "MOST_STEPS": 8,
    "MAP_RATE": 5e-2,
    "DENOISER_RATE": 1e-2,
    "LOOK_ORIGINS": 60,
    "LOOK_PATHS": 4,
    "LOOK_SAMPLES": 16,
    "BATCH": 16,
    "DRAWS": 2,
}
"""A training of a blink, at rates that change something."""


@pytest.fixture(scope="module")
def fold() -> Fold:
    histories = windows(1, 2200, seed=7, season=True)  # calibration begins at 1,921
    last = histories[0].close_time
    return Fold("simulated", "0" * 64, "1h", histories, last - 60 * HOUR, last)


@pytest.fixture
def quick(monkeypatch) -> None:
    for name, value in QUICK.items():
        monkeypatch.setattr(training, name, value)
    monkeypatch.setattr(optimiser, "EPOCHS", 2)


def test_every_variant_is_another_forecaster_at_the_same_origins(fold, tmp_path, quick):
    """Each patch still bites; the report has a row for each, and a second run finds all cells."""
    cells = Cells(tmp_path / "study", minutes=2)
    found = {v.name: cells.compute(fold, v, 0) for v in VARIANTS}
    losses = {name: json.dumps(cell["losses"]) for name, cell in found.items()}
    assert losses.pop("full") in (losses["map"], losses["diffusion"])
    assert losses.pop("base") not in (losses["map"], losses["diffusion"])  # where its map stays static
    assert len(set(losses.values())) == len(losses), losses.keys()
    assert all(cells.path(fold, v, 0).exists() for v in VARIANTS)
    assert not any(cells.path(fold, v, 1).exists() for v in VARIANTS if v.seeded)
    assert not list(tmp_path.rglob("*.training"))

    result = summary(list(found.values()))
    table = markdown(result)
    assert all(f"| `{v.name}` {v.what} | " in table for v in VARIANTS)
    assert result["variants"]["static"]["mean"]["static"] == {"gain": 0.0, "error": 0.0}


def test_another_program_or_other_bars_have_cells_of_their_own(fold, tmp_path):
    """A cell is named by all that it depends on."""
    cells = Cells(tmp_path / "study", minutes=2)
    paths = {cells.path(fold, v, seed) for v in VARIANTS if v.seeded for seed in range(3)}
    other = study.replace(fold, digest="1" * 64)
    paths |= {cells.path(other, v, 0) for v in VARIANTS}
    cells.code = "another"
    paths |= {cells.path(fold, v, 0) for v in VARIANTS}
    assert len(paths) == 3 * sum(v.seeded for v in VARIANTS) + 2 * len(VARIANTS)


def test_an_interrupted_training_goes_on_to_the_same_scores(fold, tmp_path, quick, monkeypatch):
    """What a cell says does not depend on how often it was begun; what was finished is not begun again."""
    full = next(v for v in VARIANTS if v.name == "full")
    whole = Cells(tmp_path / "whole", minutes=2).compute(fold, full, 0)
    save = optimiser._Loop._save
    saved = []

    def interrupted(*args):
        save(*args)
        saved.append(args[2].step)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(optimiser._Loop, "_save", interrupted)
    cells = Cells(tmp_path / "cut", minutes=2)
    with pytest.raises(KeyboardInterrupt):
        cells.compute(fold, full, 0)
    assert [path.suffix for path in cells.folder.iterdir()] == [".training"]
    assert cells.compute(fold, full, 0)["losses"] == whole["losses"]
    assert saved == [0, 4, 8, 0, 4, 8]
    alone = next(v for v in VARIANTS if v.name == "map")
    cells.compute(fold, alone, 0)
    assert len(saved) == 6
