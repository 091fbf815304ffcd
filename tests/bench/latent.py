"""`python -m tests.bench.latent FILE[@CALENDAR] ...`: what each part of an LDM4TS earns on unseen bars.

An LDM4TS is trained on all bars but the newest `TESTED` of each file; one without the image of what was, one
without spectrum and one without statistics take map and autoencoder from it, and their U-Nets and gates are
trained alike. All are judged on the same origins, not calibrated: what is sampled alone, and what is
published, which is fused with the map. Then what the whole one is told is swapped between origins, from the
same noise, beside other noise. Files have times of open, Parquet; without a name the sample bars are taken.
Models stay in the folder `latent/`, named by models/ and bars, and are not trained again; it writes
latent.json and prints one table as the README may quote it.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from barcast import models
from barcast.backtest.sample import sample_bars
from barcast.daemon.calendar import Calendars
from barcast.daemon.history import digest, find_timeframe, read_windows, scan
from barcast.daemon.timeframe import Timeframe
from barcast.models import LEVELS, Window, default_horizons, optimiser
from barcast.models.checkpoint import load, save
from barcast.models.diffusion import use_one_thread
from barcast.models.evaluation import windows_at
from barcast.models.ldm4ts import training
from barcast.models.ldm4ts.forecaster import STEPS, LatentForecaster, quantiles_of
from barcast.models.ldm4ts.network import LDM4TS, PARTS
from barcast.models.ldm4ts.trained import LatentTrained
from barcast.models.scores import Estimate, crps, gain, lag
from barcast.models.sssd.network import sobol_normals
from tests.bench.report import host, sentence

JSON, FOLDER = Path("latent.json"), Path("latent")
TESTED, STRIDE = 1_200, 5
"""Bars of each symbol that nothing learns from, and from one origin to the next."""
SWAPPED = 64
"""Origins between which is swapped."""
OTHER = 7919  # the seed of the other noise
WHOLE = "all of it"

Array = Any


@dataclass(frozen=True)
class Bars:
    """One file's: those before `since` are learnt from."""

    name: str
    timeframe: str
    histories: Sequence[Window]
    since: int
    digest: str

    def places(self, history: Window) -> range:
        """The origins of a symbol."""
        first = int(np.searchsorted(history.close_times, self.since))
        return range(first, len(history) - max(default_horizons(self.timeframe)), STRIDE)


def opened(given: str) -> Bars:
    """The bars of FILE[@CALENDAR]."""
    name, _, calendar = given.partition("@")
    path, stamp = (Path(name), "open") if name else (sample_bars(), "close")
    calendar = calendar or ("24x7" if name else "XNYS")
    found, _ = find_timeframe([path], stamp)  # type: ignore[arg-type]
    timeframe = Timeframe.parse("session") if calendar == "XNYS" else found
    histories = list(read_windows(scan([path], stamp, Calendars(calendar, timeframe))).values())  # type: ignore[arg-type]
    since = max(int(w.close_times[-TESTED]) for w in histories)
    return Bars(path.stem, timeframe.text, histories, since, digest([path]))


def trained(
    bars: Bars, without: str | None, whole: LatentTrained | None, tell: Callable[[str], None]
) -> LatentTrained:
    """The model without a part: map and autoencoder are those of the whole one."""
    sources = sorted(Path(models.__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"".join(p.read_bytes() for p in sources) + f"{bars.digest} {bars.since}".encode())
    folder = FOLDER / f"{bars.name}-{without or 'whole'}-{code.hexdigest()[:12]}"
    if folder.exists():
        kept = load(folder).trained
        assert isinstance(kept, LatentTrained)
        return kept

    def fit(net: LDM4TS, phases: Sequence[optimiser.Phase], *args: Any) -> optimiser.Fitted:
        if whole is None:
            return optimiser.fit(net, phases, *args)
        for name in ("temporal", "map", "vae", "read"):
            getattr(net, name).load_state_dict(getattr(whole.net, name).state_dict())
        found = optimiser.fit(net, [p for p in phases if p.name in ("diffusion", "gate")], *args)
        return replace(found, chosen={p.name: (0,) * p.members for p in phases} | found.chosen)

    def show(p: optimiser.Progress) -> None:
        if p.crps is not None:
            tell(
                f"{bars.name} without {without or 'nothing'}: {p.phase} {p.step}/{p.steps} crps {p.crps:.4f}"
            )

    state = folder.with_suffix(".training")
    state.parent.mkdir(exist_ok=True)
    with patch.object(training, "fit", fit):
        made = training.train(
            bars.histories,
            timeframe=bars.timeframe,
            horizons=default_horizons(bars.timeframe),
            levels=LEVELS,
            until=bars.since,
            parts=[part for part in PARTS if part != without],
            state=state,
            progress=show,
        )
    save(made, folder)
    state.unlink(missing_ok=True)
    return made


class Taken(LatentForecaster):
    """Keeps what it samples: the same ways serve the forecasts of several gates."""

    def __init__(self, made: LatentTrained) -> None:
        super().__init__(made.net, made.scaling, made.levels, "x")
        self.kept: dict[tuple[str, int], Tensor] = {}

    def _ways(self, window: Window, features: Tensor, sequence: Tensor) -> Tensor:
        key = window.symbol, window.close_time
        if key not in self.kept:
            self.kept[key] = super()._ways(window, features, sequence)
        return self.kept[key]


def quantiles(made: LatentTrained, bars: Bars, tell: Callable[[str], None]) -> dict[str, Array]:
    """What is published, what is sampled, and what the map says, (n, H, Q)."""
    forecaster, found = Taken(made), {}
    gate = made.net.gate
    weight, bias = gate.weight.detach().clone(), gate.bias.detach().clone()
    for name, always in (("fused", None), ("sampled", 50.0), ("map", -50.0)):
        with torch.no_grad():
            gate.weight.copy_(weight if always is None else 0 * weight)
            gate.bias.copy_(bias if always is None else torch.full_like(bias, always))
        rows = []
        for history in bars.histories:
            tell(f"{bars.name}: {name} {history.symbol}")
            for windows in windows_at(history, bars.places(history), forecaster.card.window):
                rows += [f.quantiles for f in forecaster.forecast(windows)]
        found[name] = np.array(rows)
    with torch.no_grad():
        gate.weight.copy_(weight)
        gate.bias.copy_(bias)
    return found


def swaps(made: LatentTrained, bars: Bars) -> dict[str, float]:
    """How far sampled quantiles move, in deviations, on average over levels, horizons and origins.

    Where an origin is told another's tokens, or shown another's image, from the same noise; and where it
    begins from other noise.
    """
    forecaster, net = LatentForecaster(made.net, made.scaling, made.levels, "x"), made.net
    ends = [(h, k) for h in bars.histories for k in bars.places(h)]
    some = [ends[int(i)] for i in np.linspace(0, len(ends) - 1, SWAPPED)]
    windows = [next(windows_at(h, [k], forecaster.card.window))[0] for h, k in some]
    with torch.inference_mode():
        seen = [forecaster._seen(frame) for frame in made.scaling.of_windows(windows)]
        known = [net.known(sequence) for _, sequence in seen]
        tokens = [net.tokens(*each) for each in seen]

        def said(image: Sequence[Tensor], told: Sequence[Tensor], sampling: Any) -> Tensor:
            ways = [sampling.ways(a, b)[0][:, forecaster._places] for a, b in zip(image, told, strict=True)]
            return torch.stack([quantiles_of(w.T, forecaster._normal) for w in ways])

        def moved(other: Tensor) -> float:
            return float((other - first).abs().mean())

        half = SWAPPED // 2
        first = said(known, tokens, forecaster._sampling)
        found = {
            "tokens": moved(said(known, tokens[half:] + tokens[:half], forecaster._sampling)),
            "image": moved(said(known[half:] + known[:half], tokens, forecaster._sampling)),
        }
        noise = net.noise.clone()
        net.noise.copy_(sobol_normals(len(noise), noise[0].numel(), OTHER).reshape(noise.shape))
        other = LatentForecaster(net, made.scaling, made.levels, "x")
        found["noise"] = moved(said(known, tokens, other._sampling))
        net.noise.copy_(noise)
    return found


def measure(bars: Bars, tell: Callable[[str], None]) -> dict[str, Any]:
    """All rows of a file."""
    whole, rows, losses = None, [], {}
    y = np.concatenate([_outcomes(h, bars) for h in bars.histories])
    times = np.concatenate([h.close_times[list(bars.places(h))] for h in bars.histories])
    distinct, at = np.unique(times, return_inverse=True)
    lags = lag(max(default_horizons(bars.timeframe)), STRIDE, len(distinct))
    size = np.abs(y).mean(0)
    for without in (None, *PARTS):
        made = trained(bars, without, whole, tell)
        whole = whole or made
        for name, q in quantiles(made, bars, tell).items():
            if name == "map" and without is not None:
                continue
            part = WHOLE if without is None else f"without {without}"
            what = "the map alone" if name == "map" else f"{name}, {part}"
            losses[what] = (crps(y, q, LEVELS) / size).mean(1)
            of = losses[f"{'fused' if name == 'map' else name}, {WHOLE}"]
            over: Estimate = gain(losses[what], of, at, len(distinct), lags)
            low, high = LEVELS.index(0.05), LEVELS.index(0.95)
            inside = float(((y >= q[..., low]) & (y <= q[..., high])).mean())
            rows.append(
                {
                    "what": what,
                    "crps": float(losses[what].mean()),
                    "gain": 100 * over.value,
                    "error": 100 * over.error,
                    "coverage_90": inside,
                }
            )
    assert whole is not None
    return {"origins": len(y), "since": bars.since, "rows": rows, "swaps": swaps(whole, bars)}


def _outcomes(history: Window, bars: Bars) -> Array:
    price = np.log(history.values[:, 3])
    return np.array(
        [[price[k + h] - price[k] for h in default_horizons(bars.timeframe)] for k in bars.places(history)]
    )


def markdown(found: dict[str, Any]) -> str:
    """The tables."""
    lines = []
    for name, data in found["data"].items():
        day = np.datetime64(data["since"], "ns").astype("datetime64[D]")
        lines += [
            "",
            f"| {name}, {data['origins']:,} origins since {day} | CRPS | gain in %, ± | inside 90 % |",
            "|---|---:|---:|---:|",
        ]
        for r in data["rows"]:
            over = "" if r["what"].endswith(WHOLE) else f"{r['gain']:+.2f} ± {r['error']:.2f}"
            lines.append(f"| {r['what']} | {r['crps']:.4f} | {over} | {100 * r['coverage_90']:.1f} |")
        told = ", ".join(f"other {k} {v:.3f}" for k, v in data["swaps"].items())
        lines += ["", f"Sampled quantiles move by (deviations): {told}."]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.latent", description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE[@CALENDAR]")
    given = parser.parse_args()
    out, began = Console(highlight=False, soft_wrap=True), time.monotonic()
    use_one_thread()

    def tell(text: str) -> None:
        out.print(f"{time.monotonic() - began:.0f} s {text}", markup=False)

    found: dict[str, Any] = {"machine": host(), "steps": STEPS, "data": {}}
    for name in given.files or [""]:
        bars = opened(name)
        found["data"][bars.name] = measure(bars, tell)
        JSON.write_text(json.dumps(found, indent=1))
    out.print(sentence(found["machine"]), markup=False)
    out.print(markdown(found), markup=False)


if __name__ == "__main__":
    main()
