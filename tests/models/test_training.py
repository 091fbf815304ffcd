"""Training: reproducible, blind to what is withheld, and honest about its choices."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from barcast.models import (
    ConfigError,
    DataError,
    HistoricalSimulation,
    Window,
    compare,
    ensemble,
    gbm,
    training,
)
from barcast.models.diffusion import SSSDForecaster
from barcast.models.ensemble import Member
from barcast.models.optimiser import Progress, Share
from barcast.models.origins import BLOCKS, Origins, Split, split, to_text
from barcast.models.scaling import signed_features
from barcast.models.sssd.layers import Architecture
from barcast.models.sssd.marginal import PROBABILITIES, QuantileMap
from barcast.models.trained import Trained
from barcast.models.training import _Training, train
from tests.garch import HOUR, START, simulate
from tests.models.conftest import HORIZONS, LEVELS


def _train(histories: list[Window], steps: int = 6, **options: object) -> Trained:
    return train(histories, timeframe="1h", horizons=HORIZONS, levels=LEVELS, steps=steps, **options)  # type: ignore[arg-type]


def _state(trained: Trained) -> dict[str, bytes]:
    state: dict[str, Tensor] = trained.net.state_dict()
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


@pytest.fixture(scope="module", autouse=True)
def _small_network(few_looks: str) -> Iterator[None]:
    """What takes time and is not tested here: the width of the map, and the forecasts that are looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Architecture, "of", partial(Architecture.of, width=32))
        yield


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
    """Replacing every bar after `until` changes no bit of the model, with and without a held-out part."""
    until = START + 1500 * HOUR
    poisoned = []
    for w in small:
        values = w.values.copy()
        values[1500:] = np.nan
        poisoned.append(Window(w.symbol, w.close_times, values))
    for hold_out in (0.0, 0.2):
        clean, dirty = (_train(bars, steps=2, until=until, hold_out=hold_out) for bars in (small, poisoned))
        assert _state(clean) == _state(dirty)
        assert clean.record == dirty.record
        assert clean.record.until == until


def test_the_gate_part_is_not_seen(small: list[Window], base: Trained) -> None:
    """Bars that are held out change nothing but the hash of the data; without any, all are learnt from."""
    assert base.record.train_end == base.record.validation_end == base.record.until
    clean, poisoned = _train(small, hold_out=0.2), []
    assert clean.record.train_end == clean.record.validation_end < clean.record.until
    for w in small:
        values = w.values.copy()
        values[w.close_times > clean.record.validation_end] *= 2
        poisoned.append(Window(w.symbol, w.close_times, values))
    dirty = _train(poisoned, hold_out=0.2)
    assert _state(clean) == _state(dirty)
    assert replace(clean.record, data=dirty.record.data) == dirty.record
    assert clean.record.data != dirty.record.data


# What each member learns from, and what it is judged on.


@pytest.fixture(scope="module")
def data(small: list[Window]) -> Split:
    return split(small, "1h", HORIZONS, None, validation=0.0, hold_out=0.0)


def _prepared(data: Split) -> _Training:
    """A training before its first step, whose members have weights that say something."""
    found = _Training(data, LEVELS, 0, 6, None)
    found._prepare_map()
    generator = Generator().manual_seed(2)
    with torch.no_grad():
        found.net.map.head.normal_(0, 0.1, generator=generator)
    return found


def _touching(data: Split, block: int) -> Tensor:
    """The origins whose bar, outcomes, or what is between them lie in a block, by their times."""
    first, last = data.learn.block.unbind(1)
    return ((first <= block) & (last >= block)).nonzero()[:, 0]


def _with_other(data: Split, at: Tensor) -> Split:
    """The same in which features and outcomes of some origins are others."""
    learn: Origins = data.learn
    features, z = learn.features.clone(), learn.z.clone()
    features[at], z[at] = 1 - features[at], 3 - 2 * z[at]
    return replace(data, learn=replace(learn, features=features, z=z))


def _with_other_prices(data: Split, block: int) -> Split:
    """The same in which the bars of the newest block closed, and reached, elsewhere."""
    learn = data.learn
    rows = learn.row[learn.block[:, 0] == block]
    rows = (rows[:, None] + torch.arange(max(HORIZONS) + 1)).unique()
    prices = learn.prices.clone()
    prices[rows] += 0.01 * torch.randn(prices[rows].shape, generator=Generator().manual_seed(3))
    return replace(data, learn=replace(learn, prices=prices))


def _share(index: int = 0, of: int = 1, seed: int = 7) -> Share:
    return Share(index, of, Generator().manual_seed(seed))


def _gradients(of: _Training) -> list[Tensor]:
    of.net.zero_grad()
    of._map_loss(_share()).backward()
    return [p.grad.clone() for p in of.net.map.parameters() if p.grad is not None]


@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_member_never_learns_from_its_block(data: Split, block: int) -> None:
    """Neither static knots nor gradients depend on an origin that reaches into the block; others' do."""
    at = _touching(data, block)
    clean, dirty = _prepared(data), _prepared(_with_other(data, at))
    before, after = _gradients(clean), _gradients(dirty)
    assert len(before) == 6
    assert clean.unseen.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    for m, own in enumerate(clean.unseen.tolist()):
        same = [torch.equal(a[m], b[m]) for a, b in zip(before, after, strict=True)]
        assert same == [own == block] * 6
        assert torch.equal(clean.net.map.static[m], dirty.net.map.static[m]) == (own == block)


def test_a_member_learns_from_all_that_does_not_reach_into_its_block(data: Split) -> None:
    """An origin at the edge is left out because of its last outcome alone, and the one before it is not."""
    found = _prepared(data)
    learns = found._learns(torch.arange(len(data.learn))[:, None])
    assert learns.shape == (len(data.learn), 8)
    for m, b in enumerate(found.unseen.tolist()):
        expected = torch.ones(len(data.learn), dtype=torch.bool)
        expected[_touching(data, b)] = False
        assert torch.equal(learns[:, m], expected)
    edge = ((data.learn.block[:, 0] == 0) & (data.learn.block[:, 1] == 1)).nonzero()[:, 0]
    assert len(edge) == max(HORIZONS) * len(data.histories)
    assert not learns[edge][:, found.unseen == 1].any()
    assert learns[edge][:, found.unseen > 1].all()


def test_a_member_is_judged_on_its_block_alone(data: Split) -> None:
    """Its score depends on outcomes within the block that it has not learnt from, and on no others."""
    clean, b = _prepared(data), 2
    within = (data.learn.block == b).all(1)
    for judged in (True, False):
        dirty = _prepared(data)
        dirty.learn = _with_other(data, (within == judged).nonzero()[:, 0]).learn
        with torch.no_grad():
            pairs = zip(clean._map_crps(), dirty._map_crps(), strict=True)
        changed = [mine != theirs for mine, theirs in pairs]
        assert changed == [(own == b) == judged for own in clean.unseen.tolist()]


def test_scores_are_made_by_members_that_have_left_the_block_out(data: Split) -> None:
    """Other weights of members that have learnt from a block change no score in it; those of the two do."""
    part, before = data.learn, _prepared(data)
    scores = before._scores(part)
    assert scores.abs().max() <= 5
    for b in range(BLOCKS):
        other = _prepared(data)
        with torch.no_grad():
            other.net.map.head[other.unseen != b] *= -3
        moved = (other._scores(part) != scores).any(1)
        assert torch.equal(moved, part.block[:, 0] != b)


def test_the_denoiser_learns_from_all_but_the_newest_block_and_is_judged_there(data: Split) -> None:
    """No origin that reaches into the newest block changes its loss or the whitening, only its score."""
    newest = BLOCKS - 1
    clean, dirty = _prepared(data), _prepared(data)
    dirty.learn = _with_other_prices(_with_other(data, _touching(data, newest)), newest).learn
    for found in (clean, dirty):
        found._prepare_denoiser()
        with torch.no_grad():
            found.net.denoiser.leave.weight.normal_(0, 0.1, generator=Generator().manual_seed(1))
    assert torch.equal(clean.net.whiten, dirty.net.whiten)
    assert torch.equal(clean.net.bridge, dirty.net.bridge)
    assert torch.equal(clean._denoiser_loss(_share()), dirty._denoiser_loss(_share()))
    assert (clean.newest.block == newest).all()
    with torch.no_grad():
        assert clean._denoiser_energy() != dirty._denoiser_energy()
    older = _prepared(data)
    older.learn = _with_other(data, _touching(data, 0)).learn
    older._prepare_denoiser()
    assert not torch.equal(clean.net.whiten, older.net.whiten)


class _Copy(nn.Module):
    """In the place of the map: knots that all are the one feature."""

    def __init__(self, feature: int) -> None:
        super().__init__()
        self.feature, self.seen = feature, list[Tensor]()

    def forward(self, x: Tensor, _drop: object) -> Tensor:
        self.seen.append(x)
        return x[..., self.feature, None, None].expand(*x.shape[:2], len(HORIZONS), len(PROBABILITIES))


def test_half_of_the_members_see_bars_mirrored_at_random(data: Split) -> None:
    """Signed features and the outcome change sign together, half the time; the other half never sees it."""
    signed = torch.from_numpy(signed_features("1h", HORIZONS))
    feature = int(signed.nonzero()[0])
    learn = data.learn
    z = learn.features[:, feature, None].double().expand(-1, len(HORIZONS)).contiguous()
    found = _prepared(replace(data, learn=replace(learn, z=z)))
    assert found.mirrored.tolist() == [False] * 4 + [True] * 4
    found.net.map = copy = _Copy(feature)
    assert float(found._map_loss(_share())) == 0
    [x] = copy.seen
    key = learn.features[:, ~signed]
    rows = {r.numpy().tobytes(): i for i, r in enumerate(key)}
    assert len(rows) == len(key)
    at = torch.tensor([[rows[r.numpy().tobytes()] for r in of_all[:, ~signed]] for of_all in x])
    plain = learn.features[at]
    turned = (x[..., signed] == -plain[..., signed]).all(-1)
    assert ((x == plain).all(-1) | turned).all()
    assert not turned[:, :4].any()
    assert 0.4 < turned[:, 4:].double().mean() < 0.6


def test_the_static_map_of_mirrored_members_is_symmetric(data: Split) -> None:
    """Their knots are the quantiles of outcomes and their mirror images; the others' are of what was."""
    found = _prepared(data)
    learns = found._learns(torch.arange(len(data.learn))[:, None])
    static = found.net.map.static
    assert (static[4:] + static[4:].flip(-1)).abs().max() < 1e-6
    assert (static[:4] + static[:4].flip(-1)).abs().amax((1, 2)).min() > 0.01
    for m in range(8):
        q = np.quantile(data.learn.z[learns[:, m]].numpy(), PROBABILITIES, axis=0).T
        expected = q if m < 4 else (q - q[:, ::-1]) / 2
        np.testing.assert_allclose(static[m], expected, atol=2e-3)


@pytest.mark.parametrize("of", [2, 4])
def test_shares_of_a_batch_add_up_to_it(data: Split, of: int) -> None:
    """The mean of the losses of all shares is the loss of the batch, in both phases."""
    found = _prepared(data)
    found._prepare_denoiser()
    with torch.no_grad():
        for loss in (found._map_loss, found._denoiser_loss):
            whole = float(loss(_share()))
            parts = [float(loss(_share(i, of))) for i in range(of)]
            assert np.mean(parts) == pytest.approx(whole, rel=1e-6)
            assert len(set(parts)) == of


def test_knots_of_all_members_are_held_for_some_origins_at_a_time(
    data: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are a hundred times as many numbers as what comes of them, which is the same up to rounding."""
    training = _prepared(data)
    whole = training._unseen_knots(training.learn)
    asked, of_members = [], QuantileMap.of_members

    def noted(self: QuantileMap, features: Tensor) -> Tensor:
        asked.append(len(features))
        return of_members(self, features)

    monkeypatch.setattr(QuantileMap, "of_members", noted)
    monkeypatch.setattr("barcast.models.training.PIECE", 64)
    assert torch.allclose(training._unseen_knots(training.learn), whole, rtol=1e-5)
    assert max(asked) == 64
    assert sum(asked) == len(training.learn)


def test_outcomes_that_reach_over_a_block_are_refused(small: list[Window]) -> None:
    """Where a horizon leaves a member nothing to learn from, the training ends in a sentence."""
    bars = [Window("A", small[0].close_times[:1900], small[0].values[:1900])]
    with pytest.raises(DataError, match=r"over 700 bars reach too far .* give more bars, or shorter"):
        train(bars, timeframe="1h", horizons=(1, 700), levels=LEVELS, steps=2)


def test_progress_and_record_tell_both_losses_of_every_epoch(small: list[Window]) -> None:
    """Each phase reports its steps in order; the record keeps both losses of every look at unseen bars."""
    seen: list[Progress] = []
    record = _train(small, progress=seen.append).record
    assert record.steps == 6
    assert len(record.map_step) == 8
    assert set(record.map_step) <= set(range(7))
    for phase in ("map", "denoiser"):
        mine = [p for p in seen if p.phase == phase]
        assert [p.step for p in mine] == list(range(7))
        looks = {p.step: (p.crps, p.loss) for p in mine if p.crps is not None}
        candidates = {c.step: (c.crps, c.loss) for c in record.candidates if c.phase == phase}
        assert looks == candidates
        assert candidates[0][1] is None
        assert np.isfinite([loss for _, loss in candidates.values() if loss is not None]).all()
        if phase == "denoiser":
            best = min(candidates, key=lambda step: candidates[step][0])
            enough = candidates[best][0] < (1 - training.MARGIN) * candidates[0][0]
            assert record.denoiser_step == (best if enough else 0)
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


@pytest.mark.parametrize("options", [{"seed": 1}, {"until": START + 1900 * HOUR}, {"hold_out": 0.1}])
def test_other_options_do_not_go_on_from_a_state(
    small: list[Window], tmp_path: Path, options: dict[str, float]
) -> None:
    """A state belongs to its bars and options: with others the training begins anew, to its own bits."""
    state, notes = tmp_path / "state", []
    _train(small, steps=1, state=state)
    found = _train(small, steps=1, state=state, progress=lambda p: notes.append(p.note), **options)
    assert "of other bars, options or versions" in notes[0]
    assert _state(found) == _state(_train(small, steps=1, **options))


def test_another_version_does_not_go_on_from_a_state(
    small: list[Window], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that has changed since begins anew: one model never comes from two."""
    sources = tmp_path / "models"
    shutil.copytree(training.SOURCES, sources)
    monkeypatch.setattr(training, "SOURCES", sources)
    state, notes = tmp_path / "state", []
    for _ in range(2):
        _train(small, steps=1, state=state, progress=lambda p: notes.append(p.note))
    with (sources / "scaling.py").open("a") as file:
        file.write("CLIP = 6.0\n")
    _train(small, steps=1, state=state, progress=lambda p: notes.append(p.note))
    said = [note for note in notes if note]
    assert ["goes on" in note for note in said] == [True, False]
    assert "or versions" in said[1]


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


def test_half_precision_is_of_the_losses_only(small: list[Window], base: Trained) -> None:
    """A training in bf16 gives float32 weights near those of fp32, and says what it was."""
    half = _train(small, precision="bf16")
    assert (base.record.precision, half.record.precision) == ("fp32", "bf16")
    assert all(p.dtype == torch.float32 for p in half.net.parameters())
    assert _state(half) != _state(base)
    mine, theirs = ([c.crps for c in trained.record.candidates if c.step == 6] for trained in (half, base))
    assert mine == pytest.approx(theirs, rel=1e-2)


def test_parts_of_a_batch_train_the_same_model(small: list[Window], base: Trained) -> None:
    """Computed in four parts, the same numbers are drawn: only sums are rounded otherwise."""
    parts = _train(small, accumulate=4)
    for a, b in zip(parts.record.candidates, base.record.candidates, strict=True):
        assert (a.phase, a.step) == (b.phase, b.step)
        assert a.crps == pytest.approx(b.crps, rel=1e-5)
        assert a.loss == (b.loss and pytest.approx(b.loss, rel=1e-4))


def test_one_horizon_is_enough(small: list[Window]) -> None:
    """A model of a single horizon can be trained and forecasts."""
    trained = train(small, timeframe="1h", horizons=(3,), levels=(0.1, 0.5, 0.9), steps=2)
    forecast = SSSDForecaster(trained.net, trained.scaling, trained.levels, "one").forecast(small[:1])[0]
    assert forecast.quantiles.shape == (1, 3)


def test_training_can_start_from_a_model(small: list[Window], base: Trained) -> None:
    """A warm start begins at the given weights, each member at its best; another shape is refused."""
    again = _train(small, steps=1, init_from=("abc", base), seed=9)
    assert again.record.init_from == "abc"
    begin = next(c.crps for c in again.record.candidates if c.phase == "map")
    found = _Training(split(small, "1h", HORIZONS, None, validation=0.0, hold_out=0.0), LEVELS, 0, 1, None)
    found.net.load_state_dict(base.net.state_dict())
    with torch.no_grad():
        assert begin == pytest.approx(np.mean(found._map_crps()), rel=1e-9)
    assert begin <= min(c.crps for c in base.record.candidates if c.phase == "map") * (1 + 1e-9)
    with pytest.raises(ConfigError, match="horizons"):
        train(small, timeframe="1h", horizons=(1, 2), levels=LEVELS, steps=2, init_from=("abc", base))


def test_a_start_that_has_learnt_more_is_told_or_refused(small: list[Window], base: Trained) -> None:
    """What the first model has learnt from is never called held out, nor later than what the record says."""
    early = _train(small, steps=1, until=START + 1500 * HOUR, init_from=("abc", base)).record
    seen = base.record.validation_end
    assert (early.train_end, early.validation_end, early.until) == (seen, seen, seen)
    with pytest.raises(ConfigError, match=r"bars up to 2024-03-24T08:00:00Z, .* hold out less"):
        _train(small, steps=1, hold_out=0.2, init_from=("abc", base))
    blind = _train(small, steps=1, hold_out=0.2)
    for hold_out in (0.2, 0.1):
        again = _train(small, steps=1, hold_out=hold_out, init_from=("abc", blind)).record
        assert blind.record.validation_end <= again.validation_end < again.until


@pytest.mark.parametrize("train_one", [train, gbm.train, ensemble.train])
def test_one_level_is_refused(train_one: Callable[..., object], small: list[Window]) -> None:
    """From one quantile neither mean nor spread follow, and no model of it could be served."""
    members = [[Member("hs"), Member("fhs")]] if train_one is ensemble.train else []
    with pytest.raises(ConfigError, match=r"levels \(0.5,\) cannot be used: give two or more"):
        train_one(small, *members, timeframe="1h", horizons=(1,), levels=(0.5,))


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
        ([], "are no bars to learn from: check the symbols"),
        ([short], "give at least"),
        ([flat], "FLAT closes unchanged .* leave it out"),
        ([short, flat], "no symbol is left .* A has .* give at least .* FLAT closes unchanged"),
        ([small[0], broken], "BAD has an unusable bar at row 900"),
    ):
        with pytest.raises(DataError, match=words):
            _train(histories)
    with pytest.raises(DataError, match=f"no bars closed by {to_text(START)} to learn"):
        _train(small, until=START)


def test_a_trained_model_beats_historical_simulation(trained: Trained, histories: list[Window]) -> None:
    """On bars that were held out, the CRPS of the map is below that of historical simulation."""
    forecaster = SSSDForecaster(trained.net, trained.scaling, LEVELS, "test", steps=0)
    baseline = HistoricalSimulation("1h", HORIZONS, LEVELS)
    since, until = trained.record.validation_end, histories[0].close_time
    mine, theirs = compare([forecaster, baseline], histories, since=since, until=until, stride=3)
    assert mine.normalised < theirs.normalised
