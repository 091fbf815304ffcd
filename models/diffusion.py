"""The forecaster that serves: windows -> quantiles through the map, and paths by the diffusion model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from barcast.models import samplers
from barcast.models.catalog import SAMPLER, STEPS
from barcast.models.forecast import Card, Forecast, forecast_from
from barcast.models.paths import Coupling, path_steps
from barcast.models.scaling import Frame, Scaling
from barcast.models.sssd.marginal import knot_scores, piecewise
from barcast.models.sssd.network import SSSD
from barcast.models.window import Window

Key = tuple[str, str, int]
"""Model, symbol and close time: what decides the draws of a stochastic sampler."""
NO_KEY: Key = ("", "", 0)
THREADS = 1
TOGETHER = 16
"""Windows whose work is ordered by its kind, at most: what is held of them stays in the caches."""


def fingerprint(samples: int) -> str:
    """What the bits of a forecast depend on besides model and bars."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"torch={torch.__version__} numpy={np.__version__} cpu={cpu} threads={THREADS} tile=1x{samples}"


def use_one_thread() -> None:
    """Let torch use one thread from now on.

    The setting belongs to the calling thread of the operating system, but for MKL to the whole process. It
    is not set back, since that would reach into other threads that forecast or train at the same time.
    """
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


class Places(NamedTuple):
    """Where the quantiles at Q levels lie among S ranks: between `low` (Q,) and the next, by `share` (Q,).

    `normal` (Q,) are the levels' normal scores.
    """

    low: Tensor
    share: Tensor
    normal: Tensor


class Distribution:
    """The scores of each step of a path given a context, as fixed samples.

    What the sampler makes of the noise without a velocity is known to be standard normal. The difference at
    each rank, the error of the sample and of the solver, is taken off every forecast (a control variate). The
    fresh noise of a stochastic sampler is that of a key, and so is its error.
    """

    def __init__(self, net: SSSD, sampler: str, steps: int, samples: int) -> None:
        solver = samplers.build(sampler, steps)
        self.net = net
        self.run = solver.run
        self.draws = solver.draws
        self.noise = net.noise[:samples]  # (S, G)
        ranks = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
        self.normal = torch.special.ndtri(ranks)[:, None]  # (S, 1)
        self.apart = 1e-9 * torch.arange(samples)  # (S,), makes scores rise strictly
        with torch.inference_mode():
            self._velocity = net.denoiser.at(solver.lambdas.float())
            self.error = torch.empty(0) if self.draws else self._error(self.noise)  # (S, G)

    def joint(self, c: Tensor, key: Key = NO_KEY) -> Tensor:
        """c (B, code) -> scores (B, S, G) float64: in each sample those of one path.

        The key decides what a stochastic sampler draws.
        """
        return self._run(c, self._noise(key))

    def sample(self, contexts: Sequence[Tensor], at: Tensor, keys: Sequence[Key]) -> Tensor:
        """Contexts (1, code) of B windows -> scores (B, H, S) float64, see `ranked`.

        The network is asked about one after the other.
        """
        noise = [self._noise(key) for key in keys]
        scores = torch.cat([self._run(c, start) for c, start in zip(contexts, noise, strict=True)])
        error = torch.stack([self._error(start) for start in noise]) if self.draws else self.error
        return self.ranked(scores, at, error)

    def ranked(self, scores: Tensor, at: Tensor, error: Tensor) -> Tensor:
        """Scores of paths (B, S, G) -> those of the steps at H places, (B, H, S), each rising along S.

        `error` (S, G), or of each (B, S, G), is taken off the ranks.
        """
        ordered = scores.index_select(-1, at).mT.contiguous().sort(-1).values
        return torch.cummax(ordered - error.index_select(-1, at).mT, -1).values

    def places(self, levels: Tensor) -> Places:
        """Where to read the quantiles at levels (Q,) float64."""
        S = len(self.normal)
        rank = (levels * S - 0.5).clamp(0, S - 1)
        low = rank.floor().long().clamp(max=S - 2)
        return Places(low, rank - low, torch.special.ndtri(levels))

    def quantiles(self, scores: Tensor, at: Places) -> Tensor:
        """Scores (B, H, S) -> their quantiles at places (Q,), (B, H, Q), not falling along Q.

        The departure from the normal quantile is interpolated between ranks: it is small and smooth.
        """
        normal, high = self.normal[:, 0], at.low + 1
        low = scores.index_select(-1, at.low) - normal[at.low]
        q = low * (1 - at.share) + (scores.index_select(-1, high) - normal[high]) * at.share
        rising: Tensor = torch.cummax(q + at.normal, -1).values
        return rising

    def below(self, scores: Tensor, at: Tensor) -> Tensor:
        """The normal score (B, H) of the probability to be below `at` (B, H), for scores (B, H, S)."""
        normal = self.normal.T.expand(scores.shape)
        return piecewise(at[..., None], scores + self.apart, normal)[..., 0]

    def _noise(self, key: Key) -> Tensor:
        """The noise (S, G) that sampling starts from, with fresh draws behind it (1 + draws, S, G)."""
        if not self.draws:
            return self.noise
        fresh = samplers.keyed_normals(self.draws, self.noise.shape, *key)
        return torch.cat([self.noise[None], fresh])

    def _run(self, c: Tensor, noise: Tensor) -> Tensor:
        start = noise[..., None, :, :].expand(*noise.shape[:-2], len(c), -1, -1)
        return self._scores(self.run(self._velocity(c), start))

    def _error(self, noise: Tensor) -> Tensor:
        zero = self.run(lambda x, _: torch.zeros_like(x), noise)
        error: Tensor = self._scores(zero).sort(-2).values - self.normal
        return error

    def _scores(self, w: Tensor) -> Tensor:
        return (w @ self.net.whiten.T).double()


class SSSDForecaster:
    """Forecasts of one model by one sampler. It has no state that a forecast changes.

    With `steps` 0 the scores of each horizon are taken as normal: the quantile map alone, of which nothing is
    sampled. Couplings are sampled in `coupling` steps, where 0 is a Gaussian copula. The tile is one window
    and its S samples: each call of the network has that shape, whatever the number of windows, and runs on
    one thread.
    """

    def __init__(
        self,
        net: SSSD,
        scaling: Scaling,
        levels: tuple[float, ...],
        model: str,
        sampler: str = SAMPLER,
        steps: int = STEPS,
        coupling: int = 0,
    ) -> None:
        samples = len(net.noise)
        use_one_thread()
        built = {n: Distribution(net, sampler, n, samples) for n in {steps, coupling} - {0}}
        p = torch.tensor(levels, dtype=torch.float64)
        distribution, self._joint = built.get(steps), built.get(coupling)
        self._sampled = None if distribution is None else (distribution, distribution.places(p))
        self._path = path_steps(scaling.horizons)
        self._places = torch.tensor([self._path.index(h) for h in scaling.horizons])
        ranks = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
        scores = torch.special.ndtri(torch.cat([ranks, p]))
        self._normal = scores.expand(1, len(scaling.horizons), -1)  # (1, H, S + Q)
        self._knots = knot_scores()  # (K,)
        self._zero = torch.zeros(1, len(scaling.horizons), 1, dtype=torch.float64)
        self._net = net.eval()
        self._scaling = scaling
        self._card = Card(
            model=model,
            kind="sssd",
            timeframe=scaling.timeframe,
            horizons=scaling.horizons,
            levels=levels,
            window=scaling.window,
            min_window=scaling.min_window,
            sampler=sampler if built else "none",
            steps=max(built, default=0),
            samples=samples if built else 0,
            fingerprint=fingerprint(samples),
        )

    @property
    def card(self) -> Card:
        """Identity, horizons and levels, and the window that is needed, in bars."""
        return self._card

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast every window; raises `ValueError` for one shorter than `card.min_window`."""
        use_one_thread()
        with torch.inference_mode():
            frames = self._scaling.of_windows(windows)
            parts = [slice(k, k + TOGETHER) for k in range(0, len(windows), TOGETHER)]
            return [forecast for part in parts for forecast in self._forecast(windows[part], frames[part])]

    @property
    def path(self) -> tuple[int, ...]:
        """The steps of the paths, in bars ahead; see `path_steps`."""
        return self._path

    def couplings(self, windows: Sequence[Window]) -> list[Coupling]:
        """How the steps of each window's path go together; errors as in `forecast`."""
        use_one_thread()
        with torch.inference_mode():
            frames = self._scaling.of_windows(windows)
            return [self._coupling(*pair) for pair in zip(windows, frames, strict=True)]

    def _coupling(self, window: Window, frame: Frame) -> Coupling:
        net = self._net
        if self._joint is None:
            scores = (net.noise @ net.whiten.T).double()
        else:
            key = self.card.model, window.symbol, window.close_time
            features = torch.from_numpy(frame.features).float()
            scores = self._joint.joint(self._context(features, frame), key)[0]  # (S, G)
        ranks = scores.argsort(stable=True, dim=0).argsort(0)
        return Coupling(self._path, ranks.numpy(), _array(net.bridge.double()))

    def _context(self, features: Tensor, frame: Frame) -> Tensor:
        sequence = torch.from_numpy(frame.channels[-self._net.architecture.context :]).float()
        c: Tensor = self._net.encoder(features, sequence[None])
        return c

    def _forecast(self, windows: Sequence[Window], frames: Sequence[Frame]) -> list[Forecast]:
        """Forecast some windows, one kind of work after another: its code is then in the caches already.

        What has sums or functions in it is done window by window; at once, what rounds each number by itself.
        """
        features = [torch.from_numpy(frame.features).float() for frame in frames]  # (1, F) each
        knots = torch.cat([self._net.map.average(x) for x in features])  # (B, H, K)
        u = self._knots.expand(knots.shape)
        fall = piecewise(self._zero.expand(len(knots), -1, -1), knots, u)[..., 0]  # (B, H), normal scores

        if self._sampled is None:
            x = self._normal.expand(len(knots), -1, -1)
        else:
            distribution, at = self._sampled
            contexts = [self._context(*pair) for pair in zip(features, frames, strict=True)]
            keys = [(self.card.model, window.symbol, window.close_time) for window in windows]
            scores = distribution.sample(contexts, self._places, keys)  # (B, H, S)
            x = torch.cat([scores, distribution.quantiles(scores, at)], -1)
            fall = distribution.below(scores, fall)

        Q = len(self.card.levels)
        found = piecewise(x, u, knots)  # (B, H, S + Q)
        quantiles = _array(torch.cummax(found[..., -Q:], -1).values)
        figures = zip(found[..., :-Q], quantiles, fall[:, None], strict=True)
        return [
            forecast_from(
                self.card,
                window,
                quantiles=q * frame.scale[0][:, None],
                mean=_array(z.mean(-1)) * frame.scale[0],
                std=_array(z.std(-1, correction=0)) * frame.scale[0],
                rise=_array(1 - torch.special.ndtr(below)[0]),
            )
            for window, frame, (z, q, below) in zip(windows, frames, figures, strict=True)
        ]


def _array(x: Tensor) -> NDArray[np.float64]:
    return np.asarray(x.numpy(), np.float64)
