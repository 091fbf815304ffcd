"""GARCH(1,1) with filtered historical simulation. Needs the package arch, and imports it when one is made."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from barcast.models.baselines import card_of
from barcast.models.errors import ConfigError
from barcast.models.fitted import Fitted, Flat, Season, Series, parse
from barcast.models.season import Ints

Array = NDArray[np.float64]

VERSION = 1  # of the arithmetic: ids differ where bits may
PATHS = 1000
SEED = 11
BURN = 50  # residuals left out while the variance forgets where it began
CLIP = 15.0  # returns count as at most this many standard deviations of those that are fitted to
CALM = (0.05, 0.05, 0.9)  # omega, alpha and beta where no stationary process can be fitted


@dataclass(frozen=True, slots=True, eq=False)
class Process:
    """A GARCH(1,1) process in units of `unit`, the log return that is its standard deviation in the long run.

    v' = omega + alpha e² + beta v; `last` is the variance for the bar after those it was fitted to, which end
    at `close_time`. `residuals` (n,) rise, with a mean of 0 and a mean square of 1.
    """

    season: Season | None
    unit: float
    omega: float
    alpha: float
    beta: float
    residuals: Array
    close_time: int
    last: float

    def after(self, returns: Array) -> Array:
        """The variances (n,) for the bars that follow each of these returns (n,)."""
        variances, v = [], self.last
        for e in np.clip(returns / self.unit, -CLIP, CLIP).tolist():
            v = self.omega + self.alpha * e * e + self.beta * v
            variances.append(v)
        return np.array(variances)


class Garch(Fitted[Process]):
    """Quantiles of 1,000 simulated paths whose shocks are the fit's last residuals (`garch`, `garch-s`).

    Barone-Adesi, Giannopoulos and Vosper (1999) on Bollerslev (1986), fitted by maximum likelihood with
    Student-t shocks. Every step's shocks are the last 2,000 residuals (daily 750) at 1,000 evenly spaced
    levels, in an order of its own, the same for every forecast.

    Raises `ConfigError` without the package arch, and for a name with -s on daily bars.
    """

    def __init__(self, name: str, timeframe: str, horizons: Sequence[int], levels: Sequence[float]) -> None:
        _, self._seasonal, reach = parse(name, timeframe, horizons)
        try:
            import arch
        except ImportError as error:
            raise ConfigError(
                f"model {name!r} needs the package arch; install barcast with its extra baselines: "
                "pip install '.[baselines]', or name another"
            ) from error
        parameters = {"version": VERSION, "paths": PATHS, "seed": SEED, **asdict(reach)}
        card = card_of(name, timeframe, horizons, levels, reach.fit + reach.refit, reach.least, parameters)
        fitter = f"arch={arch.__version__} scipy={version('scipy')}"  # whose optimiser arch calls
        super().__init__(replace(card, fingerprint=f"{card.fingerprint} {fitter}"), reach)
        rng = np.random.default_rng(SEED)
        orders = [rng.permutation(PATHS) for _ in range(max(horizons))]
        self._levels = (np.array(orders) + 0.5) / PATHS

    def _fit(self, s: Series) -> Process:
        season = Season.of(s, self.card.horizons) if self._seasonal else None
        returns = Flat.of(s, season, ()).returns
        unit = sqrt(float((returns * returns).mean()))
        x = np.clip(returns / unit, -CLIP, CLIP) if unit > 0 else returns
        omega, alpha, beta = _maximum_likelihood(x) if unit > 0 else CALM
        p = Process(season, unit or 1.0, omega, alpha, beta, x, s.close_times.item(-1), 1.0)
        v = p.after(returns)
        residuals = np.sort((x[BURN:] / np.sqrt(v[BURN - 1 : -1]))[-self.reach.outcomes :])
        residuals -= residuals.mean()  # no drift is extrapolated
        size = sqrt(float((residuals * residuals).mean()))
        return replace(p, residuals=residuals / size if size > 0 else residuals, last=v.item(-1))

    def _figures(self, close_times: Ints, values: Array, fit: Process) -> tuple[Array, ...]:
        H = self.card.horizons
        new = int(np.searchsorted(close_times, fit.close_time, side="right"))
        s = Series.of(close_times[new - 1 :], values[new - 1 :])
        flat = Flat.of(s, fit.season, H)
        v = np.full(PATHS, fit.after(flat.returns)[-1] if len(flat.returns) else fit.last)
        shocks = fit.residuals[(self._levels * len(fit.residuals)).astype(np.intp)]
        total, sums = np.zeros(PATHS), []
        for step, z in enumerate(shocks, 1):
            e2 = v * z * z
            total = total + np.sqrt(v) * z
            v = fit.omega + fit.alpha * e2 + fit.beta * v
            if step in H:
                sums.append(total)
        paths = np.array(sums) * fit.unit  # (H, 1000)
        if fit.season is not None:
            paths *= Flat.of(Series.of(close_times[-2:], values[-2:]), fit.season, H).gain
        quantiles = np.quantile(paths, self.card.levels, axis=1).T
        return np.maximum.accumulate(quantiles, 1), paths.mean(1), paths.std(1), (paths > 0).mean(1)


def _maximum_likelihood(x: Array) -> tuple[float, float, float]:
    """Omega, alpha and beta of returns (n,) of mean square 1; those of a calm process where none is found."""
    from arch.univariate import GARCH, StudentsT, ZeroMean

    model: Any = ZeroMean(x, volatility=GARCH(1, 0, 1), distribution=StudentsT(), rescale=False)
    found = model.fit(disp="off", show_warning=False, options={"maxiter": 200})
    omega, alpha, beta = (float(p) for p in found.params.to_numpy()[:3])
    if found.convergence_flag == 0 and omega > 0 and min(alpha, beta) >= 0 and alpha + beta < 1:
        return omega, alpha, beta
    return CALM
