"""What forecast paths are worth: their joint scores, the barriers they are said to touch, other couplings.

Every number's definition is in `DEFINITIONS`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from zlib import crc32

import numpy as np
import polars as pl
from msgspec.structs import replace
from numpy.typing import NDArray

from barcast.models import Forecast, Forecaster, Window
from barcast.models.evaluation import windows_at
from barcast.models.forecast import Paths
from barcast.models.joint import Touch, first_passage, first_touched, touch
from barcast.models.scores import brier, energy, gain, lag, mean, variogram

OWN = "own"
"""The coupling of the rows about paths as the model forecasts them."""

BROWNIAN = "brownian"
"""What stands there in the rows about a Brownian motion, which has the volatility of a baseline."""

PAIRS = ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (2.0, 2.0))
"""The barriers that are judged, up and down, in standard deviations of the model's own forecast."""

BINS = 10
"""Bins of equal width that probabilities are sorted into."""

DEFINITIONS = {
    "coupling": "how the steps of a path go together: own; or the same quantiles at every step, put together "
    "otherwise: gaussian (the model's Gaussian copula), random walk (ranks of a Brownian motion), "
    "independent, comonotone (the same rank at all steps); brownian is no coupling but a Brownian motion "
    "without drift, with the volatility of har-s, of har for daily bars, over the longest horizon",
    "energy": "energy score of the log returns at all steps, Gneiting and Raftery (2007), fair; these, and "
    "those of the other joint scores, are in deviations of the model's forecast over the longest horizon",
    "moves": "energy score of the log returns from each step to the next",
    "variogram": "variogram score of order 1/2 of the log returns at all steps, Scheuerer and Hamill (2015)",
    "own_gain": "100 (1 - score of the model's own paths / score of these), on the same origins",
    "up, down": "barriers above and below the close, in deviations of the model's forecast over the longest "
    "horizon; a path that touches one first touches it before the other and within that horizon",
    "brier": "(p - y)^2 summed over up first, down first and neither: Brier (1950); what came true is read "
    "from the highs and lows of bars, and one that touches both counts half each",
    "over_har": "100 (1 - Brier score / Brier score of brownian), for the same barriers; what S paths "
    "say has noise of its own, which costs up to a share of 1/S of the score",
    "said": "mean of the probabilities in a bin, of up first and down first",
    "seen": "share of those that came true",
}


COUPLINGS = (OWN, "gaussian", "random walk", "independent", "comonotone")
"""How the steps of the same quantiles are put together, see `DEFINITIONS`."""

JOINT = ("energy", "moves", "variogram")
"""The scores of whole paths, see `DEFINITIONS`."""

Array = NDArray[np.float64]
Ranks = NDArray[np.intp]


class _Said:
    """What one model said of paths of `steps`, in arrays along the origins that are joined at the end.

    `std` is (n,), `touched` (n, K, 3) what came true of the pairs; by coupling, the scores are (n,) and the
    probabilities `chances` (n, K, 3) of up first, down first and neither.
    """

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = np.array(steps)
        self.std: list[Array] = []
        self.touched: list[Array] = []
        self.scores: dict[str, dict[str, list[Array]]] = {name: defaultdict(list) for name in JOINT}
        self.chances: dict[str, list[Array]] = defaultdict(list)


class PathScores:
    """Scores paths as they are made, since all of them together would not fit into memory.

    `rivals` are, for models of paths by their place, the forecasters that put the same quantiles together by
    the model's Gaussian copula, which is the same for all windows. The state is what the models said, the
    deviations of the Brownian motion, those of the model with the place `brownian`, and the ranks of the
    rivals' samples.
    """

    def __init__(
        self, forecasters: Sequence[Forecaster], rivals: Mapping[int, Forecaster], brownian: int
    ) -> None:
        self._rivals, self._brownian = rivals, brownian
        self._said = {k: _Said(f.card.path) for k, f in enumerate(forecasters) if f.card.path}
        self._deviations: list[Array] = []
        self._gaussian: dict[int, Ranks] = {}

    def watch(self, k: int, history: Window, places: Sequence[int], made: Sequence[Forecast]) -> None:
        """Score forecasts of the k-th model from these bars; see `evaluation.collect`."""
        std = np.array([forecast.std[-1] for forecast in made])
        if k == self._brownian:
            self._deviations.append(std)
        if k not in self._said:
            return
        said, at = self._said[k], np.array(places)[:, None]
        prices = np.log(history.values[:, 1:4])  # high, low, close
        now = prices[at, 2]
        y = prices[at + said.steps, 2] - now  # (n, G)
        bars = at + np.arange(1, said.steps[-1] + 1)
        up, down = (std[:, None] * side for side in np.array(PAIRS).T)  # (n, K)
        said.std.append(std)
        said.touched.append(_three(first_touched(prices[bars, 0] - now, prices[bars, 1] - now, up, down)))
        good = [i for i, forecast in enumerate(made) if forecast.paths is not None]
        paths = [forecast.paths for forecast in made if forecast.paths is not None]
        if good and k in self._rivals and k not in self._gaussian:
            self._gaussian[k] = self._ranks_of(k, history, places[good[0]])
        for coupling in COUPLINGS:
            if coupling == "gaussian" and k not in self._rivals:
                continue
            scores, chances = np.full((3, len(made)), np.nan), np.full((len(made), len(PAIRS), 3), np.nan)
            if good:
                keys = [(made[i].close_time, crc32(made[i].symbol.encode())) for i in good]
                mixed = [self._coupled(k, coupling, *pair) for pair in zip(paths, keys, strict=True)]
                x = np.array([one.returns for one in mixed]) / std[good, None, None]  # (n, S, G)
                outcome = y[good] / std[good, None]
                moves = (np.diff(z, axis=-1, prepend=0.0) for z in (outcome, x))
                scores[:, good] = energy(outcome, x), energy(*moves), variogram(outcome, x)
                for i, one in zip(good, mixed, strict=True):
                    chances[i] = _three(touch(one, up[i], down[i]))
            for found, values in zip(said.scores.values(), scores, strict=True):
                found[coupling].append(values)
            said.chances[coupling].append(chances)

    def _ranks_of(self, k: int, history: Window, place: int) -> Ranks:
        rival = self._rivals[k]
        [windows] = windows_at(history, [place], rival.card.window)
        [forecast] = rival.forecast(windows)
        if forecast.paths is None:
            raise ValueError(f"{rival.card.model} forecasts paths by one coupling only")
        return _ranks(forecast.paths.returns)

    def _coupled(self, k: int, coupling: str, paths: Paths, key: tuple[int, int]) -> Paths:
        """The values of paths at every step, put together otherwise; nothing else changes."""
        if coupling == OWN:
            return paths
        S, G = paths.returns.shape
        ordered = np.sort(paths.returns, 0)
        if coupling == "comonotone":
            return replace(paths, returns=ordered)
        if coupling == "gaussian":
            ranks = self._gaussian[k]
        else:
            moves = np.random.default_rng(key).standard_normal((S, G))
            far = np.sqrt(np.diff(paths.steps, prepend=0))
            ranks = _ranks(moves if coupling == "independent" else (far * moves).cumsum(1))
        return replace(paths, returns=np.take_along_axis(ordered, ranks, 0))

    def frames(
        self, labels: Sequence[str], keep: NDArray[np.bool_], at: NDArray[np.intp], stride: int
    ) -> dict[str, pl.DataFrame]:
        """The frames `paths`, `touch` and `reliability` of an `Evaluation`, over all folds.

        `keep` (n,) are the origins that count, `at` numbers the times of these.
        """
        rows: dict[str, list[dict[str, object]]] = {"paths": [], "touch": [], "reliability": []}
        deviations = np.concatenate(self._deviations)[keep]
        for k, said in self._said.items():
            times = int(at.max()) + 1
            span = times, lag(int(said.steps[-1]), stride, times)
            std, truth = (np.concatenate(x)[keep] for x in (said.std, said.touched))
            for score, found in said.scores.items():
                losses = {coupling: np.concatenate(x)[keep] for coupling, x in found.items()}
                for coupling, loss in losses.items():
                    value = mean(loss, at, *span)
                    rows["paths"].append(
                        {"model": labels[k], "coupling": coupling, "score": score, "n": len(at)}
                        | {"times": times, "value": value.value, "error": value.error}
                        | _gained("own_gain", coupling != OWN, losses[OWN], loss, at, *span)
                    )
            chances = {coupling: np.concatenate(x)[keep] for coupling, x in said.chances.items()}
            up, down = (std[:, None] * side for side in np.array(PAIRS).T)
            chances[BROWNIAN] = _three(first_passage(up, down, deviations[:, None]))
            for j, pair in enumerate(PAIRS):
                happened = truth[:, j]
                briers = {c: brier(happened, p[:, j]).sum(-1) for c, p in chances.items()}
                for coupling, loss in briers.items():
                    p, value = chances[coupling][:, j], mean(loss, at, *span)
                    key = {"up": pair[0], "down": pair[1], "model": labels[k], "coupling": coupling}
                    shares = {"up_first": happened[:, 0].mean(), "down_first": happened[:, 1].mean()}
                    shares |= {"said_up_first": p[:, 0].mean(), "said_down_first": p[:, 1].mean()}
                    rows["touch"].append(
                        {**key, "n": len(at), "times": times, **shares}
                        | {"brier": value.value, "error": value.error}
                        | _gained("over_har", coupling != BROWNIAN, loss, briers[BROWNIAN], at, *span)
                        | _gained("own_gain", coupling != OWN, briers[OWN], loss, at, *span)
                    )
                    rows["reliability"] += [key | row for row in _reliability(p, happened, at, *span)]
        return {name: pl.DataFrame(found, infer_schema_length=None) for name, found in rows.items()}


def gaussian(paths: pl.DataFrame) -> list[str]:
    """The models, of the frame `paths`, whose own paths are those of their Gaussian copula."""
    scores = {key: frame["value"].to_list() for key, frame in paths.group_by("model", "coupling")}
    models = paths["model"].unique(maintain_order=True).to_list()
    return [model for model in models if scores[model, OWN] == scores.get((model, "gaussian"))]


def _ranks(values: Array) -> Ranks:
    """The rank of each value (S, G) in its column."""
    ranks: Ranks = values.argsort(0, kind="stable").argsort(0)
    return ranks


def _three(found: Touch) -> Array:
    """Up first, down first and neither, (..., 3)."""
    return np.stack((found.up, found.down, 1 - found.up - found.down), -1)


def _gained(
    name: str, there: bool, mine: Array, other: Array, at: NDArray[np.intp], times: int, lags: int
) -> dict[str, float | None]:
    """A gain in percent and its error, null where there is none."""
    if not there:
        return {name: None, f"{name}_error": None}
    found = gain(mine, other, at, times, lags)
    return {name: 100 * found.value, f"{name}_error": 100 * found.error}


def _reliability(
    p: Array, happened: Array, at: NDArray[np.intp], times: int, lags: int
) -> Iterator[dict[str, float | int]]:
    """A row for each bin that holds probabilities of up first and down first, the first two of (n, 3)."""
    said, came = p[:, :2].T.ravel(), happened[:, :2].T.ravel()
    moment = np.concatenate((at, at))
    edges = np.linspace(0, 1, BINS + 1).tolist()
    place = np.minimum((said * BINS).astype(int), BINS - 1)
    for k, (lower, upper) in enumerate(pairwise(edges)):
        if (own := place == k).any():
            seen = mean(came[own], moment[own], times, lags)
            yield {"lower": lower, "upper": upper, "n": int(own.sum()), "said": float(said[own].mean())} | {
                "seen": seen.value,
                "error": seen.error,
            }
