"""Models of every kind serve on the one path: what a replay, a crash or a backtest says is what was sent."""

from contextlib import closing
from copy import deepcopy

import numpy as np
import pytest

from barcast.backtest.replay import arrivals
from barcast.daemon.ports import Activation, Revision, Warmup
from barcast.models import Bar, Calibrated, FilteredHistoricalSimulation
from tests import kinds
from tests.fakes import LEVELS, MINUTE, START, outgoing, settings
from tests.garch import simulate
from tests.rim import SECOND, Instance, Message, World, activation, outbox, path_of, play, revision

SYMBOLS, WARM, LIVE = ("A", "B", "C"), 740, 6
HORIZONS = (1, 2)


@pytest.fixture(scope="module")
def bars():
    """Simulated one-minute bars of each symbol; the first WARM of them are old when the daemon starts."""
    found = {}
    for i, symbol in enumerate(SYMBOLS):
        values = simulate(symbol, WARM + LIVE, seed=i).window.values
        times = START + MINUTE * np.arange(1 - WARM, LIVE + 1)
        rows = zip(times.tolist(), values.tolist(), strict=True)
        found[symbol] = [Bar(symbol, time, *row) for time, row in rows]
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small network, trees, an ensemble of both and a baseline, and a calibrated one: one-minute bars.

    And a small LDM4TS.
    """
    from barcast.models.ldm4ts import training as latents
    from barcast.models.training import train

    histories = [simulate(s, 1500, seed=9, step=MINUTE).window for s in ("X", "Y")]
    network = train(histories, timeframe="1m", horizons=HORIZONS, levels=LEVELS, steps=2)
    with kinds.few_latents():
        latent = latents.train(
            histories, timeframe="1m", horizons=HORIZONS, levels=LEVELS, steps=2, preset="tiny"
        )
    trees = kinds.boosted(network.scaling, network.levels, network.record)
    mix = kinds.ensemble(tmp_path_factory.mktemp("kinds"), network)
    fhs = FilteredHistoricalSimulation("1m", HORIZONS, LEVELS)
    return {
        "trees": trees.forecaster("trees"),
        "mix": mix.forecaster("mix"),
        "latent": latent.forecaster("latent"),
        "calibrated": Calibrated(fhs, outcomes=60, judged=40),
    }


@pytest.mark.parametrize("kind", ["trees", "mix", "latent", "calibrated"])
def test_live_signals_are_those_of_replay_and_backtest(bars, models, tmp_path, kind):
    """One symbol late and alone, restarts of the forecaster's memory, other batches: the same bytes."""
    forecaster = models[kind]
    world = World()
    world.script.append((START, lambda src: src.decide(revision(settings(SYMBOLS)))))
    world.script.append((START, lambda src: src.decide(activation(kind, forecaster.card.window))))
    world.script.extend((START + SECOND, [Message.of(*bars[s][:WARM])]) for s in SYMBOLS)
    for k in range(WARM, WARM + LIVE):
        close = bars["A"][k].close_time
        for i, symbol in enumerate(SYMBOLS):
            world.script.append((close + (1 + 3 * i) * SECOND, [Message.of(bars[symbol][k])]))
    with closing(Instance(tmp_path / "journal.db", world, lambda *_: deepcopy(forecaster))) as instance:
        play(instance.run())
        sent, replayed = path_of(outbox(instance.journal)), instance.replayed()
    assert replayed == sent
    signals = [m for m in sent if "/signals/" in m.topic]
    assert [b'"coverage":{"share":{"0.9":[' in m.payload for m in signals] == [
        kind == "calibrated" for _ in signals
    ]
    live = {(m.topic, m.payload) for m in sent}

    last = [b for s in SYMBOLS for b in bars[s][WARM:]]
    events = [
        Revision(START, settings(SYMBOLS).encode()),
        Activation(START, kind, "numpy", forecaster.card.window),
        Warmup(START, "", tuple(b for s in SYMBOLS for b in bars[s][:WARM])),
        *arrivals(sorted(last, key=lambda b: b.close_time)),
    ]
    tested = {(m.topic, m.payload) for m in outgoing(events, **{kind: forecaster}) if "/signals/" in m.topic}
    assert tested <= live
    assert len(tested) == LIVE * len(SYMBOLS)
