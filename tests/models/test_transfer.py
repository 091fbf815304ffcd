"""Stress scenarios: what their training may see, what they are, and that nothing takes them for history."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Generator, Tensor

from barcast.backtest.scenario import frame, write
from barcast.daemon.calendar import Calendars
from barcast.daemon.history import find_timeframe, read_origins, scan, stamped
from barcast.daemon.timeframe import Timeframe
from barcast.models import Bar, CheckpointError, ConfigError, DataError, Window, open_model, optimiser
from barcast.models import training as forecasting
from barcast.models.checkpoint import load, save
from barcast.models.trained import Trained
from barcast.models.transfer import (
    REGIMES,
    References,
    Scenario,
    StressScenarioGenerator,
    Transfer,
    TransferConfig,
    collected,
    load_generator,
    save_generator,
    train,
    training,
)
from barcast.models.transfer.baselines import bootstrapped
from barcast.models.transfer.losses import texture_distance
from barcast.models.transfer.network import NULL, guided, travel
from barcast.models.transfer.regimes import BARS, LEAST, Ints
from barcast.models.transfer.statistics import rank_correlation, realised_volatility
from tests.garch import HOUR, START, simulate

SMALL = TransferConfig(
    steps=240, energy_steps=2, batch=32, rate=5e-3, width=16, code=16, ode_steps=2, sample_steps=4
)
FEW = replace(SMALL, steps=2, energy_steps=2, batch=8, width=8, code=8, ode_steps=1, max_samples=256)
LEVELS = (0.0015, 0.005)


@pytest.fixture(scope="module", autouse=True)
def _few_looks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOOK_WINDOWS", 32)
        patch.setattr(training, "LOOK_WAYS", 8)
        patch.setattr(optimiser, "EPOCHS", 2)
        yield


@pytest.fixture(scope="module")
def bars() -> list[Window]:
    return [simulate(f"SYM{i}", 4500, seed=i, levels=LEVELS, switch=0.002).window for i in range(4)]


class Drawn(References):
    """Notes which references were drawn for which sources."""

    seen: list[tuple[Tensor, Tensor, Tensor]]

    def draw(self, regimes: Tensor, generator: Generator, sources: Tensor | None = None) -> Tensor:
        """As it is, and noted."""
        found = super().draw(regimes, generator, sources)
        if sources is not None:
            self.seen.append((sources, regimes, found))
        return found


@pytest.fixture(scope="module")
def spied(bars: list[Window]) -> Iterator[tuple[Transfer, Drawn]]:
    """A training, and what its references were."""
    made: list[Drawn] = []

    def spy(dataset: Any) -> Drawn:
        made.append(Drawn(dataset))
        made[-1].seen = []
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "References", spy)
        torch.set_num_threads(1)
        yield train(bars, timeframe="1h", config=SMALL, hold_out=0.2), made[0]


@pytest.fixture(scope="module")
def generator(spied: tuple[Transfer, Drawn]) -> StressScenarioGenerator:
    return StressScenarioGenerator(spied[0], "0123456789abcdef")


@pytest.fixture(scope="module")
def windows(bars: list[Window], generator: StressScenarioGenerator) -> tuple[Tensor, Ints]:
    """Returns of windows and their regimes."""
    found = collected(bars)
    return torch.from_numpy(found.returns), generator.trained.rule.labels(found.measures)


def test_no_reference_of_a_training_is_its_source(spied: tuple[Transfer, Drawn]) -> None:
    """Each energy step compares with real windows of the target regime that share no bar with the source."""
    references = spied[1]
    dataset = references.dataset
    assert len(references.seen) == SMALL.energy_steps
    for sources, targets, found in references.seen:
        assert len(sources) == SMALL.batch
        assert (dataset.regimes[found] == targets).all()
        assert (dataset.regimes[sources] != targets).all()
        apart = (dataset.ends[found] - dataset.ends[sources]).abs()
        assert not ((dataset.symbols[found] == dataset.symbols[sources]) & (apart < BARS)).any()


def test_a_reference_that_is_its_source_stops_the_training(
    bars: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The identity cannot be learnt again by passing the source for the reference."""
    monkeypatch.setattr(
        References,
        "sample_style_batch",
        lambda self, regimes, generator, sources=None: self.dataset.latents[
            torch.arange(len(regimes)) if sources is None else sources
        ],
    )
    with pytest.raises(ValueError, match="its own source"):
        train(bars, timeframe="1h", config=FEW, hold_out=0.2)


def test_the_flow_has_not_collapsed(generator: StressScenarioGenerator, windows: tuple[Tensor, Ints]) -> None:
    """The mean size of the velocity is above .5: noise and windows are about 1.1 apart in each number."""
    scale = generator.trained.scale
    x = scale.encode(windows[0][:64])
    noise = torch.randn(x.shape, generator=Generator().manual_seed(0))
    t = torch.linspace(0, 1, len(x))
    at = t[:, None, None, None]
    with torch.no_grad():
        v = generator.trained.net((1 - at) * noise + at * x, t, torch.full((len(x),), NULL))
    assert float(v.abs().mean()) > 0.5


def test_calm_windows_come_near_the_busy_regime(
    generator: StressScenarioGenerator, windows: tuple[Tensor, Ints]
) -> None:
    """Of the distance to a volatile regime's texture four fifths are gone; the way is the source's."""
    returns, labels = windows
    n = 80
    calm, busy = (
        returns[at[np.linspace(0, len(at) - 1, n).astype(int)]]
        for at in (np.flatnonzero(labels == REGIMES.index(name)) for name in ("calm", "volatile"))
    )
    own, to = torch.zeros(n, dtype=torch.int64), torch.full((n,), REGIMES.index("volatile"))
    found = {s: generator.transfer(calm[:n], own, to, 1, s) for s in (0.0, 1.0, 2.0, 3.0)}
    scale = generator.trained.scale

    def apart(r: Tensor) -> float:
        x, y = scale.encode(r), scale.encode(busy[:n])
        return float(texture_distance(x, y, own, Generator().manual_seed(0)))

    far = apart(calm[:n])
    assert apart(found[2.0]) < 0.2 * far + FLOOR
    assert far > apart(found[0.0]) > apart(found[1.0]) > apart(found[2.0])
    sizes = [float(np.median(realised_volatility(found[s].numpy()))) for s in sorted(found)]
    assert sizes == sorted(sizes)
    way = rank_correlation(found[2.0].numpy(), calm[:n].double().numpy())
    assert np.median(way) > 0.7
    drawn = bootstrapped(calm[:n].double().numpy(), busy.double().numpy(), np.random.default_rng(0))
    assert np.median(way) > np.median(rank_correlation(drawn, calm[:n].double().numpy())) + 0.5


FLOOR = 0.02


def test_a_window_comes_back_from_its_noise(
    generator: StressScenarioGenerator, windows: tuple[Tensor, Ints]
) -> None:
    """To noise and back in its own regime, in 40 steps of Heun: 1 % of its size at most is lost."""
    x = generator.trained.scale.encode(windows[0][:4])
    own = guided(generator.trained.net, torch.from_numpy(windows[1][:4]), 3.0)
    with torch.no_grad():
        z = travel(own, x, 1, 0, 40, "heun")
        again = travel(own, z, 0, 1, 40, "heun")
    assert float((again - x).norm() / x.norm()) < 1e-2


def test_scenarios_are_valid_bars(generator: StressScenarioGenerator, bars: list[Window]) -> None:
    """High above open and close, low below, positive; the price goes on from the real one before."""
    since = int(bars[0].close_times[2000])
    for scenario in generator.generate(bars[0], "crisis", 2, seed=3, since=since):
        [made] = scenario
        k = 2000
        assert made.since == since
        assert made.rows[:k].tobytes() == bars[0].values[:k].tobytes()
        assert (made.times == bars[0].close_times).all()
        open_, high, low, close, volume = made.rows.T
        assert np.isfinite(made.rows).all()
        assert (low > 0).all()
        assert (high >= np.maximum(open_, close)).all()
        assert (low <= np.minimum(open_, close)).all()
        assert (volume >= 0).all()
        gap = np.log(open_[k] / close[k - 1])
        assert abs(gap) < 5 * np.abs(np.log(bars[0].values[1:, 0] / bars[0].values[:-1, 3])).max() + 1e-12
        assert not np.isclose(close[k:], bars[0].values[k:, 3]).all()
        assert "scenario, not forecast: crisis by 0123456789abcdef, seed 3" in made.mark


def test_volume_follows_volatility(generator: StressScenarioGenerator, bars: list[Window]) -> None:
    """By the measured elasticity, bar by bar."""
    elastic = StressScenarioGenerator(replace(generator.trained, elasticity=1.0), "x")
    stiff = StressScenarioGenerator(replace(generator.trained, elasticity=0.0), "x")
    more, same = (g.generate(bars[0], "crisis", seed=1)[0][0] for g in (elastic, stiff))
    k = int(np.searchsorted(same.times, same.since))
    np.testing.assert_allclose(same.rows[:, 4], bars[0].values[:, 4])
    assert more.rows[:, :4].tobytes() == same.rows[:, :4].tobytes()
    assert (more.rows[k:, 4] / same.rows[k:, 4]).mean() > 1.1


def test_a_scenario_is_said_by_its_seed(generator: StressScenarioGenerator, bars: list[Window]) -> None:
    """The same seed gives the same bits, however many are asked for; another seed or number gives others."""
    first, second = generator.generate(bars[:2], "volatile", 2, seed=5)
    again = generator.generate(bars[:2], "volatile", 1, seed=5)[0]
    other = generator.generate(bars[:2], "volatile", 1, seed=6)[0]
    for k in range(2):
        assert first[k].rows.tobytes() == again[k].rows.tobytes()
        assert first[k].rows.tobytes() != second[k].rows.tobytes()
        assert first[k].rows.tobytes() != other[k].rows.tobytes()


def test_a_number_of_numpy_is_the_same_number(generator: StressScenarioGenerator, bars: list[Window]) -> None:
    """Seeds and numbers key the noise by their value, not by their type."""
    plain = generator.generate(bars[0], "volatile", 2, seed=5)
    numbers: Any = np.arange(2)
    made = generator.scenarios(bars[0], "volatile", numbers, np.int64(5))  # type: ignore[arg-type]
    for [one], [other] in zip(plain, made, strict=True):
        assert one.rows.tobytes() == other.rows.tobytes()
        assert (type(other.seed), type(other.number)) == (int, int)


def test_a_portfolio_keeps_the_ranks_of_its_correlations(generator: StressScenarioGenerator) -> None:
    """Which pairs of symbols move together more, and which less, is so in a scenario, too."""
    rng, n = np.random.default_rng(1), LEAST + 1 + 4 * BARS
    common, own = rng.standard_t(5, (n, 1)), rng.standard_t(5, (n, 4))
    r = 0.002 * (np.array([0.9, 0.8, 0.4, 0.0]) * common + np.array([0.3, 0.5, 0.9, 1.0]) * own)
    close = 100 * np.exp(np.cumsum(r, 0))
    times = START + HOUR * np.arange(1, n + 1, dtype=np.int64)
    wide = np.stack([close, close * 1.001, close * 0.999, close, np.ones_like(close)], 2)
    market = [Window(f"S{k}", times, np.ascontiguousarray(wide[:, k])) for k in range(4)]
    first = LEAST + 1
    real = np.corrcoef(r[first:].T)[np.triu_indices(4, 1)]
    for scenario in generator.generate(market, "crisis", 3, seed=2):
        made = np.array([np.diff(np.log(each.rows[first - 1 :, 3])) for each in scenario])
        found = np.corrcoef(made)[np.triu_indices(4, 1)]
        ranks = [x.argsort().argsort() for x in (real, found)]
        assert np.corrcoef(ranks)[0, 1] > 0.8
        assert found.max() > 0.4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_regime": "panic"}, "regime 'panic' is unknown: take one of calm, trend, volatile, crisis"),
        ({"n": 0}, "n = 0 scenarios cannot be"),
        ({"cfg_scale": 7.0}, "cfg_scale = 7.0 cannot be"),
        ({"cfg_scale": float("nan")}, "cfg_scale = nan cannot be"),
        ({"seed": -1}, "seed = -1 cannot be"),
        ({"seed": 1.5}, "seed = 1.5 is no whole number"),
        ({"n": 2.0}, "n = 2.0 is no whole number"),
    ],
)
def test_a_wrong_wish_is_one_sentence(
    generator: StressScenarioGenerator, bars: list[Window], options: dict[str, Any], said: str
) -> None:
    """It names what was given and what can be."""
    with pytest.raises(ConfigError, match=said):
        generator.generate(bars, **{"target_regime": "crisis"} | options)


def test_histories_that_do_not_suffice_are_named(
    generator: StressScenarioGenerator, bars: list[Window]
) -> None:
    """Too few bars before, too few to make up, or bars that stand still."""
    w = bars[0]
    with pytest.raises(DataError, match=f"SYM0 has 10 bars before .*, and {LEAST + 1} are needed"):
        generator.generate(w, "crisis", since=int(w.close_times[10]))
    with pytest.raises(DataError, match="no history to make scenarios of"):
        generator.generate([], "crisis")
    with pytest.raises(DataError, match="SYM0 has no bars to make scenarios of: leave the symbol out"):
        generator.generate([bars[1], w.part(0, 0)], "crisis")
    with pytest.raises(DataError, match="SYM0 has 100 bars to make up"):
        generator.generate(w, "crisis", since=int(w.close_times[-100]))
    still = w.values.copy()
    still[2000:, :4] = 7.0
    with pytest.raises(DataError, match="SYM0 stands still"):
        generator.generate(Window("SYM0", w.close_times, still), "crisis")


def test_a_generator_is_read_as_it_was_written(
    generator: StressScenarioGenerator, bars: list[Window], tmp_path: Path
) -> None:
    """Same id, same bits of its scenarios, same record."""
    model = save_generator(generator.trained, tmp_path / "model")
    again = load_generator(tmp_path / "model")
    assert again.model == model
    assert again.trained.record == generator.trained.record
    one, other = (g.generate(bars[0], "crisis", seed=1)[0][0] for g in (generator, again))
    assert one.rows.tobytes() == other.rows.tobytes()


def test_kinds_do_not_mix(generator: StressScenarioGenerator, trained: Trained, tmp_path: Path) -> None:
    """A generator opened as a forecaster, and a forecaster as a generator, end in one clear sentence."""
    save_generator(generator.trained, tmp_path / "stress")
    save(trained, tmp_path / "model")
    with pytest.raises(CheckpointError, match="is a stress generator, which makes scenarios up"):
        load(tmp_path / "stress")
    with pytest.raises(CheckpointError, match="is a stress generator"):
        open_model(tmp_path / "stress", "1h", None, None)
    with pytest.raises(CheckpointError, match="kind is 'sssd', which makes no scenarios"):
        load_generator(tmp_path / "model")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("scale", {"mean": [0, 0, 0, 0], "deviation": [1, 1, 0, 1]}, "scale is no finite mean"),
        ("scale", {"mean": [0, 0], "deviation": [1, 1]}, "scale is no finite mean"),
        ("regimes", ["calm"], "regimes is"),
        ("latent", {"channels": []}, "latent is"),
        ("rule", {"busy": 1.0}, "missing required field `wild`; train again"),
        ("config", {"width": 1024, "code": 1024}, r"architecture needs \d+ weights or more, and .* copy the"),
        ("config", {"rate": 10**400}, r"config: rate = 10+ cannot be: take a number from 0 on; train again"),
        ("elasticity", None, "Expected `float`, got `null`; train again"),
        ("levels", [[0.0]], "levels are no rising quantiles"),
    ],
)
def test_a_foreign_generator_is_refused(
    generator: StressScenarioGenerator, tmp_path: Path, field: str, value: Any, said: str
) -> None:
    """Whatever its hash says, what is in it is checked."""
    from barcast.models.checkpoint import identity

    save_generator(generator.trained, tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    body = json.loads(path.read_text()) | {field: value}
    path.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="does not fit the contents"):
        load_generator(tmp_path / "model")
    del body["id"]
    body["id"] = identity(body, (tmp_path / "model" / "weights.safetensors").read_bytes())
    path.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match=said):
        load_generator(tmp_path / "model")


@pytest.fixture(scope="module")
def scenario(generator: StressScenarioGenerator, bars: list[Window]) -> list[Scenario]:
    return generator.generate(bars[:2], "crisis", seed=1)[0]


def test_nothing_learns_from_a_scenario(scenario: list[Scenario]) -> None:
    """It is neither window nor bar, and a training that is given one says so."""
    for each in scenario:
        assert not isinstance(each, Window | Bar)
        assert not hasattr(each, "close_times")
        assert not hasattr(each, "values")
    made: Any = scenario
    with pytest.raises(DataError, match="Scenario is no history of bars"):
        forecasting.train(made, timeframe="1h", horizons=(1,), levels=(0.1, 0.9))
    with pytest.raises(DataError, match="Scenario is no history of bars"):
        train(made, timeframe="1h")


def test_no_reader_takes_the_file_of_a_scenario(scenario: list[Scenario], tmp_path: Path) -> None:
    """Its bars are marked in a column by which every reader of bars refuses it."""
    path = tmp_path / "scenario.parquet"
    write(scenario, path)
    calendars = Calendars("24x7", Timeframe.parse("1h"))
    for read in (
        lambda: scan([path], "close", calendars),
        lambda: find_timeframe([path], "close"),
        lambda: stamped(path, "close", calendars),
        lambda: read_origins(path, "close", calendars),
    ):
        with pytest.raises(DataError, match="its bars are a stress scenario's"):
            read()
    rows = pl.read_parquet(path)
    assert rows["scenario"].unique().to_list() == [scenario[0].mark]
    assert rows.equals(frame(scenario))
    assert scan([_unmarked(path)], "close", calendars).collect().height == rows.height  # the control
    with pytest.raises(ConfigError, match="name a file that you may write"):
        write(scenario, tmp_path / "none" / "x.parquet")


def _unmarked(path: Path) -> Path:
    bare = path.with_name("bare.parquet")
    pl.read_parquet(path).drop("scenario").write_parquet(bare)
    return bare


def test_a_training_is_a_function_of_its_seed_and_goes_on(bars: list[Window], tmp_path: Path) -> None:
    """The same bars and seed give the same weights, also after an interruption; another seed gives others."""

    def weights(seed: int, **options: Any) -> bytes:
        made = train(bars[:3], timeframe="1h", config=FEW, seed=seed, **options)
        return b"".join(x.numpy().tobytes() for x in made.net.state_dict().values())

    def stop(p: Any) -> None:
        if (p.phase, p.step) == ("energy", 1):
            raise KeyboardInterrupt

    whole = weights(1)
    with pytest.raises(KeyboardInterrupt):
        weights(1, state=tmp_path / "state", progress=stop)
    assert weights(1, state=tmp_path / "state") == whole
    assert weights(2) != whole


def test_later_bars_are_not_learnt_from(bars: list[Window]) -> None:
    """Whatever stands after `until`, the generator is the same, to the bit of its rule, scale and weights."""
    until = int(bars[0].close_times[3900])
    made = []
    for factor in (1.0, 5.0):
        late = [
            Window(
                w.symbol,
                w.close_times,
                w.values * np.where(w.close_times > until, factor, 1.0)[:, None],
            )
            for w in bars
        ]
        made.append(train(late, timeframe="1h", config=FEW, until=until))
    assert made[0].record == made[1].record
    assert made[0].rule == made[1].rule
    for name in ("mean", "deviation"):
        assert torch.equal(*(getattr(each.scale, name) for each in made))
    assert made[0].levels.tobytes() == made[1].levels.tobytes()
    assert made[0].elasticity == made[1].elasticity > 0
    pairs = zip(made[0].net.parameters(), made[1].net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_command_trains_a_generator(run: Any, bars: list[Window], tmp_path: Path) -> None:
    """`barcast train-stress` with a TOML file; a wrong key of it is one sentence."""
    columns = ("open", "high", "low", "close", "volume")
    frames = [
        pl.DataFrame(
            {"symbol": w.symbol, "close_time": w.close_times, **dict(zip(columns, w.values.T, strict=True))}
        )
        for w in bars[:3]
    ]
    times = pl.from_epoch("close_time", "ns").dt.replace_time_zone("UTC")
    pl.concat(frames).with_columns(times).write_parquet(tmp_path / "bars.parquet")
    config = tmp_path / "stress.toml"
    config.write_text("steps = 2\nenergy_steps = 1\nbatch = 8\nwidth = 8\ncode = 8\node_steps = 1\n")
    options = ["--stamp", "close", "--out", str(tmp_path / "model"), "--config", str(config)]
    status, _, err = run("train-stress", str(tmp_path / "bars.parquet"), *options)
    assert status == 0, err
    assert "stress generator" in err
    assert load_generator(tmp_path / "model").trained.config.steps == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bars.parquet", "model", "stress.toml"]
    config.write_text("stepz = 2\n")
    status, _, err = run("train-stress", str(tmp_path / "bars.parquet"), *options)
    assert status == 78
    assert "stepz: unknown key; did you mean 'steps'?" in err
