"""Training: reproducible, blind to what is withheld, and honest about its choices."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from barcast.models import ConfigError, DataError, HistoricalSimulation, Window, compare
from barcast.models.diffusion import SSSDForecaster
from barcast.models.optimiser import Progress
from barcast.models.trained import Trained
from barcast.models.training import train
from tests.garch import START, simulate
from tests.models.conftest import HORIZONS, LEVELS

HOUR = 3_600_000_000_000


def _train(histories: list[Window], steps: int = 6, **options: object) -> Trained:
    return train(histories, timeframe="1h", horizons=HORIZONS, levels=LEVELS, steps=steps, **options)  # type: ignore[arg-type]


def _state(trained: Trained) -> dict[str, bytes]:
    state: dict[str, Tensor] = trained.net.state_dict()
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def small() -> list[Window]:
    return [simulate("A", 2000, seed=1).window, simulate("B", 1800, seed=1).window]


@pytest.fixture(scope="module")
def base(small: list[Window]) -> Trained:
    torch.manual_seed(1)
    return _train(small)


def test_the_same_bars_and_seed_give_the_same_model(small: list[Window], base: Trained) -> None:
    """Training twice gives the same bits, whatever the global generator; another seed gives others."""
    torch.manual_seed(2)
    again, other = _train(small), _train(small, seed=1)
    assert _state(base) == _state(again)
    assert base.record == again.record
    assert _state(base) != _state(other)


def test_training_leaves_the_global_generator_alone(small: list[Window]) -> None:
    """The state of torch's global generator is the same before and after."""
    before = torch.get_rng_state()
    _train(small, steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_bars_after_until_do_not_exist(small: list[Window]) -> None:
    """Replacing every bar after `until` changes no bit of the model."""
    until = START + 1500 * HOUR
    poisoned = []
    for w in small:
        values = w.values.copy()
        values[1500:] = np.nan
        poisoned.append(Window(w.symbol, w.close_times, values))
    clean, dirty = (_train(bars, steps=2, until=until) for bars in (small, poisoned))
    assert _state(clean) == _state(dirty)
    assert clean.record == dirty.record
    assert clean.record.until == until


def test_the_gate_part_is_not_seen(small: list[Window], base: Trained) -> None:
    """Bars after the validation part change nothing but the hash of the data."""
    clean = base
    poisoned = []
    for w in small:
        values = w.values.copy()
        values[w.close_times > clean.record.validation_end] *= 2
        poisoned.append(Window(w.symbol, w.close_times, values))
    dirty = _train(poisoned)
    assert _state(clean) == _state(dirty)
    assert replace(clean.record, data=dirty.record.data) == dirty.record
    assert clean.record.data != dirty.record.data


def test_progress_and_record_tell_both_losses_of_every_epoch(small: list[Window]) -> None:
    """Each phase reports its steps in order; the record keeps both losses of every look at validation."""
    seen: list[Progress] = []
    record = _train(small, progress=seen.append).record
    for phase, chosen in (("map", record.map_step), ("denoiser", record.denoiser_step)):
        mine = [p for p in seen if p.phase == phase]
        assert [p.step for p in mine] == list(range(7))
        looks = {p.step: (p.crps, p.loss) for p in mine if p.crps is not None}
        candidates = {c.step: (c.crps, c.loss) for c in record.candidates if c.phase == phase}
        assert looks == candidates
        assert candidates[0][1] is None
        assert np.isfinite([loss for _, loss in candidates.values() if loss is not None]).all()
        assert candidates[chosen][0] == min(crps for crps, _ in candidates.values())
    assert [p.done for p in seen if p.step] == list(range(1, 13))


@pytest.mark.parametrize("at", [1, 6, 8, 13])
def test_an_interrupted_training_goes_on_to_the_same_model(
    small: list[Window], base: Trained, tmp_path: Path, at: int
) -> None:
    """Interrupted in either phase and started again, with tables on disk, model and record are the same."""
    seen = 0

    def interrupt(_: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen > at:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        _train(small, state=state, progress=interrupt)
    notes: list[str] = []
    again = _train(small, state=state, progress=lambda p: notes.append(p.note))
    assert "goes on" in notes[0]
    assert len(notes) == 14 - at + 1
    assert _state(again) == _state(base)
    assert again.record == base.record


@pytest.mark.parametrize("options", [{"seed": 1}, {"until": START + 1900 * HOUR}])
def test_other_options_do_not_go_on_from_a_state(
    small: list[Window], tmp_path: Path, options: dict[str, int]
) -> None:
    """A state belongs to its bars and options: with others the training begins anew, to its own bits."""
    state, notes = tmp_path / "state", []
    _train(small, steps=1, state=state)
    found = _train(small, steps=1, state=state, progress=lambda p: notes.append(p.note), **options)
    assert "of other bars or options" in notes[0]
    assert _state(found) == _state(_train(small, steps=1, **options))


def test_the_cap_on_seconds_is_kept_and_recorded(small: list[Window]) -> None:
    """A phase that runs into the cap ends there, and the record says so."""
    now = iter(range(10_000))
    clock: Callable[[], float] = lambda: float(next(now))  # noqa: E731
    capped = _train(small, steps=50, seconds=3.5, clock=clock)
    assert capped.record.capped
    assert max(c.step for c in capped.record.candidates) < 10
    assert not _train(small, steps=2, seconds=1e9, clock=clock).record.capped
    with pytest.raises(ValueError, match="clock"):
        _train(small, seconds=1.0)


@pytest.mark.parametrize(
    ("horizons", "levels", "words"),
    [
        ((), LEVELS, "horizons"),
        ((4, 1), LEVELS, "horizons"),
        ((0, 1), LEVELS, "horizons"),
        ((1,), (0.9, 0.1), "levels"),
        ((1,), (0.5, 1.0), "levels"),
    ],
)
def test_impossible_horizons_and_levels_are_refused(
    small: list[Window], horizons: tuple[int, ...], levels: tuple[float, ...], words: str
) -> None:
    """Horizons and levels that do not rise or have no meaning raise ConfigError with the value."""
    with pytest.raises(ConfigError, match=words):
        train(small, timeframe="1h", horizons=horizons, levels=levels)


def test_one_horizon_is_enough(small: list[Window]) -> None:
    """A model of a single horizon can be trained and forecasts."""
    trained = train(small, timeframe="1h", horizons=(3,), levels=(0.1, 0.5, 0.9), steps=2)
    forecast = SSSDForecaster(trained.net, trained.scaling, trained.levels, "one").forecast(small[:1])[0]
    assert forecast.quantiles.shape == (1, 3)


def test_training_can_start_from_a_model(small: list[Window], base: Trained) -> None:
    """A warm start begins at the given weights, records their id, and refuses another shape."""
    again = _train(small, steps=1, init_from=("abc", base), seed=9)
    assert again.record.init_from == "abc"
    begin = next(c.crps for c in again.record.candidates if c.phase == "map")
    best = min(c.crps for c in base.record.candidates if c.phase == "map")
    assert begin == pytest.approx(best, rel=1e-9)
    with pytest.raises(ConfigError, match="horizons"):
        train(small, timeframe="1h", horizons=(1, 2), levels=LEVELS, steps=2, init_from=("abc", base))


def test_a_symbol_with_too_few_bars_is_left_out_and_named(small: list[Window]) -> None:
    """A new listing does not stop the training; the record says that it was left out."""
    record = _train([*small, simulate("NEW", 300, seed=1).window], steps=2).record
    assert record.symbols == ("A", "B")
    assert record.left_out == ("NEW",)


@pytest.mark.parametrize("bars", [8, 10, 12, 10_000])
def test_a_symbol_that_stands_still_is_left_out_and_named(small: list[Window], bars: int) -> None:
    """A symbol whose price moves in less than a tenth of its bars does not stop the others, and is named."""
    held = np.arange(len(small[0])) // bars * bars
    trained = _train([*small, Window("HALTED", small[0].close_times, small[0].values[held])], steps=2)
    if bars != 10:
        assert trained.record.left_out == (("HALTED",) if bars > 10 else ())
    assert np.isfinite([c.crps for c in trained.record.candidates]).all()


def test_unusable_bars_are_refused(small: list[Window]) -> None:
    """No bars, too few, only flat symbols and a hole in the numbers raise DataError that says what to do."""
    flat = Window("FLAT", small[0].close_times, np.ones((2000, 5)))
    broken = Window("BAD", small[0].close_times, small[0].values.copy())
    broken.values[900, 4] = np.nan
    short = Window("A", small[0].close_times[:500], small[0].values[:500])
    for histories, words in (
        ([], "no bars closed"),
        ([short], "give at least"),
        ([flat], "FLAT closes unchanged .* leave it out"),
        ([short, flat], "no symbol is left .* A has .* give at least .* FLAT closes unchanged"),
        ([small[0], broken], "BAD has an unusable bar at row 900"),
    ):
        with pytest.raises(DataError, match=words):
            _train(histories)
    with pytest.raises(DataError, match="no bars closed by"):
        _train(small, until=START)


def test_a_trained_model_beats_historical_simulation(trained: Trained, histories: list[Window]) -> None:
    """On bars that training did not use, the CRPS is below that of historical simulation."""
    forecaster = SSSDForecaster(trained.net, trained.scaling, LEVELS, "test")
    baseline = HistoricalSimulation("1h", HORIZONS, LEVELS)
    since, until = trained.record.validation_end, histories[0].close_time
    mine, theirs = compare([forecaster, baseline], histories, since=since, until=until, stride=3)
    assert mine.normalised < theirs.normalised
