"""Quantile averaging of several forecasters, with weights that validation chose.

Quantiles are averaged level by level (Lichtendahl, Grushka-Cockayne and Winkler 2013), which keeps the shape
that averaging probabilities would blur.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from barcast.models.catalog import BASELINES
from barcast.models.errors import ConfigError, DataError
from barcast.models.evaluation import collect, even_stride
from barcast.models.forecast import FAR, Card, Forecast, Forecaster
from barcast.models.gbm import VALIDATION
from barcast.models.origins import LEAST, parts
from barcast.models.quantiles import forecast_of
from barcast.models.trained import Model, Past, check_outputs, check_paths
from barcast.models.window import Window, check_long_enough

Array = NDArray[np.float64]

ORIGINS = 2000  # that the weights are fitted on, about
SHRINK = 0.01  # share of the loss that a nat away from equal weights must save
STEPS, RATE = 400, 30.0  # of the descent


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A baseline by its name, or a checkpoint's id and model."""

    name: str
    trained: Model | None = None

    def open(
        self,
        timeframe: str,
        horizons: tuple[int, ...],
        levels: tuple[float, ...],
        sampler: str | None,
        steps: int | None,
    ) -> Forecaster:
        """Its forecaster. Raise `ConfigError` for a checkpoint that forecasts something else."""
        if self.trained is None:
            return BASELINES[self.name](timeframe, horizons, levels)
        forecaster = self.trained.forecaster(self.name, sampler, steps, False)
        wanted = {"timeframe": timeframe, "horizons": horizons, "levels": levels}
        for field, mine in wanted.items():
            if (theirs := getattr(forecaster.card, field)) != mine:
                raise ConfigError(
                    f"{field} of member {self.name} is {theirs}, not {mine}: all members must forecast the "
                    f"same; name another member, or take its {field} for all"
                )
        return forecaster


@dataclass(frozen=True, slots=True, eq=False)
class Ensemble:
    """Members, their weights (H, M) above or equal to 0 with a sum of 1 a horizon, and their history."""

    timeframe: str
    horizons: tuple[int, ...]
    levels: tuple[float, ...]
    members: tuple[Member, ...]
    weights: Array
    record: Past

    def open_members(self, sampler: str | None = None, steps: int | None = None) -> list[Forecaster]:
        """The forecasters of the members, in order; see `Member.open`."""
        return [m.open(self.timeframe, self.horizons, self.levels, sampler, steps) for m in self.members]

    def sentences(self) -> list[str]:
        """The weights, a line for each horizon."""
        return [
            f"weights +{h}: " + ", ".join(f"{m.name} {w:.2f}" for m, w in zip(self.members, row, strict=True))
            for h, row in zip(self.horizons, self.weights, strict=True)
        ]

    def forecaster(
        self, model: str, sampler: str | None = None, steps: int | None = None, paths: bool = False
    ) -> "EnsembleForecaster":
        """See `Model.forecaster`; sampler and steps go to the members that are sampled."""
        check_paths(model, paths)
        return EnsembleForecaster(self.open_members(sampler, steps), self.weights, model)


class EnsembleForecaster:
    """The weighted mean of the members' quantiles. It has no state beside the members'.

    Each member gets the window cut to its own length. Mean, spread and probability of a rise follow from the
    averaged quantiles, see `quantiles.moments`. A forecast that one member cannot make is not finite.
    """

    def __init__(self, members: Sequence[Forecaster], weights: Array, model: str) -> None:
        self._members, self._weights = members, weights
        cards = [member.card for member in members]
        sampled = next((card for card in cards if card.sampler != "none"), cards[0])
        self._card = Card(
            model=model,
            kind="ensemble",
            timeframe=sampled.timeframe,
            horizons=sampled.horizons,
            levels=sampled.levels,
            window=max(card.window for card in cards),
            min_window=max(card.min_window for card in cards),
            sampler=sampled.sampler,
            steps=sampled.steps,
            samples=sampled.samples,
            fingerprint="; ".join(dict.fromkeys(card.fingerprint for card in cards)),
        )

    @property
    def card(self) -> Card:
        """Identity, horizons and levels, and the window that is needed, in bars."""
        return self._card

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast every window; raises `ValueError` for one shorter than `card.min_window`."""
        card = self.card
        for window in windows:
            check_long_enough(window, card.min_window)
        said = [m.forecast([_last(w, m.card.window) for w in windows]) for m in self._members]
        return [
            forecast_of(
                card,
                window,
                self._mean([f.quantiles for f in forecasts]),
                warming=any(f.warming for f in forecasts),
            )
            for window, *forecasts in zip(windows, *said, strict=True)
        ]

    def _mean(self, quantiles: Sequence[Array]) -> Array:
        mean = np.zeros_like(quantiles[0])
        for weight, q in zip(self._weights.T, quantiles, strict=True):
            mean += weight[:, None] * q
        rising: Array = np.maximum.accumulate(mean, -1)  # whatever is rounded
        return rising


def train(
    histories: Collection[Window],
    members: Sequence[Member],
    *,
    timeframe: str,
    horizons: Sequence[int],
    levels: Sequence[float],
    until: int | None = None,
    hold_out: float = 0.0,
    progress: Callable[[str], None] = lambda _: None,
) -> Ensemble:
    """Fit the weights on the validation part of whole histories, one window for each symbol.

    The part begins where every member has ended to learn. A trained member has been stopped early, or
    chosen, by a validation part of its own, mostly the same one, so that its score there flatters it a
    little; the shrinkage to equal weights is the answer to that. What the record calls held out has been
    validation for no member. `until` (nanoseconds) is the last close that may be used, the newest if None;
    `hold_out` the share of the newest bars that are left alone.
    Raises `DataError` for bars that cannot be learnt from, `ConfigError` for members that cannot be combined.
    """
    check_outputs(horizons, levels)
    names = [member.name for member in members]
    if len(set(names)) < max(2, len(names)):
        raise ConfigError(f"members {', '.join(names) or 'none'}: give two or more different ones")
    nested = [member.name for member in members if isinstance(member.trained, Ensemble)]
    if nested:
        raise ConfigError(f"member {nested[0]} is an ensemble: give its members instead")
    outputs = timeframe, tuple(horizons), tuple(levels)
    forecasters = [member.open(*outputs, None, None) for member in members]
    data = parts(histories, until, validation=VALIDATION, hold_out=hold_out)
    pasts = [member.trained.record for member in members if member.trained is not None]
    since = max([data.train_end, *(past.train_end for past in pasts)])
    bars = sum(
        int(((w.close_times > since) & (w.close_times <= data.validation_end)).sum()) for w in data.histories
    )
    if not bars:
        raise _too_few(0, since, data.validation_end)
    progress(f"forecasts of {', '.join(names)}")
    found = collect(
        forecasters,
        data.histories,
        since=since + 1,
        until=data.validation_end,
        stride=even_stride(bars, ORIGINS),
    )
    quantiles = np.stack(found.quantiles)  # (M, n, H, Q)
    whole = (np.abs(quantiles) < FAR).all((0, 2, 3))  # not of nan
    if whole.sum() < LEAST:
        raise _too_few(int(whole.sum()), since, data.validation_end)
    H = range(len(horizons))
    weights = [fit(found.outcomes[whole, j], quantiles[:, whole, j], levels) for j in H]
    fingerprint = "; ".join(dict.fromkeys(f.card.fingerprint for f in forecasters))
    learnt = data.only(set(found.symbols)).past(int(whole.sum()), fingerprint)
    learnt["train_end"] = since
    learnt["validation_end"] = max([data.validation_end, *(past.validation_end for past in pasts)])
    record = Past(**learnt)
    return Ensemble(*outputs, tuple(members), np.stack(weights), record)


def fit(outcomes: Array, quantiles: Array, levels: Sequence[float]) -> Array:
    """Weights (M,) that minimise the pinball loss of the mean of quantiles (M, n, Q) of outcomes (n,).

    Exponentiated gradient descent (Kivinen and Warmuth 1997) from equal weights. The loss is relative to that
    of equal weights, and `SHRINK` times the Kullback-Leibler divergence from them is added.
    """
    tau, M = np.array(levels), len(quantiles)
    w = np.full(M, 1 / M)
    chosen, best, size = w, np.inf, 0.0
    for step in range(STEPS):
        miss = outcomes[:, None] - np.add.reduce(w[:, None, None] * quantiles, 0)  # (n, Q)
        loss = np.maximum(tau * miss, (tau - 1) * miss).mean()
        size = size or loss
        value = loss / size + SHRINK * (w * np.log(M * w)).sum()
        if value < best:
            chosen, best = w, value
        slope = np.where(miss > 0, -tau, 1 - tau)
        gradient = (slope * quantiles).mean((1, 2)) / size + SHRINK * np.log(M * w)
        w = w * np.exp(-RATE / np.sqrt(1 + step) * (gradient - gradient.min()))
        w = np.maximum(w, 1e-9)
        w = w / w.sum()
    return chosen


def _too_few(n: int, since: int, until: int) -> DataError:
    first, last = (np.datetime_as_string(np.datetime64(time, "ns"), "s") for time in (since, until))
    return DataError(
        f"the members have learnt from bars up to {first}Z, and validation ends at {last}Z: {n} forecasts, "
        f"not {LEAST}, to fit weights on; train the members with a hold-out such as 0.2, so that they leave "
        "the newest bars, or give more bars"
    )


def _last(window: Window, length: int) -> Window:
    return window.part(max(0, len(window) - length), len(window))
