"""What the model costs on one core: a forecast beside those of other models, a step of training beside one
that goes back through the whole sampler, and a retraining. All is CPU time of one run.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Generator, Tensor

from barcast.models import LEVELS, Forecaster, Window, gbm, open_model
from barcast.models.catalog import SAMPLER, STEPS
from barcast.models.diffusion import Distribution, use_one_thread
from barcast.models.optimiser import Share
from barcast.models.origins import Origins, split
from barcast.models.paths import path_steps
from barcast.models.samplers import Velocity
from barcast.models.sssd.head import MLP, Asked
from barcast.models.sssd.marginal import knot_scores, piecewise
from barcast.models.training import BATCH, DRAWS, _Dropout, _Training, train
from tests.bench.report import Row, Section, Target
from tests.garch import windows

HORIZONS = (1, 4, 16)
BARS, WINDOWS = 8_000, 480
"""Bars of each of two symbols; windows of one that are forecast, in which GARCH is fitted anew once."""
SAMPLES = (64, 256)
TRAINING_STEPS = 20
"""Of the model whose forecasts are timed: what it has learnt does not change the time."""
FAST_STEPS, SLOW_STEPS = 20, 3
RETRAINED, RETRAINED_BARS = 10, 20_000


def measure(tell: Callable[[str], None], _folder: Path) -> Section:
    """Forecasts, steps and a retraining."""
    use_one_thread()
    section = Section(
        "cost",
        "CPU time on one core: a forecast (one symbol, three horizons), a step of training, a retraining",
        {
            "cpu_ms": ("CPU ms", ",.2f"),
            "times_faster": ("times faster", ",.0f"),
            "cpu_minutes": ("CPU minutes", ",.1f"),
        },
    )
    histories = windows(2, BARS, season=True)
    _forecasts(section, histories, tell)
    _steps(section, histories, tell)
    tell(f"retraining of {RETRAINED} symbols")
    many = windows(RETRAINED, RETRAINED_BARS, season=True)
    took = _timed(lambda: train(many, timeframe="1h", horizons=HORIZONS, levels=LEVELS))
    what = f"retraining, {RETRAINED} symbols x {RETRAINED_BARS:,} hourly bars, default steps"
    section.rows.append(Row(what, {"cpu_minutes": took / 60}))
    return section


def _forecasts(section: Section, histories: Sequence[Window], tell: Callable[[str], None]) -> None:
    history = histories[0]
    length = open_model("garch-s", "1h", None, None).card.window
    asked = [
        Window(history.symbol, history.close_times[k - length : k], history.values[k - length : k])
        for k in range(BARS - WINDOWS, BARS + 1)
    ]

    def note(what: str, forecaster: Forecaster) -> None:
        tell(what)
        forecaster.forecast(asked[:1])
        took = _timed(lambda: [forecaster.forecast([window]) for window in asked[1:]])
        raw = {"cpu_ms": 1e3 * took / WINDOWS}
        reference = section.rows[0].raw["cpu_ms"] if section.rows else raw["cpu_ms"]
        section.rows.append(Row(what, raw, raw["cpu_ms"] / reference, "garch-s"))

    for name in ("garch-s", "garch", "har-s", "fhs"):
        note(name, open_model(name, "1h", None, None))
    tell("lgbm: training")
    outputs = {"timeframe": "1h", "horizons": HORIZONS, "levels": LEVELS}
    note("lgbm", gbm.train(histories, **outputs).forecaster("lgbm"))  # type: ignore[arg-type]
    tell("sssd: training")
    trained = train(histories, timeframe="1h", horizons=HORIZONS, levels=LEVELS, steps=TRAINING_STEPS)
    note("sssd, the map alone", trained.forecaster("map", None, 0))
    whole = trained.net.noise
    at = MLP.at

    def bf16(self: MLP, lam: Tensor) -> Asked:
        exact = at(self, lam)

        def of(c: Tensor) -> Velocity:
            ask = exact(c)

            def asked(x: Tensor, i: int) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return ask(x, i).float()

            return asked

        return of

    for samples in SAMPLES:
        trained.net.noise = whole[:samples]
        what = f"sssd, diffusion, {samples} samples x {STEPS} evaluations"
        note(f"{what}, fp32", trained.forecaster("sssd", SAMPLER, STEPS))
        with patch.object(MLP, "at", bf16):
            forecaster = trained.forecaster("sssd", SAMPLER, STEPS)
        note(f"{what}, bf16", forecaster)


def _steps(section: Section, histories: Sequence[Window], tell: Callable[[str], None]) -> None:
    """Loss and gradients of one batch, in both phases and through the sampler; all networks are alike."""
    tell("steps of training")
    data = split(histories, "1h", HORIZONS, None, validation=0.0, hold_out=0.0)
    training = _Training(data, LEVELS, 0, TRAINING_STEPS, None)
    training._prepare_map()
    training._prepare_denoiser()
    net, generator = training.net.train(), Generator().manual_seed(1)
    share = Share(0, 1, generator)
    distribution = Distribution(net, SAMPLER, STEPS, SAMPLES[0])
    places = torch.tensor([path_steps(HORIZONS).index(horizon) for horizon in HORIZONS])
    read = distribution.places(training.levels)

    def batch() -> tuple[Origins, Tensor]:
        at = training.older[torch.randint(len(training.older), (BATCH,), generator=generator)]
        part = training.learn.only(at)
        return part, net.encoder(
            part.features, training.learn.sequence(at, net.architecture.context), _Dropout(share)
        )

    def through_the_sampler() -> Tensor:
        part, c = batch()
        with torch.no_grad():
            knots = training._unseen_knots(part)
        scores = distribution.ranked(distribution.joint(c), places, distribution.error)
        q = distribution.quantiles(scores, read).contiguous()
        z = piecewise(q, knot_scores().expand(knots.shape), knots)
        miss = part.z[..., None] - z
        return torch.maximum(training.levels * miss, (training.levels - 1) * miss).mean()

    def cost(loss: Callable[[], Tensor], steps: int) -> float:
        def step() -> None:
            for _ in range(steps):
                net.zero_grad()
                loss().backward()  # type: ignore[no-untyped-call]

        loss()
        return 1e3 * _timed(step) / steps

    slow = cost(through_the_sampler, SLOW_STEPS)
    fast = cost(lambda: training._denoiser_loss(share), FAST_STEPS)
    encoder = cost(lambda: batch()[1].sum(), FAST_STEPS)
    section.rows.append(
        Row("step of the map: pinball loss", {"cpu_ms": cost(lambda: training._map_loss(share), FAST_STEPS)})
    )
    what = f"step through the sampler: {BATCH} origins x {SAMPLES[0]} samples x {STEPS} evaluations"
    section.rows += [Row(what, {"cpu_ms": slow}), Row("the encoder's part of either", {"cpu_ms": encoder})]
    section.rows.append(
        Row(
            f"step of the denoiser: {BATCH} origins x {DRAWS} noise levels, one evaluation",
            {"cpu_ms": fast, "times_faster": slow / fast},
            target=Target("times_faster", 50),
        )
    )


def _timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
