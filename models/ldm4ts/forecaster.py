"""The forecaster that serves an LDM4TS: windows -> latents to come -> quantiles and paths."""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barcast.models import samplers
from barcast.models.diffusion import fingerprint, use_one_thread
from barcast.models.forecast import Card, Forecast
from barcast.models.ldm4ts.network import LDM4TS, timesteps_of
from barcast.models.paths import Coupling, path_steps
from barcast.models.quantiles import forecast_of
from barcast.models.scaling import Frame, Scaling
from barcast.models.sssd.marginal import knot_scores, piecewise
from barcast.models.window import Window

Array = NDArray[np.float64]

SAMPLER, STEPS = "dpmpp", 4
"""What samples where nothing is said."""
TAIL = 8
"""Of this many samples at each end of a horizon's, the mean distance from the normal serves the tail."""


class Sampling:
    """Ways to come from one sampler and the network's fixed noise.

    The fresh noise of a stochastic sampler is that of a key: see `samplers.keyed_normals`.
    """

    def __init__(self, net: LDM4TS, sampler: str, steps: int, samples: int | None = None) -> None:
        solver = samplers.build(sampler, steps)
        self._net, self._run, self._draws = net, solver.run, solver.draws
        self._timesteps = timesteps_of(solver.lambdas)
        self._noise = net.noise[:samples]  # (S, 4, p, f)
        self.evaluations = len(solver.lambdas)

    def ways(self, known: Tensor, tokens: Tensor, key: tuple[str, str, int] = ("", "", 0)) -> Tensor:
        """What may come, (B, S, G) in deviations of each step, of what is known (B, 5, p, p) and tokens."""
        start = self._noise.expand(len(known), *self._noise.shape)
        if self._draws:
            fresh = samplers.keyed_normals(self._draws, self._noise.shape, *key)
            fresh = fresh[:, None].expand(-1, len(known), *self._noise.shape)
            start = torch.cat([start[None], fresh])
        latent = self._run(self._net.asked(known, tokens, self._timesteps), start)
        return self._net.way(latent)


def quantiles_of(samples: Tensor, normal: Tensor) -> Tensor:
    """The quantiles (..., Q) of samples (..., S), at normal scores (Q,) of levels, float64, rising along Q.

    Standardised samples in order depart from the normal quantiles of their ranks; the departure is
    interpolated between ranks, and is that of the last ranks beyond them.
    """
    x = samples.double().sort(-1).values
    S = x.shape[-1]
    mean, spread = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, correction=0)
    ranks = torch.special.ndtri((torch.arange(S, dtype=torch.float64) + 0.5) / S)
    spread = spread / ranks.std(correction=0)
    apart = (x - mean) / spread.clamp(min=1e-12) - ranks
    k = max(1, S // TAIL)
    low, high = (end.mean(-1, keepdim=True).expand_as(end) for end in (apart[..., :k], apart[..., S - k :]))
    apart = torch.cat([low, apart[..., k : S - k], high], -1)
    at = torch.searchsorted(ranks, normal).clamp(1, S - 1)
    share = ((normal - ranks[at - 1]) / (ranks[at] - ranks[at - 1])).clamp(0, 1)
    between = apart[..., at - 1] * (1 - share) + apart[..., at] * share
    return torch.cummax(mean + spread * (normal + between), -1).values


class LatentForecaster:
    """Forecasts of one model by one sampler. It has no state that a forecast changes.

    The tile is one window and its S samples, whatever the number of windows, on one thread.
    """

    def __init__(
        self,
        net: LDM4TS,
        scaling: Scaling,
        levels: tuple[float, ...],
        model: str,
        sampler: str = SAMPLER,
        steps: int = STEPS,
    ) -> None:
        use_one_thread()
        self._net, self._scaling = net.eval(), scaling
        self._sampling = Sampling(net, sampler, steps)
        self._path = path_steps(scaling.horizons)
        self._places = [self._path.index(h) for h in scaling.horizons]
        self._normal = torch.special.ndtri(torch.tensor(levels, dtype=torch.float64))
        self._knots = knot_scores()
        samples = net.architecture.samples
        said = [] if net.language is None else [net.language.fingerprint]
        self._card = Card(
            model=model,
            kind="ldm4ts",
            timeframe=scaling.timeframe,
            horizons=scaling.horizons,
            levels=levels,
            window=scaling.window,
            min_window=scaling.min_window,
            sampler=sampler,
            steps=steps,
            samples=samples,
            fingerprint=" ".join([fingerprint(samples), f"diffusers={version('diffusers')}", *said]),
        )

    @property
    def card(self) -> Card:
        """Identity, horizons and levels, and the window that is needed, in bars."""
        return self._card

    @property
    def path(self) -> tuple[int, ...]:
        """The steps of the paths, in bars ahead; see `path_steps`."""
        return self._path

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast every window; raises `ValueError` for one shorter than `card.min_window`."""
        use_one_thread()
        with torch.inference_mode():
            frames = self._scaling.of_windows(windows)
            return [self._forecast(*pair) for pair in zip(windows, frames, strict=True)]

    def couplings(self, windows: Sequence[Window]) -> list[Coupling]:
        """How the steps of each window's path go together; errors as in `forecast`."""
        use_one_thread()
        with torch.inference_mode():
            frames = self._scaling.of_windows(windows)
            return [self._coupling(*pair) for pair in zip(windows, frames, strict=True)]

    def _coupling(self, window: Window, frame: Frame) -> Coupling:
        ways = self._ways(window, *self._seen(frame))
        ranks = ways.argsort(stable=True, dim=0).argsort(0)
        return Coupling(self._path, ranks.numpy(), np.ones(len(self._path)))

    def _seen(self, frame: Frame) -> tuple[Tensor, Tensor]:
        """Features (1, F) and sequence (1, L, C)."""
        sequence = frame.channels[-self._net.architecture.context :]
        return torch.from_numpy(frame.features).float(), torch.from_numpy(sequence).float()[None]

    def _ways(self, window: Window, features: Tensor, sequence: Tensor) -> Tensor:
        net, key = self._net, (self.card.model, window.symbol, window.close_time)
        return self._sampling.ways(net.known(sequence), net.tokens(features, sequence), key)[0]  # (S, G)

    def _forecast(self, window: Window, frame: Frame) -> Forecast:
        net, (features, sequence) = self._net, self._seen(frame)
        ways = self._ways(window, features, sequence)[:, self._places]  # (S, H)
        sampled = quantiles_of(ways.T, self._normal)  # (H, Q)
        told = net.told(features, sequence)
        knots = net.map.average(told)[0]  # (H, K)
        H = len(knots)
        mapped = piecewise(self._normal.expand(H, -1).contiguous(), self._knots.expand(knots.shape), knots)
        share = torch.sigmoid(net.gate(told))[0].double()[:, None]
        z = torch.cummax(share * sampled + (1 - share) * mapped, -1).values
        return forecast_of(self.card, window, z.numpy() * frame.scale[0][:, None])
