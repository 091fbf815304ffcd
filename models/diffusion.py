"""The forecaster that serves: windows -> quantiles through the map, and paths by the diffusion model."""

from collections.abc import Sequence

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
        self.lam = solver.lambdas.float()  # (evaluations,)
        self.noise = net.noise[:samples]  # (S, G)
        ranks = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
        self.normal = torch.special.ndtri(ranks)[:, None]  # (S, 1)
        with torch.inference_mode():
            self.error = torch.empty(0) if self.draws else self._error(self.noise)  # (S, G)

    def joint(self, c: Tensor, key: Key = NO_KEY) -> Tensor:
        """c (B, code) -> scores (B, S, G) float64: in each sample those of one path.

        The key decides what a stochastic sampler draws.
        """
        return self._run(c, self._noise(key))

    def sample(self, c: Tensor, at: Sequence[int], key: Key = NO_KEY) -> Tensor:
        """c (B, code) -> scores (B, S, H) float64 of the steps at these H places, each rising along S."""
        places, noise = torch.tensor(at, device=c.device), self._noise(key)
        error = self._error(noise) if self.draws else self.error
        scores = self._run(c, noise).index_select(-1, places).transpose(1, 2).contiguous()  # (B, H, S)
        ordered = scores.sort(-1).values - error.index_select(-1, places).T
        return torch.cummax(ordered, -1).values.transpose(1, 2)

    def quantiles(self, scores: Tensor, levels: Tensor) -> Tensor:
        """Scores (B, S, H) -> their quantiles at levels (Q,), (B, H, Q), not falling along Q.

        The departure from the normal quantile is interpolated between ranks: it is small and smooth.
        """
        S = scores.shape[1]
        rank = (levels * S - 0.5).clamp(0, S - 1)
        low = rank.floor().long().clamp(max=S - 2)
        share = (rank - low)[:, None]
        departure = scores - self.normal
        q = departure[:, low] * (1 - share) + departure[:, low + 1] * share  # (B, Q, H)
        rising: Tensor = torch.cummax(q.transpose(1, 2) + torch.special.ndtri(levels), -1).values
        return rising

    def below(self, scores: Tensor, at: Tensor) -> Tensor:
        """Probability that the score of each horizon is below `at` (B, H), for scores (B, S, H)."""
        S = scores.shape[1]
        apart = scores.transpose(1, 2) + 1e-9 * torch.arange(S)  # (B, H, S), strictly rising
        normal = self.normal.T.expand(apart.shape)
        probability: Tensor = torch.special.ndtr(piecewise(at[..., None], apart, normal)[..., 0])
        return probability

    def _noise(self, key: Key) -> Tensor:
        """The noise (S, G) that sampling starts from, with fresh draws behind it (1 + draws, S, G)."""
        if not self.draws:
            return self.noise
        fresh = samplers.keyed_normals(self.draws, self.noise.shape, *key)
        return torch.cat([self.noise[None], fresh])

    def _run(self, c: Tensor, noise: Tensor) -> Tensor:
        start = noise[..., None, :, :].expand(*noise.shape[:-2], len(c), -1, -1)
        return self._scores(self.run(self.net.denoiser.velocity(c, self.lam), start))

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
        self._distribution, self._joint = built.get(steps), built.get(coupling)
        self._path = path_steps(scaling.horizons)
        self._places = [self._path.index(h) for h in scaling.horizons]
        ranks = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
        self._normal = torch.special.ndtri(ranks).expand(1, len(scaling.horizons), -1).contiguous()
        self._net = net.eval()
        self._scaling = scaling
        self._levels = torch.tensor(levels, dtype=torch.float64)
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
            return [self._forecast(*pair) for pair in zip(windows, frames, strict=True)]

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
            scores = self._joint.joint(self._context(frame), key)[0]  # (S, G)
        ranks = scores.argsort(stable=True, dim=0).argsort(0)
        return Coupling(self._path, ranks.numpy(), _array(net.bridge.double()))

    def _context(self, frame: Frame) -> Tensor:
        features = torch.from_numpy(frame.features).float()  # (1, F)
        sequence = torch.from_numpy(frame.channels[-self._net.architecture.context :]).float()
        c: Tensor = self._net.encoder(features, sequence[None])
        return c

    def _forecast(self, window: Window, frame: Frame) -> Forecast:
        features = torch.from_numpy(frame.features).float()  # (1, F)
        knots = self._net.map.average(features)  # (1, H, K)
        u = knot_scores().expand(knots.shape)
        zero = piecewise(torch.zeros(*knots.shape[:2], 1, dtype=torch.float64), knots, u)[..., 0]  # (1, H)

        if self._distribution is None:
            q = torch.special.ndtri(self._levels).expand(*knots.shape[:2], -1).contiguous()  # (1, H, Q)
            z = piecewise(self._normal, u, knots)  # (1, H, S)
            fall = torch.special.ndtr(zero)
        else:
            key = self.card.model, window.symbol, window.close_time
            scores = self._distribution.sample(self._context(frame), self._places, key)  # (1, S, H)
            q = self._distribution.quantiles(scores, self._levels)
            z = piecewise(scores.transpose(1, 2), u, knots)
            fall = self._distribution.below(scores, zero)

        scale = frame.scale[0]
        return forecast_from(
            self.card,
            window,
            quantiles=_array(torch.cummax(piecewise(q, u, knots)[0], -1).values) * scale[:, None],
            mean=_array(z.mean(-1)[0]) * scale,
            std=_array(z.std(-1, correction=0)[0]) * scale,
            rise=_array(1 - fall[0]),
        )


def _array(x: Tensor) -> NDArray[np.float64]:
    return np.asarray(x.numpy(), np.float64)
