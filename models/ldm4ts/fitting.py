"""Training an `LDM4TSModel` on rows of bars and what followed them, and how it does on rows it has not seen.

The loop is the one that trains the served models; the newest sixth of the rows is learnt from by neither of
the first two phases, but chooses their weights, and its older half is what the gate learns from.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from barcast.models import optimiser, samplers
from barcast.models.diffusion import use_one_thread
from barcast.models.errors import ConfigError, DataError
from barcast.models.ldm4ts.bars import Seen, whole
from barcast.models.ldm4ts.forecaster import SAMPLER, STEPS, quantiles_of
from barcast.models.ldm4ts.losses import fused, image_loss, pinball
from barcast.models.ldm4ts.model import LDM4TSModel, mapped
from barcast.models.ldm4ts.training import LEARNT, PIECE, RATES
from barcast.models.optimiser import Budget, Fitted, Phase, Progress, Share, processes
from barcast.models.origins import thinned
from barcast.models.scores import crps
from barcast.models.training import static_knots

HELD_OUT = 6
"""One in so many rows, the newest, chooses between the weights of a training."""
LEAST_ROWS = 4 * HELD_OUT
LOOKED, LOOK_SAMPLES = 96, 16
"""Rows and samples of a look at the newest."""
GATED, GATE_SAMPLES = 200, 32
"""Rows that the gate learns from and that choose its weights, and samples of each."""
LEVELS = torch.arange(1, 20, dtype=torch.float64) / 20
NORMAL = torch.special.ndtri(LEVELS)
TIMESTEPS_SEEN = range(62, samplers.TIMESTEPS, 125)
"""The timesteps of a validation's fast loss, the same for each row."""


def fit(
    model: LDM4TSModel,
    ohlcv: Tensor,
    targets: Tensor,
    current_price: Any = None,
    *,
    steps: int = 600,
    batch_size: int = 64,
    learning_rate: float = RATES["diffusion"],
    progress: Callable[[Progress], None] = lambda _: None,
) -> Fitted:
    """Train on rows in order of time; arguments are those of `forward`, see `windows`.

    Three phases of so many steps: `autoencoder` learns the images, `diffusion` all but them and the gate, by
    the losses of `training_mode` at `learning_rate`, `gate` how much of a forecast is sampled. The outcomes
    of the last rows before the newest sixth reach into it: where that matters, leave those rows out, since
    rows bear no times. Raises `DataError` for rows not to be learnt from.
    """
    whole("steps", steps, 1)
    whole("batch_size", batch_size, 1)
    if not 0 < learning_rate < 1:
        raise ConfigError(f"learning_rate = {learning_rate!r} is not possible: give a number such as 1e-3")
    if model.alpha.device.type != "cpu":
        raise ConfigError(
            f"the model is on {model.alpha.device}, and fit trains on the CPU: move it there, or call "
            "forward with training_mode=True in a loop of your own"
        )
    rows = model.seen(ohlcv, current_price)
    way = model.ways(rows, targets)
    if len(rows) < LEAST_ROWS:
        raise DataError(f"{len(rows)} rows cannot be learnt: give at least {LEAST_ROWS}")
    use_one_thread()
    accelerator = processes("fp32", 1, batch_size)
    learnt = _Learnt(model, rows, way, batch_size)
    net = model.net
    phases = [
        Phase(
            "autoencoder",
            [net.vae, net.read],
            RATES["autoencoder"],
            learnt.image_loss,
            learnt.image_error,
            lambda: _free(net.vae, True),
        ),
        Phase(
            "diffusion",
            [net.temporal, net.map, net.statistics, net.frequency, net.unet, net.read, net.gate],
            learning_rate,
            learnt.fast_loss,
            learnt.crps,
            learnt.prepare,
        ),
        Phase("gate", [net.gate], RATES["gate"], learnt.gate_loss, learnt.gate_crps, learnt.prepare_gate),
    ]
    generator = Generator().manual_seed(model.options.seed)
    try:
        fitted = optimiser.fit(net, phases, Budget(steps), generator, accelerator, None, progress)
    finally:
        _free(net.vae, False)
    model.eval()
    return fitted


class _Learnt:
    """The losses of a training and its looks. The state are the latents that later phases learn from."""

    def __init__(self, model: LDM4TSModel, rows: Seen, way: Tensor, batch: int) -> None:
        self.model, self.net, self.rows, self.way, self.batch = model, model.net, rows, way, batch
        self.places = [model.steps.index(h) for h in model.horizons]
        n = len(rows) - len(rows) // HELD_OUT
        self.older, self.newest = torch.arange(n), torch.arange(n, len(rows))

    def _some(self, share: Share, among: Tensor) -> Tensor:
        return among[share.rows(torch.randint(len(among), (self.batch,), generator=share.generator))]

    def image_loss(self, share: Share) -> Tensor:
        """See `losses.image_loss`: half of the images are without what is to come."""
        at = self._some(share, self.older)
        half = share.rows(torch.rand(self.batch, generator=share.generator)) < 0.5
        shown = max(1, int((~half).sum()))
        return image_loss(self.net, self.rows.sequence[at], self.way[at], half, shown)

    def image_error(self) -> list[float]:
        """How far the way that is read from an image's latents is from it, in deviations."""
        at = thinned(self.newest, LOOKED)
        raw = self._raw(at)
        return [float((self.net.read(raw.flatten(1)) - self.way[at]).abs().mean())]

    def _raw(self, at: Tensor) -> Tensor:
        """Latents of what is to come, as the encoder gives them."""
        parts = torch.split(at, PIECE)
        return torch.cat([self.model.raw_latents(self.rows.sequence[some], self.way[some]) for some in parts])

    def prepare(self) -> None:
        """The autoencoder is done: latents of what was and what came, and the map's law of all outcomes."""
        net = self.net
        _free(net.vae, False)
        self.drawn = thinned(self.older, LEARNT)
        z = self.way[self.older][:, self.places].double()
        net.map.static.copy_(static_knots(z, False).expand_as(net.map.static))
        with torch.no_grad():
            raw = self._raw(self.drawn)
            net.measure(raw)
            self.latents = (raw - net.centre) / net.spread
            parts = torch.split(self.drawn, PIECE)
            self.known = torch.cat([net.known(self.rows.sequence[some]) for some in parts])

    def fast_loss(self, share: Share) -> Tensor:
        """The loss of `training_mode`."""
        i = self._some(share, torch.arange(len(self.drawn)))
        t, eps, kept = (share.rows(x) for x in self.model.drawn(self.batch, share.generator))
        at = self.drawn[i]
        found = self.model.losses(
            self.rows.only(at), self.known[i], self.latents[i], self.way[at], t, eps, kept
        )
        return found.loss

    def crps(self) -> list[float]:
        """CRPS of forecasts of the newest rows, in deviations."""
        at, found = thinned(self.newest, LOOKED), []
        for some in torch.split(at, PIECE // LOOK_SAMPLES):
            sampled, knots, share = self._forecast(some, LOOK_SAMPLES)
            found.append(_score(self.way[some][:, self.places], share * sampled + (1 - share) * knots))
        return [float(torch.cat(found).mean())]

    def prepare_gate(self) -> None:
        """What is sampled, and what the map says, on the newest rows."""
        net = self.net.eval()
        self.judged = thinned(self.newest, GATED)
        with torch.no_grad():
            parts = torch.split(self.judged, PIECE // GATE_SAMPLES)
            found = [self._forecast(some, GATE_SAMPLES)[:2] for some in parts]
            self.sampled, self.mapped = (torch.cat(x) for x in zip(*found, strict=True))
            self.told = net.told(self.rows.features[self.judged], self.rows.sequence[self.judged])
        self.first = max(1, len(self.judged) // 2)

    def _forecast(self, at: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Quantiles (n, H, Q) of what is sampled, those of the map, and the share (n, H, 1) of the former."""
        rows = self.rows.only(at)
        z, _ = self.model.sample(rows, samples, None, samplers.build(SAMPLER, STEPS))
        share, knots = self.model.told(rows)
        return quantiles_of(z, NORMAL), mapped(knots, NORMAL), share

    def gate_loss(self, share: Share) -> Tensor:
        """Pinball loss of the fused quantiles."""
        i = self._some(share, torch.arange(self.first))
        kept = share.rows(self.model.drawn(self.batch, share.generator)[2])
        miss = self._outcome(i)[..., None] - self._fused(i, self.told[i] * kept)
        return pinball(miss, LEVELS).mean().float()

    def gate_crps(self) -> list[float]:
        """CRPS of the fused quantiles, in deviations."""
        i = torch.arange(self.first, len(self.judged))
        return [float(_score(self._outcome(i), self._fused(i, self.told[i])).mean())]

    def _outcome(self, i: Tensor) -> Tensor:
        return self.way[self.judged[i]][:, self.places].double()

    def _fused(self, i: Tensor, told: Tensor) -> Tensor:
        return fused(self.net, told, self.sampled[i], self.mapped[i])


def _free(module: torch.nn.Module, on: bool) -> None:
    module.requires_grad_(on)


def _score(outcome: Tensor, quantiles: Tensor) -> Tensor:
    return torch.from_numpy(crps(outcome.double().numpy(), quantiles.numpy(), LEVELS.numpy()))


class Validation(NamedTuple):
    """How a model does on rows that it has not learnt from: the fast losses, and forecasts in full.

    `loss`, `velocity_loss` and `direct_loss` are those of `training_mode` at the same timesteps and noise for
    all; `crps` is the score of the full sampler's quantiles, in deviations of each outcome, averaged over the
    horizons. They are in different units: only each with itself can be compared.
    """

    loss: float
    velocity_loss: float
    direct_loss: float
    crps: float


@torch.no_grad()
def validate(
    model: LDM4TSModel, ohlcv: Tensor, targets: Tensor, current_price: Any = None, num_samples: int = 32
) -> Validation:
    """Both losses of rows and what followed them; the same bits each time. Arguments as of `forward`."""
    whole("num_samples", num_samples, 2)
    rows, was = model.seen(ohlcv, current_price), model.training
    model.eval()
    way = model.ways(rows, targets)
    device = way.device
    g = Generator().manual_seed(model.options.seed)
    total, scores = torch.zeros(3, dtype=torch.float64), []
    for at in torch.split(torch.arange(len(rows), device=device), PIECE // 8):
        some, ahead = rows.only(at), way[at]
        known, x0 = model.net.known(some.sequence), model.net.coming(some.sequence, ahead)
        for t in TIMESTEPS_SEEN:
            _, eps, _ = model.drawn(len(at), g)
            found = model.losses(some, known, x0, ahead, torch.full_like(at, t), eps, 1.0)
            part = torch.stack([found.loss, found.velocity, found.direct]).double().cpu()
            total += len(at) * part / len(TIMESTEPS_SEEN)
        drawn = model.draw(some, num_samples, LEVELS)
        z = ahead[:, [model.steps.index(h) for h in model.horizons]]
        scores.append(_score(z.cpu(), drawn.quantiles))
    model.train(was)
    loss, velocity, direct = (total / len(rows)).tolist()
    return Validation(loss, velocity, direct, float(torch.cat(scores).mean()))
