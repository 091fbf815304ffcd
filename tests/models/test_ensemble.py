"""Quantile averaging: weights from validation alone, members that see only their own windows."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from barcast.models import ConfigError, DataError, Window, ensemble
from barcast.models.catalog import BASELINES
from barcast.models.checkpoint import save
from barcast.models.ensemble import Ensemble, Member, fit, train
from barcast.models.gbm import Boosted
from barcast.models.origins import split
from barcast.models.scores import pinball
from barcast.models.trained import Trained
from tests import kinds
from tests.checks import forecast_does_not_depend_on_its_batch
from tests.garch import HOUR, START
from tests.models.conftest import HOLD_OUT, HORIZONS, LEVELS


@pytest.fixture(autouse=True)
def _few_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "ORIGINS", 300)


@pytest.fixture
def trees(trained: Trained) -> Boosted:
    record = replace(trained.record, train_end=START + 2000 * HOUR)
    return kinds.boosted(trained.scaling, trained.levels, record)


def _train(histories: list[Window], *members: Member, **options: object) -> Ensemble:
    outputs = {"timeframe": "1h", "horizons": HORIZONS, "levels": LEVELS, "hold_out": HOLD_OUT}
    return train(histories, members, **outputs | options)


def _loss(w: np.ndarray, y: np.ndarray, q: np.ndarray) -> float:
    return float(pinball(y, (w[:, None, None] * q).sum(0), LEVELS).mean())


def _said(seed: int, shifts: list[float], widths: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Normal outcomes, and quantiles of members that are off by a shift, a width and some noise."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=600)
    normal = np.quantile(rng.normal(size=100_000), LEVELS)
    q = [a + b * normal + 0.3 * rng.normal(size=(600, 1)) for a, b in zip(shifts, widths, strict=True)]
    return y, np.stack(q)


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_the_best_there_are(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without shrinkage no mixture on a fine grid has a lower pinball loss than the one that is found."""
    monkeypatch.setattr(ensemble, "SHRINK", 0.0)
    y, q = _said(seed, [0.4, -0.3, 0.1], [1.0, 0.7, 1.6])
    w = fit(y, q, LEVELS)
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1, abs=1e-12)
    grid = [np.array([a, b, 20 - a - b]) / 20 for a, b in product(range(21), repeat=2) if a + b <= 20]
    best = min(_loss(g, y, q) for g in grid)
    assert _loss(w, y, q) < best * 1.0003


def test_what_validation_cannot_tell_apart_stays_equal() -> None:
    """Equal members get equal weights; a member that is off by far gets nearly none."""
    y, q = _said(1, [0.0, 0.0, 6.0], [1.0, 1.0, 3.0])
    np.testing.assert_allclose(fit(y, np.stack([q[0]] * 4), LEVELS), 0.25, atol=1e-12)
    w = fit(y, q, LEVELS)
    assert w[2] < 0.02
    assert abs(w[0] - w[1]) < 0.2


def test_shrinkage_draws_to_equal_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The more a nat costs, the nearer the weights are to equal ones."""
    y, q = _said(2, [0.0, 0.5], [1.0, 1.2])
    apart = []
    for shrink in (0.0, 0.01, 1.0):
        monkeypatch.setattr(ensemble, "SHRINK", shrink)
        apart.append(abs(fit(y, q, LEVELS)[0] - 0.5))
    assert apart[0] > apart[1] > apart[2]
    assert apart[2] < 0.1


def test_the_forecast_is_the_weighted_mean(trained: Trained, histories: list[Window], tmp_path: Path) -> None:
    """Quantiles are the members' own, each from its own cut of the window, by the horizon's weights."""
    mix = kinds.ensemble(tmp_path, trained)
    forecaster, members = mix.forecaster("mix"), mix.open_members()
    lengths = [m.card.window for m in members]
    assert len(set(lengths)) > 1
    assert (forecaster.card.window, forecaster.card.min_window) == (
        max(lengths),
        max(m.card.min_window for m in members),
    )
    w = Window("SYM1", histories[1].close_times[-1950:], histories[1].values[-1950:])
    cuts = [Window(w.symbol, w.close_times[-n:], w.values[-n:]) for n in lengths]
    said = [m.forecast([c])[0].quantiles for m, c in zip(members, cuts, strict=True)]
    [f] = forecaster.forecast([w])
    np.testing.assert_allclose(f.quantiles, np.einsum("hm,mhq->hq", mix.weights, said), rtol=1e-12)
    assert (np.diff(f.quantiles) >= 0).all()
    assert f.warming == any(m.forecast([c])[0].warming for m, c in zip(members, cuts, strict=True))


def test_a_forecast_is_a_function_of_its_window(
    trained: Trained, histories: list[Window], tmp_path: Path
) -> None:
    """Neither the company nor older bars than the window's change a bit."""
    mix, w = kinds.ensemble(tmp_path, trained), histories[0]
    forecaster, n = mix.forecaster("mix"), 1940  # a few outcomes for the network to be calibrated by
    windows = [Window(w.symbol, w.close_times[k - n : k], w.values[k - n : k]) for k in range(2800, 2808)]
    windows += [Window(w.symbol, w.close_times[:k], w.values[:k]) for k in (120, 400)]
    forecast_does_not_depend_on_its_batch(forecaster, windows, (1, 2, 5, 10))
    short = replace(mix, members=mix.members[::2], weights=np.full((3, 2), 0.5)).forecaster("short")
    n = short.card.window
    assert n < len(w)
    whole, alone = short.forecast([w, Window(w.symbol, w.close_times[-n:], w.values[-n:])])
    assert whole.quantiles.tobytes() == alone.quantiles.tobytes()
    assert not whole.warming
    with pytest.raises(ValueError, match="needs"):
        forecaster.forecast([Window(w.symbol, w.close_times[:100], w.values[:100])])


def test_bars_after_until_change_no_bit(trees: Boosted, histories: list[Window], tmp_path: Path) -> None:
    """Replacing every bar after `until` leaves weights, record and the checkpoint's id as they are."""
    until = int(histories[0].close_times[2699])
    early = replace(trees, record=replace(trees.record, train_end=0, validation_end=0))
    members, poisoned = [Member("hs"), Member("fhs"), Member("0" * 16, early)], []
    for w in histories:
        values = w.values.copy()
        values[w.close_times > until] = np.nan
        poisoned.append(Window(w.symbol, w.close_times, values))
    clean, dirty = (_train(bars, *members, until=until) for bars in (histories, poisoned))
    assert clean.weights.tobytes() == dirty.weights.tobytes()
    assert clean.record == dirty.record
    ids = {save(mix, tmp_path / name) for name, mix in (("clean", clean), ("dirty", dirty))}
    assert len(ids) == 1


def test_weights_come_from_the_validation_part_alone(trees: Boosted, histories: list[Window]) -> None:
    """Held-out bars change no weight, validation bars do; what a member saw is held out for no one."""
    late = replace(trees, record=replace(trees.record, validation_end=trees.record.until))
    mix = _train(histories, Member("hs"), Member("0" * 16, late))
    assert mix.record.validation_end == trees.record.until
    plain = _train(histories, Member("hs"), Member("fhs"))
    assert plain.record.train_end < plain.record.validation_end < plain.record.until

    def changed(since: int, until: int) -> Ensemble:
        bars = []
        for w in histories:
            values = w.values.copy()
            inside = (w.close_times > since) & (w.close_times <= until)
            values[inside] = np.exp(np.log(values[inside]) * 1.02)
            bars.append(Window(w.symbol, w.close_times, values))
        return _train(bars, Member("hs"), Member("fhs"))

    r = plain.record
    assert changed(r.validation_end, r.until).weights.tobytes() == plain.weights.tobytes()
    assert changed(r.train_end, r.validation_end).weights.tobytes() != plain.weights.tobytes()


def test_weights_are_fitted_where_every_member_has_ended_to_learn(
    trees: Boosted, histories: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that has learnt longer moves the beginning; one that has learnt from it all is refused."""
    monkeypatch.setattr(ensemble, "ORIGINS", 10_000)
    plain = _train(histories, Member("hs"), Member("fhs")).record
    middle = (plain.train_end + plain.validation_end) // 2
    longer = replace(trees, record=replace(trees.record, train_end=middle))
    record = _train(histories, Member("hs"), Member("0" * 16, longer)).record
    assert record.train_end == middle
    assert record.origins < plain.origins
    all_of_it = replace(trees, record=replace(trees.record, train_end=plain.until))
    with pytest.raises(
        DataError, match=r"bars up to 2024-05-05T00:00:00Z, .*: 0 forecasts.* a hold-out such as"
    ):
        _train(histories, Member("hs"), Member("0" * 16, all_of_it))


@pytest.mark.parametrize(
    ("names", "said"),
    [((), "members none: give two"), (("hs",), "members hs: give two"), (("hs", "hs"), "different ones")],
)
def test_an_ensemble_has_several_members(names: tuple[str, ...], said: str, histories: list[Window]) -> None:
    """One member, or one twice, is no ensemble."""
    with pytest.raises(ConfigError, match=said):
        _train(histories, *map(Member, names))


def test_members_must_forecast_the_same(trained: Trained, trees: Boosted, histories: list[Window]) -> None:
    """Other horizons or levels, or an ensemble as a member, are refused with the member's name."""
    with pytest.raises(
        ConfigError,
        match=r"horizons of member 0{16} is \(1, 4, 16\), not \(1, 2\).* take its horizons for all",
    ):
        train(
            histories,
            [Member("hs"), Member("0" * 16, trees)],
            timeframe="1h",
            horizons=(1, 2),
            levels=LEVELS,
        )
    inner = _train(histories, Member("hs"), Member("fhs"))
    with pytest.raises(ConfigError, match="member 1111111111111111 is an ensemble"):
        _train(histories, Member("hs"), Member("1" * 16, inner))


def test_every_baseline_can_be_a_member(histories: list[Window]) -> None:
    """Members are found by the names that a configuration knows."""
    assert set(BASELINES) >= {"hs", "fhs"}
    assert _train(histories, *map(Member, ("hs", "fhs"))).weights.shape == (3, 2)


def test_baselines_are_combined_where_a_network_could_not_learn(histories: list[Window]) -> None:
    """Bars that are too few for features and scaling are enough for members that need neither."""
    few = [Window(w.symbol, w.close_times[-900:], w.values[-900:]) for w in histories[:2]]
    new = Window("NEW", few[0].close_times[-40:], few[0].values[-40:])
    broken = Window("BAD", few[0].close_times, np.full((900, 5), np.nan))
    with pytest.raises(DataError, match="give at least"):
        split(few, "1h", HORIZONS, None, validation=0.2, hold_out=0.0)
    record = _train([*few, new], Member("hs"), Member("ewma"), hold_out=0.0).record
    assert (record.symbols, record.left_out) == (tuple(w.symbol for w in few), ("NEW",))
    assert (record.bars, record.until) == (1800, few[0].close_time)
    with pytest.raises(DataError, match="BAD has an unusable bar at row 0"):
        _train([*few, broken], Member("hs"), Member("ewma"))
