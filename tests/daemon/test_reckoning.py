"""What is told of how forecasts held what they promised: counted here once more, in other words."""

import asyncio
import json

import msgspec
import numpy as np
import pytest

from barcast.daemon import app
from barcast.daemon.bars import known_bars
from barcast.daemon.config import load
from barcast.daemon.drift import LEAST
from barcast.daemon.reckoning import DAY, ORIGINS, SPANS, TIMES, Reckoning, reckon
from barcast.models import BASELINES, DataError, Window
from barcast.models.scores import crps
from tests.daemon.living import LEAST as TEXT
from tests.daemon.living import at_work, daemon
from tests.daemon.test_drift import HORIZONS, LEVELS, NORMAL, SIGMA, bars, signals
from tests.daemon.test_lookout import instance
from tests.integration.instance import write_history
from tests.rim import play


def market(seed=3, symbols=3, count=900):
    """Windows of symbols that move by `SIGMA` a bar, apart from each other."""
    rng = np.random.default_rng(seed)
    return {f"S{k}": bars(f"S{k}", SIGMA * rng.standard_normal(count)) for k in range(symbols)}


def told(windows, sigma=SIGMA):
    """What is said of all symbols by a model that takes the volatility for `sigma`, newest first."""
    return sorted((s for w in windows.values() for s in signals(w, sigma)), key=lambda s: s.close_time)[::-1]


def outcomes(windows, horizon, since=0):
    """Log returns over a horizon from each bar that has one, of closes from `since` on."""
    found = []
    for w in windows.values():
        close = np.log(w.values[:, 3])
        found.append((close[horizon:] - close[:-horizon])[w.close_times[:-horizon] >= since])
    return np.concatenate(found)


def test_a_calibrated_model_is_told_to_be_one():
    """Its coverage is the nominal one within the errors, in all and in spans; shares between levels too."""
    windows = market()
    found = reckon(told(windows), windows, "1m")
    assert (found.closes, found.signals, found.symbols) == (899, 3 * 899, 3)
    assert len(found.spans) == SPANS
    assert found.expected == pytest.approx([0.05, 0.05, 0.15, 0.25, 0.25, 0.15, 0.05, 0.05])
    for horizon in found.horizons:
        assert tuple(c.nominal for c in horizon.coverage) == (0.5, 0.8, 0.9)
        for one in horizon.coverage:
            assert abs(one.whole.inside - one.nominal) < 3 * one.whole.error
            far = [abs(s.inside - one.nominal) > 2 * s.error for s in one.spans]
            assert sum(far) <= 3
            assert sum(s.outcomes for s in one.spans) == one.whole.outcomes == sum(horizon.pit)
    shortest = np.array(found.horizons[0].pit) / sum(found.horizons[0].pit)
    assert shortest == pytest.approx(found.expected, abs=0.03)


@pytest.mark.parametrize("sigma", [SIGMA, SIGMA / 2])
def test_shares_and_counts_are_those_of_a_direct_count(sigma):
    """Also of intervals of half the width, whose coverage is as much lower as it is."""
    windows = market()
    found = reckon(told(windows, sigma), windows, "1m")
    newest = max(w.close_time for w in windows.values())
    for horizon in found.horizons:
        h = horizon.bars
        y = outcomes(windows, h)
        q = sigma * h**0.5 * NORMAL
        for one, (low, high) in zip(horizon.coverage, [(2, 4), (1, 5), (0, 6)], strict=True):
            assert one.whole.inside == pytest.approx(np.mean((y >= q[low]) & (y <= q[high])))
        edges = [-np.inf, *q, np.inf]
        assert horizon.pit == np.histogram(y, edges)[0].tolist()
        last = newest - h * 60 * 10**9 - DAY
        assert horizon.lately == np.histogram(outcomes(windows, h, last + 1), edges)[0].tolist()
    if sigma < SIGMA:
        assert found.horizons[0].coverage[2].whole.inside < 0.65


def test_the_last_day_is_apart():
    """Of hours, only the newest 24 closes are counted as of lately."""
    rng = np.random.default_rng(1)
    w = bars("S", SIGMA * rng.standard_normal(300))
    hourly = {"S": Window("S", w.close_times[0] + 60 * (w.close_times - w.close_times[0]), w.values)}
    found = reckon(told(hourly), hourly, "1h")
    assert [sum(h.lately) for h in found.horizons] == [24, 24, 24]
    assert [sum(h.pit) for h in found.horizons] == [299, 296, 284]


def test_only_what_came_true_counts_and_each_horizon_for_itself():
    """A signal without an outcome says nothing; below so many closes nothing is told of a horizon."""
    windows = market(symbols=1, count=LEAST + 4)
    found = reckon(told(windows), windows, "1m")
    assert [(h.bars, h.closes) for h in found.horizons] == [(1, LEAST + 3), (4, LEAST), (16, LEAST - 12)]
    assert [bool(h.coverage) for h in found.horizons] == [True, True, False]
    assert [sum(h.pit) for h in found.horizons] == [LEAST + 3, LEAST, 0]
    assert reckon(told(windows) * 2, windows, "1m") == found
    assert reckon(told(windows), {}, "1m") == reckon([], windows, "1m")
    assert reckon([], windows, "1m").horizons == []


def test_what_came_later_changes_nothing():
    """The bars after the last outcome are neither looked at nor shown to the baselines."""
    windows = market(count=1200)
    early = told(windows)[3 * 201 :]
    whole = reckon(early, windows, "1m")
    cut = {symbol: w.part(0, 1200 - 201 + 16) for symbol, w in windows.items()}
    assert {h.closes for h in whole.horizons} == {999}
    assert reckon(early, cut, "1m") == whole
    spoilt = {
        name: Window(name, w.close_times, np.concatenate([w.values[:1015], 9 * w.values[1015:]]))
        for name, w in windows.items()
    }
    assert reckon(early, spoilt, "1m") == whole


def test_it_looks_at_the_newest_closes_alone():
    """However many there are."""
    windows = market(symbols=1, count=TIMES + 100)
    said = told(windows)
    assert reckon(said, windows, "1m").closes == TIMES
    assert reckon(said[: TIMES + 1], windows, "1m") == reckon(said, windows, "1m")


def test_skill_against_itself_is_nothing():
    """Historical simulation gains nothing over itself, on origins that are few enough."""
    windows = market(count=1000)
    hs = BASELINES["hs"]("1m", HORIZONS, LEVELS)
    said = []
    for name, w in windows.items():
        for end, one in zip(range(600, 1001), signals(w)[::-1][599:], strict=True):
            [own] = hs.forecast([w.part(max(0, end - hs.card.window), end)])
            prices = (one.reference * np.exp(own.quantiles)).tolist()
            said.append(msgspec.structs.replace(one, symbol=name, quantiles=prices))
    for horizon in reckon(said, windows, "1m").horizons:
        assert LEAST <= horizon.skill["hs"].origins <= ORIGINS
        assert horizon.skill["hs"].gain == pytest.approx(0, abs=1e-9)
        assert horizon.skill["hs"].error == pytest.approx(0, abs=1e-9)
        assert abs(horizon.skill["fhs"].gain) > 1e-4


def test_skill_is_the_share_of_crps_that_is_saved(monkeypatch):
    """On all origins that have bars enough; a model that takes twice the volatility loses for sure."""
    monkeypatch.setattr("barcast.daemon.reckoning.ORIGINS", 10**6)
    windows = market(symbols=1, count=700)
    found = reckon(told(windows, 2 * SIGMA), windows, "1m")
    [w] = windows.values()
    hs, fhs = (BASELINES[name]("1m", HORIZONS, LEVELS) for name in ("hs", "fhs"))
    close = np.log(w.values[:, 3])
    ends = range(fhs.card.min_window, 700)
    forecasts = hs.forecast([w.part(max(0, end - hs.card.window), end) for end in ends])
    y = np.array([close[end] - close[end - 1] for end in ends])
    theirs = crps(y, np.array([f.quantiles[0] for f in forecasts]), LEVELS).mean()
    mine = crps(y, 2 * SIGMA * NORMAL, LEVELS).mean()
    skill = found.horizons[0].skill["hs"]
    assert skill.gain == pytest.approx(1 - mine / theirs)
    assert skill.origins == len(ends)
    assert skill.gain < -3 * skill.error
    short = market(symbols=1, count=200)
    assert reckon(told(short), short, "1m").horizons[0].skill == {"hs": None, "fhs": None}


def test_the_command_reads_journal_and_bars(tmp_path, run):
    """What the model that is named said of late; nothing where the newest signal is another's."""
    lookout, journal, _ = instance(tmp_path, "", SIGMA)
    journal.close()
    windows = lookout._pipeline.windows
    write_history([windows.cut("A", windows.newest("A"), 400)], 400, tmp_path / "state" / "history")
    config = tmp_path / "barcast.toml"
    status, out, _ = run("reckon", str(config), "--model", "spread")
    found = msgspec.json.decode(out, type=Reckoning)
    assert (status, found.closes, found.symbols) == (0, 399, 1)
    assert [(h.bars, sum(h.pit)) for h in found.horizons] == [(1, 399), (2, 398)]
    assert all(h.skill["fhs"].origins > LEAST for h in found.horizons)
    _, out, _ = run("reckon", str(config), "--model", "other")
    assert msgspec.json.decode(out, type=Reckoning).closes == 0
    settings = load(config)
    known = [
        known_bars(settings.state_dir, settings.bar_calendars(), 2**62, length=n)["A"] for n in (50, None)
    ]
    assert [len(w) for w in known] == [50, 400]
    assert known[0].close_times.tolist() == known[1].close_times[-50:].tolist()


def test_the_daemon_asks_once_for_a_while(tmp_path, monkeypatch):
    """One process at a time, of the model that serves; what failed is said in a sentence, and tried again."""
    windows = market(symbols=1, count=300)
    good = msgspec.json.encode(reckon(told(windows), windows, "1m"))
    asked, at_once = [], []
    answers = [good, b"", good]

    async def process(verb, arguments, on_line):
        at_once.append(verb)
        assert len(at_once) == 1
        await asyncio.sleep(0.01)
        at_once.pop()
        asked.append((verb, *arguments))
        on_line("error: no room")
        return 0, answers[len(asked) - 1]

    made = daemon(tmp_path, TEXT + "[http]\nport = 9\n")

    async def story():
        with pytest.raises(app.ConfigError, match="not serving yet"):
            await made.shown().reckoning()
        async with at_work(made):
            made.children = process
            ask = made.shown().reckoning
            found = await asyncio.gather(ask(), ask(), ask())
            assert {json.dumps(json.loads(one)) for one in found} == {json.dumps(json.loads(good))}
            assert msgspec.json.decode(found[0], type=Reckoning).closes == 299
            assert asked == [("reckon", "--model", made.pipeline.forecaster.card.model)]
            monkeypatch.setattr(app, "RECKONED_SECONDS", -1)
            made._reckoning = ("another", *made._reckoning[1:])
            for _ in range(2):
                with pytest.raises(DataError, match="not held against outcomes: error: no room"):
                    await ask()
            assert len(asked) == 2
            monkeypatch.setattr(app, "FAILED_SECONDS", -1)
            made._reckoning = None
            assert json.loads(await ask()) == json.loads(good)

    play(story())
