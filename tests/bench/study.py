"""`python -m tests.bench.study [VARIANT ...]`: what each part of the model earns, on bars it has not seen.

A cell is a data set, a fold, a variant and a seed: the variant is trained on all bars before the fold and
scored on the fold, at the same origins as all others. Each ends as a JSON file in the folder `study/`, named
by the hash of models/, the bars and what was done, and is not computed again while these are the same; an
interrupted training goes on. STUDY_DATA names Parquet files beside the sample bars, separated by blanks, each
with @FROM..TO behind it to test these days only.
"""

import argparse
import hashlib
import json
import os
import pickle
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
from rich.console import Console

from barcast import models
from barcast.backtest.evaluate import INTRADAY
from barcast.backtest.sample import sample_bars
from barcast.daemon.calendar import Calendars
from barcast.daemon.history import Stamp, digest, find_timeframe, read_windows, scan
from barcast.daemon.timeframe import Timeframe
from barcast.models import LEVELS, Forecast, Window, compare, default_horizons, open_model, training
from barcast.models.diffusion import use_one_thread
from barcast.models.evaluation import collect, windows_at
from barcast.models.paths import with_paths
from barcast.models.scaling import Frame, Scaling
from barcast.models.scores import Estimate, energy, gain, lag
from barcast.models.trained import Trained
from tests.bench.variants import VARIANTS, Training, Variant

FOLDER = Path("study")
FOLDS, TESTED = 2, 0.4
"""Folds of equal length, one after the other, and the share of the newest time that they cover."""
SEEDS = 3
MINUTES = 2.0
STATIC, FULL, HS = "static", "full", "hs"
GAUSSIAN = "map"  # whose paths have a Gaussian copula


@dataclass(frozen=True)
class Fold:
    """Bars of several symbols, and the time (nanoseconds) that is tested: learning ends at `since`."""

    data: str
    digest: str
    timeframe: str
    histories: Sequence[Window]
    since: int
    until: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.data} {_day(self.since)} to {_day(self.until)}"

    @property
    def stride(self) -> int:
        """Bars between two origins."""
        return INTRADAY if self.timeframe[-1] in "smh" else 1

    @property
    def tested(self) -> list[Window]:
        """The symbols that every variant can forecast from `since` on."""
        least = open_model(HS, self.timeframe, None, None).card.min_window
        return [w for w in self.histories if np.searchsorted(w.close_times, self.since) >= least]


class Cells:
    """Finished cells and trained models, as files; and the frames of the fold at hand, kept in memory."""

    def __init__(
        self, folder: Path, minutes: float, steps: int | None = None, looked: int = training.LOOK_PATHS
    ) -> None:
        """A training ends after `minutes` of CPU time or `steps`; each look at it judges `looked` paths."""
        folder.mkdir(exist_ok=True)
        self.folder, self.minutes, self.steps, self.looked = folder, minutes, steps, looked
        sources = sorted(Path(models.__file__).parent.rglob("*.py"))
        self.code = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()
        self.frames: dict[Any, Frame] = {}

    def path(self, fold: Fold, variant: Variant, seed: int) -> Path:
        """The file of a cell."""
        if variant.training is None:
            return self._file("cell", fold.name, fold.digest, variant.name)
        model = self._path(fold, variant.training, seed).stem
        return self._file("cell", fold.name, fold.digest, model, variant, seed)

    def compute(self, fold: Fold, variant: Variant, seed: int) -> dict[str, Any]:
        """Train and score a cell, and write it down."""
        began = time.process_time()
        trained = None if variant.training is None else self._trained(fold, variant.training, seed)
        changed = nullcontext() if variant.training is None else variant.training.changed()
        with changed, patch.object(Scaling, "of_window", self._of_window(fold, variant.training)):
            forecaster = variant.forecaster(trained, fold.timeframe, seed)
            (found,) = compare(
                [forecaster], fold.tested, since=fold.since, until=fold.until, stride=fold.stride
            )
        record = None if trained is None else trained.record
        cell = {
            "data": fold.data,
            "fold": fold.name,
            "variant": variant.name,
            "seed": seed,
            "horizons": found.horizons,
            "stride": fold.stride,
            "crps": found.crps.tolist(),
            "intervals": found.intervals,
            "coverage": found.coverage.tolist(),
            "capped": record is not None and record.capped,
            "denoiser_step": None if record is None else record.denoiser_step,
            "seconds": time.process_time() - began,
            "symbols": found.symbols,
            "close_times": found.close_times.tolist(),
            "losses": [[float(f"{x:.7g}") for x in row] for row in found.losses],
            "moves": [] if trained is None else self._moves(fold, variant, trained),
        }
        _write(self.path(fold, variant, seed), json.dumps(cell).encode())
        return cell

    def _moves(self, fold: Fold, variant: Variant, trained: Trained) -> list[float]:
        """Energy scores of the moves along paths, which have the map's quantiles; none but of diffusion."""
        if not variant.coupled:
            return []
        quantiles, coupler = trained.raw("map", None, 0), variant.coupler(trained)
        found: list[float] = []

        def watch(_: int, history: Window, places: Sequence[int], made: Sequence[Forecast]) -> None:
            windows = [w for few in windows_at(history, places, quantiles.card.window) for w in few]
            price, steps = np.log(history.values[:, 3]), np.array(coupler.path)
            for place, forecast in zip(places, with_paths(coupler, windows, made), strict=True):
                if forecast.paths is None:
                    raise RuntimeError(f"{fold.name}: {variant.name} forecasts no path at {place}")
                size = forecast.std[-1]
                paths = (price[place + steps] - price[place], forecast.paths.returns)
                y, x = (np.diff(z / size, axis=-1, prepend=0.0) for z in paths)
                found.append(float(f"{energy(y[None], x[None])[0]:.7g}"))

        collect([quantiles], fold.tested, since=fold.since, until=fold.until, stride=fold.stride, watch=watch)
        return found

    def _trained(self, fold: Fold, how: Training, seed: int) -> Trained:
        path = self._path(fold, how, seed)
        if path.exists():
            kept: Trained = pickle.loads(path.read_bytes())
            return kept
        start = None if how.start is None else self._trained(fold, how.start, seed)
        state = path.with_suffix(".training")
        with patch.object(training, "LOOK_PATHS", self.looked):
            trained = how.run(
                start,
                fold.histories,
                timeframe=fold.timeframe,
                horizons=default_horizons(fold.timeframe),
                levels=LEVELS,
                until=fold.since,
                seed=seed,
                steps=self.steps,
                seconds=60 * self.minutes,
                clock=time.process_time,
                state=state,
            )
        _write(path, pickle.dumps(trained))
        state.unlink(missing_ok=True)
        return trained

    def _path(self, fold: Fold, how: Training, seed: int) -> Path:
        limits = self.minutes, self.steps, self.looked
        return self._file("model", fold.digest, fold.since, how, seed, limits)

    def _file(self, suffix: str, *what: object) -> Path:
        name = hashlib.sha256(json.dumps([self.code, *map(str, what)]).encode()).hexdigest()[:16]
        return self.folder / f"{name}.{suffix}"

    def _of_window(self, fold: Fold, how: Training | None) -> Any:
        """`Scaling.of_window`, which keeps what it finds: bars and changes alike, frames are alike."""
        of_window, changes = Scaling.of_window, () if how is None else how.changes

        def kept(scaling: Scaling, window: Window) -> Frame:
            key = fold.name, changes, window.symbol, window.close_time
            if key not in self.frames:
                frame = of_window(scaling, window)
                self.frames[key] = replace(frame, channels=frame.channels[-scaling.layout.context :].copy())
            return self.frames[key]

        return kept


def folds() -> Iterator[Fold]:
    """Of the sample bars, and of the files that STUDY_DATA names."""
    yield from _folds(sample_bars(), "close", "XNYS", None)
    for given in os.environ.get("STUDY_DATA", "").split():
        name, _, days = given.partition("@")
        columns = {c.lower() for c in pl.read_parquet_schema(name)}
        yield from _folds(Path(name), "close" if "close_time" in columns else "open", "24x7", days)


def _folds(path: Path, stamp: Stamp, calendar: str, days: str | None) -> Iterator[Fold]:
    found, _ = find_timeframe([path], stamp)
    timeframe = Timeframe.parse("session") if calendar == "XNYS" else found
    histories = list(read_windows(scan([path], stamp, Calendars(calendar, timeframe))).values())
    if days:
        edges = [int(np.datetime64(day, "ns").astype(np.int64)) for day in days.split("..")]
    else:
        first = min(int(w.close_times[0]) for w in histories)
        last = max(w.close_time for w in histories)
        day = 86_400 * 10**9
        edges = [last - int(TESTED * (last - first) * (FOLDS - k) / FOLDS) for k in range(FOLDS + 1)]
        edges = [edge // day * day for edge in edges]
    for since, until in pairwise(edges):
        yield Fold(path.stem, digest([path]), timeframe.text, histories, since, until)


def main() -> None:
    """Say what it will cost, compute the cells that are not there, print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.study", description=__doc__)
    names = ", ".join(v.name for v in VARIANTS)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {names}; all without")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="cap on a training, CPU [%(default)s]")
    parser.add_argument("--steps", type=int, help="of a training in each phase; by default the product's")
    parser.add_argument(
        "--looked", type=int, default=training.LOOK_PATHS, help="paths judged each time [%(default)s]"
    )
    parser.add_argument("--data", help="the data sets whose names begin so, only")
    given = parser.parse_args()
    if unknown := set(given.variants) - {v.name for v in VARIANTS}:
        parser.error(f"no variant {', '.join(sorted(unknown))}; there are {names}")
    out = Console(highlight=False, soft_wrap=True)
    use_one_thread()
    every = [fold for fold in folds() if fold.data.startswith(given.data or "")]
    wanted = {*(given.variants or [v.name for v in VARIANTS]), HS, STATIC, FULL, GAUSSIAN}
    chosen = [v for v in VARIANTS if v.name in wanted]
    cells = Cells(FOLDER, given.minutes, given.steps, given.looked)
    plan = [
        (fold, variant, seed)
        for seed in range(given.seeds)
        for fold in every
        for variant in chosen
        if variant.suits(fold.timeframe) and (seed == 0 or variant.seeded)
    ]
    missing = [cell for cell in plan if not cells.path(*cell).exists()]
    trainings = {cells._path(f, v.training, s) for f, v, s in missing if v.training and v.seeded}
    minutes = given.minutes * sum(not path.exists() for path in trainings)
    out.print(
        f"{len(plan)} cells, {len(plan) - len(missing)} of them finished; {len(trainings)} models, at most "
        f"{given.minutes:g} minutes each: {minutes:g} CPU minutes at most, on one core, and the scoring"
    )
    began = time.process_time()
    for done, (fold, variant, seed) in enumerate(missing, 1):
        if done == 1 or missing[done - 2][0] is not fold:
            cells.frames.clear()
        cell = cells.compute(fold, variant, seed)
        left = (time.process_time() - began) / done * (len(missing) - done) / 60
        out.print(
            f"{done}/{len(missing)} {fold.name}, seed {seed}, {variant.name}: {cell['seconds']:.0f} s"
            f"{', CAPPED' if cell['capped'] else ''}; about {left:.0f} CPU minutes left"
        )
    result = summary([json.loads(cells.path(*cell).read_bytes()) for cell in plan])
    table = markdown(result)
    (FOLDER / "study.json").write_text(json.dumps(result, indent=1))
    (FOLDER / "study.md").write_text(table + "\n")
    out.print(table, markup=False)
    out.print(f"written to {FOLDER}/study.md and {FOLDER}/study.json")


def summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that the table says: gains are in % of the other's CRPS, on the same origins, ± Newey-West.

    The losses of a variant are means over its seeds; of all horizons together each counts in shares of the
    other's mean. `seeds` is the deviation of the mean gain over `full` from seed to seed. `moves` is the gain
    in the energy score of paths over the same quantiles with a Gaussian copula.
    """
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        found[cell["fold"]][cell["variant"]].append(cell)
    for fold, variants in found.items():
        if len({json.dumps([c["symbols"], c["close_times"]]) for own in variants.values() for c in own}) > 1:
            raise RuntimeError(f"{fold}: origins differ between variants")
    rows = {}
    for name in dict.fromkeys(cell["variant"] for cell in cells):
        own = {fold: variants for fold, variants in found.items() if name in variants}
        data: dict[str, Any] = {}
        for first in (next(iter(v.values()))[0] for v in own.values()):
            same = [v for v in own.values() if v[name][0]["data"] == first["data"]]
            data[first["data"]] = {
                str(h): {over: _pooled([_gain(v, name, over, j) for v in same]) for over in (STATIC, HS)}
                for j, h in enumerate(first["horizons"])
            }
        each = [c for v in own.values() for c in v[name]]
        seeds = [
            mean(_gain(v, name, FULL, None, s).value for v in own.values())
            for s in sorted({c["seed"] for c in each})
        ]
        rows[name] = {
            "what": next(v.what for v in VARIANTS if v.name == name),
            "mean": {
                over: _pooled([_gain(v, name, over, None) for v in own.values()])
                for over in (HS, STATIC, FULL)
            },
            "seeds": stdev(seeds) if len(seeds) > 1 else None,
            "data": data,
            "coverage": dict(
                zip(
                    (f"{100 * x:.0f}" for x in each[0]["intervals"]),
                    np.mean([np.mean(c["coverage"], 0) for c in each], 0).tolist(),
                    strict=True,
                )
            ),
            "cells": len(each),
            "capped": sum(c["capped"] for c in each),
            "diffusion_chosen": sum(bool(c["denoiser_step"]) for c in each),
        }
        if all(c["moves"] for c in each):
            rows[name]["moves"] = _pooled([_moves_gain(v, name) for v in own.values()])
            over = {c["seed"]: [_moves_gain(v, name, c["seed"]).value for v in own.values()] for c in each}
            rows[name]["moves"]["seeds"] = stdev(map(mean, over.values())) if len(over) > 1 else None
    return {
        "folds": {f: len(next(iter(v.values()))[0]["losses"]) for f, v in found.items()},
        "variants": rows,
    }


def _gain(
    variants: Mapping[str, list[Mapping[str, Any]]],
    name: str,
    other: str,
    horizon: int | None,
    seed: int | None = None,
) -> Estimate:
    """The gain of a variant over another in a fold at one horizon, or on average over all."""

    def losses(of: str) -> Any:
        own = variants[of]
        return np.mean([c["losses"] for c in own if seed in (None, c["seed"]) or len(own) == 1], 0)

    mine, theirs, cell = losses(name), losses(other), variants[name][0]
    if horizon is None:
        mine, theirs = ((x / theirs.mean(0)).mean(1) for x in (mine, theirs))
        reach = max(cell["horizons"])
    else:
        mine, theirs, reach = mine[:, horizon], theirs[:, horizon], cell["horizons"][horizon]
    times, at = np.unique(cell["close_times"], return_inverse=True)
    return gain(mine, theirs, at, len(times), lag(reach, cell["stride"], len(times)))


def _moves_gain(
    variants: Mapping[str, list[Mapping[str, Any]]], name: str, seed: int | None = None
) -> Estimate:
    """The gain of a variant's paths over those of the same map with a Gaussian copula, seed by seed."""
    seeds = [c["seed"] for c in variants[name] if seed in (None, c["seed"])]
    mine, theirs = (
        np.mean([c["moves"] for c in variants[of] if c["seed"] in seeds], 0) for of in (name, GAUSSIAN)
    )
    cell = variants[name][0]
    times, at = np.unique(cell["close_times"], return_inverse=True)
    return gain(mine, theirs, at, len(times), lag(max(cell["horizons"]), cell["stride"], len(times)))


def _pooled(gains: Sequence[Estimate]) -> dict[str, float]:
    """The mean of gains in % on bars of other times or other markets, and its error."""
    n = len(gains)
    return {
        "gain": 100 * sum(g.value for g in gains) / n,
        "error": 100 * sqrt(sum(g.error**2 for g in gains)) / n,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The table, as the README may quote it."""
    rows: dict[str, Any] = result["variants"]
    data = {name: list(h) for row in rows.values() for name, h in row["data"].items()}
    header = ["variant", "over `hs`", "over `static`", "over `full`", "seeds", "cover 50 / 80 / 90"]
    header += [f"{name} {', '.join(h)}, over `static`" for name, h in data.items()]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for name, row in rows.items():
        cells = [f"`{name}` {row['what']}", *(_shown(row["mean"][over]) for over in (HS, STATIC, FULL))]
        cells.append("" if row["seeds"] is None else f"{100 * row['seeds']:.2f}")
        cells.append(" / ".join(f"{100 * row['coverage'][p]:.1f}" for p in ("50", "80", "90")))
        for own in data:
            horizons = row["data"].get(own, {}).values()
            cells.append("; ".join(_shown(h[STATIC]) for h in horizons))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| paths | energy of moves, over a Gaussian copula | seeds |", "|---|---:|---:|"]
    for name, row in rows.items():
        if "moves" in row:
            seeds = row["moves"]["seeds"]
            shown = "" if seeds is None else f"{100 * seeds:.3f}"
            lines.append(f"| `{name}` {row['what']} | {_shown(row['moves'], 3)} | {shown} |")
    tested = "; ".join(f"{fold} ({n:,} origins)" for fold, n in result["folds"].items())
    lines += ["", f"Gains in % of CRPS ± Newey-West error, means over folds and horizons. Tested: {tested}."]
    return "\n".join(lines)


def _shown(estimate: Mapping[str, float], digits: int = 2) -> str:
    return f"{estimate['gain']:+.{digits}f} ± {estimate['error']:.{digits}f}"


def _write(path: Path, content: bytes) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_bytes(content)
    fresh.replace(path)


def _day(time: int) -> str:
    return str(np.datetime64(time, "ns").astype("datetime64[D]"))


if __name__ == "__main__":
    main()
