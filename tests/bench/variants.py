"""The variants of the study: what is changed of the model, while it learns and while it forecasts.

A change is a patch of a constant or function of the product, made here and nowhere else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from inspect import getsource
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from barcast.models import BASELINES, LEVELS, Forecaster, default_horizons, optimiser, scaling, training
from barcast.models.catalog import STEPS
from barcast.models.diffusion import SSSDForecaster
from barcast.models.scaling import Frame, Scaling, feature_names, layout_of
from barcast.models.sssd.encoder import Encoder
from barcast.models.sssd.layers import PRESETS, Architecture
from barcast.models.sssd.network import SSSD
from barcast.models.trained import Trained

Patch = AbstractContextManager[Any]


def no_level() -> Patch:
    """The scale is not set to the size of realised residuals; their newest hundred remain a feature."""
    level = scaling._level

    def one(e: Any, w: int, h: int, first: int) -> Any:
        found = level(e, w, h, first)
        return found if w == scaling.SHORT_LEVEL else np.ones_like(found)

    return patch.object(scaling, "_level", one)


def no_season() -> Patch:
    """All hours or weekdays are one slot: to the scale, but not to the features that say the hour."""
    seasons = scaling._seasons

    def flat(tallies: Any, prior: float, own: bool, overlap: int) -> Any:
        whole = seasons(tallies.sum(-1, keepdims=True), prior, own, overlap)
        return np.repeat(whole, tallies.shape[-1], -1)

    return patch.object(scaling, "_seasons", flat)


def no_features() -> Patch:
    """The map sees zeros: what is forecast varies with the scale alone."""
    return _masked(lambda _: False)


def no_extras() -> Patch:
    """Intraday bars are seen as daily ones are: without tails, regime, gaps, still bars, autocovariance."""
    extra = ("tails", "skew", "regime", "range 96", "gap", "still", "autocovariance")
    return _masked(lambda name: not name.startswith(extra))


def _masked(keeps: Callable[[str], bool]) -> Patch:
    frame = Scaling.frame

    @lru_cache(8)
    def kept(timeframe: str, horizons: tuple[int, ...]) -> Any:
        return np.array([keeps(name) for name in feature_names(timeframe, horizons)])

    def masked(self: Scaling, symbol: str, close_times: Any, values: Any, first: int) -> Frame:
        found = frame(self, symbol, close_times, values, first)
        return replace(found, features=np.where(kept(self.timeframe, self.horizons), found.features, 0.0))

    return patch.object(Scaling, "frame", masked)


def sized(**sizes: Any) -> Patch:
    """A network of other sizes, or of other parts."""
    return patch.object(Architecture, "of", partial(Architecture.of, **sizes))


def members(count: int) -> Patch:
    """So many members; one alone learns from three blocks of four, mirrored."""
    return sized(members=count)


def preset(name: str) -> Patch:
    """The sizes of a preset."""
    return sized(**PRESETS[name])


def encoder(name: str) -> Patch:
    """Another encoder of the sequence."""
    return sized(encoder=name)


def head(name: str, blocks: int) -> Patch:
    """Another head of the denoiser, with so many residual blocks at each level."""
    return sized(head=name, blocks=blocks)


def mirrored(every: bool) -> Patch:
    """All members see up and down as exchangeable, or none."""
    begin = training._Training.__init__

    def begun(self: Any, *args: Any) -> None:
        begin(self, *args)
        self.mirrored = torch.full_like(self.mirrored, every)

    return patch.object(training._Training, "__init__", begun)


def last_weights() -> Patch:
    """What is judged, and serves, are the weights of a step, not their average over the steps before."""
    return patch.object(optimiser, "MEMORY", 0.0)


def no_sequence() -> Patch:
    """The encoder's S4D layers see zeros; the rolling features are left."""
    forward = Encoder.forward

    def blind(self: Any, features: Tensor, sequence: Tensor, drop: Any = None) -> Tensor:
        return forward(self, features, torch.zeros_like(sequence), drop)

    return patch.object(Encoder, "forward", blind)


@dataclass(frozen=True)
class Training:
    """How a network comes about: its phases, and the changes by name of function and arguments.

    Without the phase of the map its members stay where they begin, at their static knots. With `start` the
    map is that of another training. With `forced` the denoiser's best state but the first is taken, which is
    the map alone.
    """

    phases: tuple[str, ...]
    changes: tuple[tuple[Callable[..., Patch], Any], ...] = ()
    start: "Training | None" = None
    forced: bool = False

    def __str__(self) -> str:
        """All that makes it what it is: the text that names its files."""
        changes = [(getsource(change), args) for change, args in self.changes]
        return f"{self.phases} {changes} {self.start} {self.forced}"

    @contextmanager
    def changed(self) -> Iterator[None]:
        """The product with the changes made."""
        with ExitStack() as stack:
            for change, args in self.changes:
                stack.enter_context(change(*args))
            yield

    def run(self, start: Trained | None, histories: Sequence[Any], **options: Any) -> Trained:
        """Train; arguments are those of `training.train`, and the model of `start`."""

        def fit(net: SSSD, phases: Sequence[optimiser.Phase], *args: Any) -> optimiser.Fitted:
            if start is not None:
                net.map.load_state_dict(start.net.map.state_dict())
            else:
                phases[0].prepare()
            fitted = optimiser.fit(net, [p for p in phases if p.name in self.phases], *args)
            return replace(fitted, chosen={p.name: (0,) * p.members for p in phases} | fitted.chosen)

        energy = training._Training._denoiser_energy

        def look(self_: Any) -> list[float]:
            idle = self.forced and not self_.net.denoiser.leave.weight.any()
            return [9.0] if idle else energy(self_)

        with (
            self.changed(),
            patch.object(training, "fit", fit),
            patch.object(training._Training, "_denoiser_energy", look),
        ):
            return training.train(histories, **options)


FULL = Training(("map", "denoiser"))
DENOISER = Training(("denoiser",), start=FULL, forced=True)
BLIND = replace(DENOISER, changes=((no_sequence, ()),))


def _denoiser(change: Callable[..., Patch], *args: Any) -> Training:
    """Another denoiser on the same map."""
    return replace(DENOISER, changes=((change, args),))


@dataclass(frozen=True)
class Variant:
    """A forecaster of the study; without `training` a baseline of that name.

    `steps`, `sampler`, `samples` and `iid` say how it is sampled: by default as the product does.
    """

    name: str
    what: str
    training: Training | None
    steps: int | None = None
    sampler: str | None = None
    samples: int | None = None
    iid: bool = False
    raw: bool = False  # not calibrated
    extras: bool = False  # differs on intraday bars only

    @property
    def seeded(self) -> bool:
        """Whether a seed changes anything."""
        return self.training is not None and bool(self.training.phases)

    def suits(self, timeframe: str) -> bool:
        """Whether it is another forecaster on bars of this timeframe."""
        return not self.extras or bool(layout_of(timeframe).tails)

    @property
    def coupled(self) -> bool:
        """Whether its paths are judged: of all that have a denoiser, and the noise of the product."""
        sampled = not self.iid and self.samples is None and (self.steps != 0 or not self.raw)
        return self.training is not None and "denoiser" in self.training.phases and sampled

    def coupler(self, trained: Trained) -> SSSDForecaster:
        """What says how the steps of its paths go together."""
        return trained.raw(self.name, self.sampler, self.steps, paths=True)

    def __str__(self) -> str:
        """All that makes it what it is but the training."""
        return f"{self.steps} {self.sampler} {self.samples} {self.iid} {self.raw}"

    def forecaster(self, trained: Trained | None, timeframe: str, seed: int) -> Forecaster:
        """The forecaster, of the model that its training gave."""
        if trained is None:
            return BASELINES[self.name](timeframe, default_horizons(timeframe), LEVELS)
        noise = trained.net.noise
        rows = noise[: self.samples]
        if self.iid:
            rows = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
        trained.net.noise = rows
        try:
            make = trained.raw if self.raw else trained.forecaster
            made: Forecaster = make(self.name, self.sampler, self.steps)
        finally:
            trained.net.noise = noise
        return made


def _map(*changes: tuple[Callable[..., Patch], Any]) -> Training:
    return Training(("map",), changes)


def _sampled(name: str, what: str, training: Training = DENOISER, steps: int = STEPS, **how: Any) -> Variant:
    """Of which samples are drawn whatever validation says; beside them stands `uncalibrated`."""
    return Variant(name, what, training, steps, **how, raw=True)


VARIANTS = (
    Variant("hs", "historical simulation", None),
    Variant("static", "static map: no member learns", Training(())),
    Variant("full", "the product: diffusion where validation likes it", FULL),
    Variant("tiny", "the product, of the preset tiny", replace(FULL, changes=((preset, ("tiny",)),))),
    Variant("base", "the product, of the preset base", replace(FULL, changes=((preset, ("base",)),))),
    Variant("map", "the map alone", FULL, steps=0),
    Variant("uncalibrated", "the map alone, not calibrated", FULL, steps=0, raw=True),
    Variant("no-level", "scale without the level of realised residuals", _map((no_level, ()))),
    Variant("no-season", "scale without hours or weekdays", _map((no_season, ()))),
    Variant("no-features", "no features beside the scale", _map((no_features, ()))),
    Variant("no-extras", "no features for intraday bars alone", _map((no_extras, ())), extras=True),
    Variant("members-1", "one member instead of eight", _map((members, (1,)))),
    Variant("members-4", "four members", _map((members, (4,)))),
    Variant("mirrored-none", "no member mirrored instead of half", _map((mirrored, (False,)))),
    Variant("mirrored-all", "all members mirrored", _map((mirrored, (True,)))),
    Variant("last-weights", "weights as they are, not averaged over steps", _map((last_weights, ()))),
    _sampled("diffusion", "diffusion always: dpmpp, 8 evaluations, 256 Sobol points"),
    _sampled("no-sequence", "diffusion without the S4D sequence", BLIND),
    _sampled("multiscale", "diffusion with S4D layers on three timeframes", _denoiser(encoder, "multiscale")),
    _sampled("unet1d", "diffusion by a U-Net along the path", _denoiser(head, "unet1d", 1)),
    _sampled("nfe-4", "diffusion, 4 evaluations", steps=4),
    _sampled("nfe-20", "diffusion, 20 evaluations", steps=20),
    _sampled("ddim", "diffusion, ddim", sampler="ddim"),
    _sampled("sobol-16", "diffusion, 16 Sobol points", samples=16),
    _sampled("sobol-64", "diffusion, 64 Sobol points", samples=64),
    _sampled("iid-16", "diffusion, 16 independent draws", samples=16, iid=True),
    _sampled("iid-64", "diffusion, 64 independent draws", samples=64, iid=True),
    _sampled("iid-256", "diffusion, 256 independent draws", iid=True),
)
