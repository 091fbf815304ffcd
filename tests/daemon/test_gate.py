"""The gate: only a model that forecasts better on bars it has not learnt from may serve."""

import msgspec
import numpy as np
import pytest

from barcast.daemon import gate
from barcast.daemon.calendar import iso
from barcast.daemon.gate import MIN_ORIGINS, Verdict, judge
from barcast.models import CheckpointError, ConfigError, Window, checkpoint
from barcast.models.baselines import HistoricalSimulation
from barcast.models.evaluation import collect
from tests.garch import simulate

HORIZONS, LEVELS = (1, 4, 16), (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


@pytest.fixture(scope="module")
def histories():
    """Two symbols of 1,450 hourly bars; the last tenth is held out of the training."""
    return {name: simulate(name, 1450, seed=3).window for name in ("S0", "S1")}


@pytest.fixture(scope="module")
def models(tmp_path_factory, histories):
    """A small trained model, a copy with bands three times too wide, and one with other horizons."""
    import torch

    from barcast.models.checkpoint import save
    from barcast.models.training import train

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("gate")
    own = list(histories.values())
    outputs = {"timeframe": "1h", "levels": LEVELS, "hold_out": 0.1}
    good = train(own, **outputs, horizons=HORIZONS, steps=24)
    save(good, folder / "good")
    with torch.no_grad():
        good.net.map.static.mul_(3.0)
    save(good, folder / "spoiled")
    save(train(own, **outputs, horizons=(1, 2), steps=1), folder / "other")
    return folder


@pytest.fixture
def few(monkeypatch):
    """Score about a hundred origins, beside two baselines: enough for models that differ much."""
    monkeypatch.setattr(gate, "MAX_ORIGINS", 100)
    monkeypatch.setattr(gate, "RIVALS", ("hs", "ewma"))


def held_out(models):
    """When the part begins that the model has neither learnt from nor been validated on."""
    from barcast.models.checkpoint import load

    return load(models / "good").trained.record.validation_end


def until(histories, moment):
    """The histories up to a moment."""
    cut = {}
    for name, w in histories.items():
        n = int(np.searchsorted(w.close_times, moment, "right"))
        cut[name] = Window(name, w.close_times[:n], w.values[:n])
    return cut


@pytest.mark.usefixtures("few")
def test_better_challenger_is_accepted(models, histories):
    """A trained model takes over from one whose bands are far too wide, with the evidence beside it."""
    verdict = judge(models / "good", str(models / "spoiled"), histories, "1h", 0.0)
    assert verdict.accepted
    assert verdict.challenger_crps < 0.9 * verdict.champion_crps
    assert verdict.origins >= MIN_ORIGINS
    assert verdict.challenger != verdict.champion
    assert verdict.reason.endswith("below the champion's; it must be more than 0.00 % below")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("kind", ["trees", "mix"])
def test_kinds_are_judged_against_each_other(models, histories, tmp_path, kind, monkeypatch):
    """Trees and ensembles are challengers and champions like the network; the sampler is for what has one."""
    from barcast.models.checkpoint import load, save
    from tests import kinds

    monkeypatch.setattr(gate, "RIVALS", ())
    network = load(models / "good").trained
    if kind == "mix":
        save(kinds.ensemble(tmp_path, network), tmp_path / "mix")
    else:
        save(kinds.boosted(network.scaling, network.levels, network.record), tmp_path / "trees")
    won = judge(tmp_path / kind, str(models / "spoiled"), histories, "1h", 0.0, "ddim", 4)
    assert won.accepted
    lost = judge(models / "spoiled", str(tmp_path / kind), histories, "1h", 0.0)
    assert not lost.accepted
    assert (lost.champion, lost.champion_crps) != (won.challenger, None)


def test_challenger_without_paths_is_refused_where_they_are_needed(models, histories, tmp_path, monkeypatch):
    """Before anything is forecast, with the sentence of a start; one that knows paths is judged."""
    from barcast.models.checkpoint import load, save
    from tests import kinds

    network = load(models / "good").trained
    save(kinds.boosted(network.scaling, network.levels, network.record), tmp_path / "trees")
    with monkeypatch.context() as patch:
        patch.setattr(gate, "collect", None)
        verdict = judge(tmp_path / "trees", "hs", histories, "1h", 0.0, paths=True)
    assert not verdict.accepted
    assert verdict.reason.startswith(f"model {verdict.challenger} forecasts each horizon alone")
    assert "leave out what needs paths, such as touch" in verdict.reason
    monkeypatch.setattr(gate, "MAX_ORIGINS", 100)
    monkeypatch.setattr(gate, "RIVALS", ())
    assert judge(models / "good", "hs", histories, "1h", 0.0, paths=True).origins >= MIN_ORIGINS


@pytest.mark.usefixtures("few")
def test_spoiled_challenger_is_refused(models, histories):
    """A model made worse on purpose is refused, and the reason says by how much."""
    verdict = judge(models / "spoiled", str(models / "good"), histories, "1h", 0.0)
    assert not verdict.accepted
    assert verdict.challenger_crps > 1.1 * verdict.champion_crps
    assert verdict.reason.endswith("above the champion's; it must be more than 0.00 % below")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("baseline", ["hs", "fhs"])
def test_spoiled_challenger_is_refused_by_a_baseline(models, histories, baseline):
    """Where a baseline serves, it is the champion to beat, and a bad model does not."""
    verdict = judge(models / "spoiled", baseline, histories, "1h", 0.0)
    assert not verdict.accepted
    assert verdict.champion.startswith(f"{baseline}-")
    assert verdict.origins >= MIN_ORIGINS


@pytest.mark.usefixtures("few")
def test_good_challenger_is_accepted_over_a_baseline(models, histories):
    """A trained model is accepted where historical simulation serves, if its CRPS is lower."""
    verdict = judge(models / "good", "hs", histories, "1h", 0.0)
    assert verdict.accepted == (verdict.challenger_crps < verdict.champion_crps)
    assert verdict.accepted


def test_a_verdict_is_on_all_hours_of_the_day(models, histories, monkeypatch):
    """Thinned origins do not repeat a few hours of the day, at which a worse model may be the better one."""
    judged = []

    def noted(*args, **options):
        judged.append(collect(*args, **options))
        return judged[0]

    monkeypatch.setattr(gate, "collect", noted)
    bars = sum(int((w.close_times >= held_out(models)).sum()) for w in histories.values())
    monkeypatch.setattr(gate, "MAX_ORIGINS", bars // 5)  # every sixth bar would meet four hours
    judge(models / "good", "hs", histories, "1h", 0.0)
    hours = judged[0].close_times // 3_600_000_000_000 % 24
    assert len(np.unique(hours)) > 12


@pytest.mark.usefixtures("few")
def test_identical_model_is_refused(models, histories):
    """Equal is not better: without a margin the champion stays."""
    verdict = judge(models / "good", str(models / "good"), histories, "1h", 0.0)
    assert not verdict.accepted
    assert verdict.challenger_crps == verdict.champion_crps
    assert verdict.reason == "CRPS 0.00 % above the champion's; it must be more than 0.00 % below"


@pytest.mark.usefixtures("few")
def test_margin_is_how_much_better_it_must_be(models, histories):
    """The same challenger passes a margin just below its improvement, and not one just above."""
    plain = judge(models / "good", str(models / "spoiled"), histories, "1h", 0.0)
    gain = 1 - plain.challenger_crps / plain.champion_crps
    below, above = (
        judge(models / "good", str(models / "spoiled"), histories, "1h", margin)
        for margin in (gain - 0.001, gain + 0.001)
    )
    assert (below.accepted, above.accepted) == (True, False)
    assert f"must be more than {100 * (gain + 0.001):.2f} %" in above.reason


def test_other_horizons_are_refused_with_the_reason(models, histories):
    """Models that do not forecast the same cannot be compared: subscribers rely on the horizons."""
    verdict = judge(models / "other", str(models / "good"), histories, "1h", 0.0)
    assert not verdict.accepted
    assert "horizons" in verdict.reason
    assert "(1, 2)" in verdict.reason
    assert "(1, 4, 16)" in verdict.reason
    assert (verdict.challenger_crps, verdict.origins) == (None, 0)


def test_too_few_forecasts_are_no_evidence(models, histories):
    """With fewer forecasts than needed the challenger is refused, however good it looks."""
    step = 3_600_000_000_000
    short = until(histories, held_out(models) + 30 * step)
    verdict = judge(models / "good", str(models / "spoiled"), short, "1h", 0.0)
    assert not verdict.accepted
    assert 0 < verdict.origins < MIN_ORIGINS
    assert verdict.reason == f"only {verdict.origins} forecasts to compare on; at least 50 are needed"
    assert verdict.challenger_crps < verdict.champion_crps


def test_no_forecast_at_all_is_refused(models, histories):
    """Without any bar after what the challenger has learnt from, it is refused with the reason."""
    verdict = judge(models / "good", "hs", until(histories, held_out(models)), "1h", 0.0)
    assert not verdict.accepted
    assert "no forecast origin" in verdict.reason


@pytest.mark.usefixtures("few")
def test_bars_learnt_from_do_not_count(models, histories, monkeypatch):
    """Every forecast that is scored was made after the challenger's training and validation."""
    scored = []

    def spy(*args, **kwargs):
        scored.append(collect(*args, **kwargs))
        return scored[0]

    monkeypatch.setattr(gate, "collect", spy)
    judge(models / "good", "hs", histories, "1h", 0.0)
    assert min(scored[0].close_times) >= held_out(models)
    assert set(scored[0].symbols) == {"S0", "S1"}
    assert len(scored[0].close_times) <= 2 * 100


@pytest.mark.usefixtures("few")
def test_costly_models_are_compared_on_the_newest_bars(models, histories, monkeypatch):
    """So many of all symbols together, or all that nothing has learnt from where they are fewer."""
    monkeypatch.setattr(checkpoint, "costly", lambda _: True)
    closes = sorted(int(t) for w in histories.values() for t in w.close_times)
    known = 2 * max(HORIZONS)  # bars whose outcomes are still to come
    for bars, since in ((120, closes[-120 - known]), (10_000, held_out(models))):
        monkeypatch.setattr(gate, "COSTLY_BARS", bars)
        verdict = judge(models / "good", str(models / "spoiled"), histories, "1h", 0.0)
        assert verdict.since == iso(since)
        assert verdict.origins >= MIN_ORIGINS


def test_damaged_challenger_and_wrong_timeframe_are_faults(models, histories, tmp_path):
    """What is no model, or one for other bars, is an error of the job and not a verdict."""
    with pytest.raises(CheckpointError, match="cannot be read"):
        judge(tmp_path / "absent", "hs", histories, "1h", 0.0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        judge(models / "good", str(tmp_path / "absent"), histories, "1h", 0.0)
    with pytest.raises(ConfigError, match="trained on '1h' bars, not on '1m'"):
        judge(models / "good", "hs", histories, "1m", 0.0)


@pytest.mark.usefixtures("few")
def test_verdict_survives_the_pipe(models, histories):
    """The gate's process prints the verdict as JSON, and the daemon reads the same verdict."""
    verdict = judge(models / "spoiled", "hs", histories, "1h", 0.0)
    assert msgspec.json.decode(msgspec.json.encode(verdict), type=Verdict) == verdict


@pytest.mark.usefixtures("few")
def test_challenger_behind_a_baseline_is_refused_by_name(models, histories, monkeypatch):
    """To be better than a bad champion is not enough where a baseline is better than both."""
    plain = judge(models / "good", str(models / "spoiled"), histories, "1h", 0.0)
    assert plain.accepted
    assert set(plain.baselines) == set(gate.RIVALS)

    class Knows:
        """In the place of a baseline: it forecasts what happened."""

        def __init__(self, timeframe, horizons, levels):
            self.inner = HistoricalSimulation(timeframe, horizons, levels)
            self.card = self.inner.card

        def forecast(self, windows):
            return [self._knowing(f) for f in self.inner.forecast(windows)]

        def _knowing(self, forecast):
            own = histories[forecast.symbol]
            at, price = np.searchsorted(own.close_times, forecast.close_time), np.log(own.values[:, 3])
            happened = np.array([[price[at + h] - price[at]] for h in HORIZONS])
            return msgspec.structs.replace(forecast, quantiles=happened + 0.2 * forecast.quantiles)

    monkeypatch.setitem(gate.BASELINES, "ewma", Knows)
    verdict = judge(models / "good", str(models / "spoiled"), histories, "1h", 0.0)
    assert not verdict.accepted
    assert verdict.baselines["ewma"] < 0.5 * plain.challenger_crps
    assert verdict.reason.endswith("% above that of the baseline ewma")
    beside = judge(models / "good", "hs", histories, "1h", 0.0).baselines
    assert set(beside) == set(gate.RIVALS) - {"hs"}


@pytest.mark.usefixtures("few")
def test_verdict_says_how_sure_its_gain_is(models, histories):
    """The paired gain is that of the two CRPS; a clear one is many of its errors, none has none."""
    verdict = judge(models / "good", str(models / "spoiled"), histories, "1h", 0.0)
    assert verdict.gain == pytest.approx(1 - verdict.challenger_crps / verdict.champion_crps, abs=1e-4)
    assert verdict.gain > 5 * verdict.gain_error > 0
    assert verdict.since[:10] == str(np.datetime64(held_out(models), "ns"))[:10]
    same = judge(models / "good", str(models / "good"), histories, "1h", 0.0)
    assert (same.gain, same.gain_error) == (0, 0)


@pytest.mark.usefixtures("few")
def test_challenger_that_forecasts_no_price_is_refused(models, histories, tmp_path):
    """Forecasts that would be withheld are not left out of the score of whoever makes them."""
    import torch

    from barcast.models.checkpoint import load, save

    wild = load(models / "good").trained
    with torch.no_grad():
        wild.net.map.static.mul_(1e6)
    save(wild, tmp_path / "wild")
    verdict = judge(tmp_path / "wild", str(models / "good"), histories, "1h", 0.0)
    assert not verdict.accepted
    assert verdict.reason.endswith("of its forecasts can be no price")
    over = judge(models / "good", str(tmp_path / "wild"), histories, "1h", 0.0)
    assert over.origins == 0 or over.accepted


def test_other_levels_and_bars_are_refused(models, histories, tmp_path):
    """A model of other levels is refused with both, one of other bars is a fault of its file."""
    from dataclasses import replace

    from barcast.models.checkpoint import load, save

    good = load(models / "good").trained
    save(replace(good, levels=(0.1, 0.5, 0.9)), tmp_path / "levels")
    verdict = judge(tmp_path / "levels", str(models / "good"), histories, "1h", 0.0)
    assert not verdict.accepted
    assert "levels" in verdict.reason
    assert "(0.1, 0.5, 0.9)" in verdict.reason
