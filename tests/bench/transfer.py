"""`python -m tests.bench.transfer FILE[@CALENDAR] ...`: what a stress generator's scenarios are worth.

One is trained on the bars of each file that are older than the newest `TESTED` share. Calm windows of that
share are then brought into the other regimes, and compared with the real windows of these there: by their
volatility, tails, clustering, and by a classifier that is to tell them apart; and with their sources, by the
way they go and by their self-similarity. Beside it stand the real windows that were learnt from, which say
how far the regimes have moved since, and the two baselines. Files have times of open, Parquet. It writes
transfer.json and prints the tables as the README may quote them; models stay in the folder `transfer/`.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Generator

from barcast import models
from barcast.daemon.calendar import Calendars
from barcast.daemon.history import digest, find_timeframe, read_windows, scan
from barcast.models import Window
from barcast.models.diffusion import use_one_thread
from barcast.models.optimiser import Progress
from barcast.models.transfer import (
    REGIMES,
    StressScenarioGenerator,
    TransferConfig,
    collected,
    load_generator,
    save_generator,
    train,
)
from barcast.models.transfer.baselines import bootstrapped, rescaled
from barcast.models.transfer.dataset import Collected
from barcast.models.transfer.latent import around
from barcast.models.transfer.losses import self_similarity, texture_distance
from barcast.models.transfer.statistics import (
    LAGS,
    rank_correlation,
    realised_volatility,
    square_correlations,
    tail_ratio,
)
from tests.bench.report import host, sentence

JSON, FOLDER = Path("transfer.json"), Path("transfer")
TESTED = 0.3
"""Share of the bars, the newest, that nothing learns from."""
SOURCES = 160  # calm windows that are brought into a regime
MOST_REAL = 400  # real windows that they are compared with
FOLDS = 5  # parts of the tested time, by which the classifier is tried
GUIDANCE = (0.0, 1.0, 2.0, 3.0)
TARGETS = ("volatile", "crisis")

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


def features(r: Array) -> Array:
    """What the classifier sees of returns (n, N)."""
    s, size = realised_volatility(r), np.abs(r)
    q = np.quantile(r, [0.1, 0.25, 0.5, 0.75, 0.9], axis=1)
    way, walk = np.concatenate([np.zeros((len(r), 1)), r.cumsum(1)], 1), s * np.sqrt(r.shape[1])
    level = np.log(around(torch.from_numpy(r)).numpy())
    third = r.shape[1] // 4
    columns = [
        np.log(s),
        tail_ratio(r),
        (q[4] - q[0]) / (q[3] - q[1]),
        (q[4] + q[0] - 2 * q[2]) / (q[4] - q[0]),
        r.max(1) / s,
        r.min(1) / s,
        (r**3).mean(1) / s**3,
        *square_correlations(r)[:, [0, 1, 2, 4, 9]].T,
        *square_correlations(np.sqrt(size))[:, [0, 1, 2, 4, 9]].T,
        (r[:, 1:] * r[:, :-1]).mean(1) / s**2,
        level.std(1),
        level[:, -third:].mean(1) - level[:, :third].mean(1),
        (way[:, -1] - way[:, 0]) / walk,
        (way.max(1) - way[:, -1]) / walk,
        (way[:, -1] - way.min(1)) / walk,
        (way.max(1) - way.min(1)) / walk,
    ]
    return np.stack(columns, 1)


def told_apart(real: Array, since: Ints, made: Array, when: Ints) -> float:
    """The area under the curve of a boosted classifier on parts of the time that it has not learnt from."""
    x, y = np.concatenate([features(real), features(made)]), np.repeat([1, 0], [len(real), len(made)])
    times = np.concatenate([since, when])
    part = np.searchsorted(np.quantile(since, np.linspace(0, 1, FOLDS + 1)[1:-1]), times)
    options = {
        "objective": "binary",
        "num_leaves": 7,
        "learning_rate": 0.05,
        "min_data_in_leaf": 20,
        "verbose": -1,
        "num_threads": 1,
        "seed": 0,
        "deterministic": True,
        "is_unbalance": True,
    }
    areas = []
    for k in range(FOLDS):
        out = part == k
        if len(set(y[out])) == 2 and len(set(y[~out])) == 2:
            booster = lightgbm.train(options, lightgbm.Dataset(x[~out], y[~out]), 60)
            said = np.asarray(booster.predict(x[out]))
            ranks = said.argsort(kind="stable").argsort(kind="stable")
            ones = y[out].sum()
            area = (ranks[y[out] == 1].sum() - ones * (ones - 1) / 2) / (ones * (out.sum() - ones))
            areas.append((float(area), int(out.sum())))
    found, counts = zip(*areas, strict=True)
    return float(np.average(found, weights=counts))


def judged(real: Array, since: Ints, made: Array, when: Ints) -> dict[str, float]:
    """How far made windows are from real ones."""
    s, own = realised_volatility(real), realised_volatility(made)
    low, high = np.quantile(s, [0.05, 0.95])
    squares = [square_correlations(r).mean(0) for r in (real, made)]
    return {
        "volatility": float(np.median(own) / np.median(s) - 1),
        "in_band": float(((own >= low) & (own <= high)).mean()),
        "tails": float(np.median(tail_ratio(made)) / np.median(tail_ratio(real)) - 1),
        "clustering": float(np.sqrt(((squares[0] - squares[1]) ** 2).mean())),
        "told_apart": told_apart(real, since, made, when),
    }


def content(generator: StressScenarioGenerator, source: Array, made: Array) -> dict[str, float]:
    """How much of their sources is left in made windows."""
    scale, g = generator.trained.scale, Generator().manual_seed(0)
    a, b = (scale.encode(torch.from_numpy(r)) for r in (made, source))
    return {
        "rank": float(np.median(rank_correlation(made, source))),
        "similarity": float(self_similarity(a, b, g)),
        "chance": float(self_similarity(b[torch.randperm(len(b), generator=g)], b, g)),
    }


def distance(generator: StressScenarioGenerator, made: Array, real: Array) -> float:
    """The distance of textures, of as many windows on both sides."""
    g, scale = Generator().manual_seed(0), generator.trained.scale
    n = min(len(made), len(real))
    a, b = (scale.encode(torch.from_numpy(_thin(r, n))) for r in (made, real))
    return float(texture_distance(a, b, torch.zeros(n, dtype=torch.int64), g))


def _thin(x: Any, n: int) -> Any:
    return x[np.linspace(0, len(x) - 1, min(n, len(x))).round().astype(int)]


def measure(name: str, config: TransferConfig, tell: Callable[[str], None]) -> dict[str, Any]:
    """All rows of a file."""
    path, _, calendar = name.partition("@")
    timeframe, _ = find_timeframe([Path(path)], "open")
    histories = list(
        read_windows(scan([Path(path)], "open", Calendars(calendar or "24x7", timeframe))).values()
    )
    times = np.sort(np.concatenate([w.close_times for w in histories]))
    since = int(times[int((1 - TESTED) * len(times))])
    generator = _generator(Path(path), histories, timeframe.text, since, config, tell)
    rule = generator.trained.rule
    windows = collected(histories)
    begun = windows.begun(histories)
    learnt, tested = windows.only(windows.close <= since), windows.only(begun >= since)
    parts = {
        (part, k): own.only(rule.labels(own.measures) == k)
        for part, own in (("learnt", learnt), ("tested", tested))
        for k in range(len(REGIMES))
    }
    calm = _thinned(parts["tested", 0], SOURCES)
    source = calm.returns.astype(np.float64)
    found: dict[str, Any] = {"since": since, "model": generator.model, "regimes": {}}
    for target in TARGETS:
        tell(f"{Path(path).stem}: {target}")
        k = REGIMES.index(target)
        real, old = (_thinned(parts[part, k], MOST_REAL) for part in ("tested", "learnt"))
        r, o = real.returns.astype(np.float64), old.returns.astype(np.float64)
        rng = np.random.default_rng(0)
        spread = rng.permutation(np.resize(real.close, len(o)))  # an old window's place in the tested time
        rows = {"real, older": judged(r, real.close, o, spread)}
        sets = {"rescaled": rescaled(source, o, rng), "bootstrap": bootstrapped(source, o, rng)}
        own, to = torch.zeros(len(source), dtype=torch.int64), torch.full((len(source),), k)
        for scale in GUIDANCE:
            made = generator.transfer(torch.from_numpy(source), own, to, 1, scale).numpy()
            sets["generator" if scale == config.cfg_scale else f"generator, cfg_scale {scale:g}"] = made
        for what, made in sets.items():
            rows[what] = judged(r, real.close, made, calm.close) | content(generator, source, made)
            rows[what] |= {
                "distance": distance(generator, made, r) / distance(generator, source, r),
                "distance_learnt": distance(generator, made, o) / distance(generator, source, o),
            }
        for what, row in rows.items():
            tell(f"  {what}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
        found["regimes"][target] = {"real": len(real), "made": len(source), "rows": rows}
    return found


def _thinned(windows: Collected, n: int) -> Collected:
    keep = np.zeros(len(windows), bool)
    keep[_thin(np.arange(len(windows)), n)] = True
    return windows.only(keep)


def _generator(
    path: Path,
    histories: Sequence[Window],
    timeframe: str,
    since: int,
    config: TransferConfig,
    tell: Callable[[str], None],
) -> StressScenarioGenerator:
    sources = sorted(Path(models.__file__).parent.rglob("*.py"))
    told = f"{digest([path])} {since} {asdict(config)}".encode()
    code = hashlib.sha256(b"".join(p.read_bytes() for p in sources) + told).hexdigest()[:12]
    folder = FOLDER / f"{path.stem}-{code}"
    if not folder.exists():
        FOLDER.mkdir(exist_ok=True)
        state, began = folder.with_suffix(".training"), time.process_time()

        def show(p: Progress) -> None:
            if p.crps is not None:
                loss = float("nan") if p.loss is None else p.loss
                tell(f"{path.stem}: {p.phase} {p.step}/{p.steps} loss {loss:.4f} look {p.crps:.4f}")

        made = train(histories, timeframe=timeframe, config=config, until=since, state=state, progress=show)
        save_generator(made, folder)
        state.unlink(missing_ok=True)
        tell(f"{path.stem}: {time.process_time() - began:.0f} s of CPU")
    return load_generator(folder)


COLUMNS = {
    "volatility": "{:+.1%}",
    "in_band": "{:.0%}",
    "tails": "{:+.1%}",
    "clustering": "{:.3f}",
    "told_apart": "{:.2f}",
    "rank": "{:.2f}",
    "similarity": "{:.3f}",
    "distance": "{:.2f}",
}


def markdown(found: dict[str, Any]) -> str:
    """The tables."""
    lines = []
    for name, data in found["data"].items():
        day = np.datetime64(data["since"], "ns").astype("datetime64[D]")
        for target, part in data["regimes"].items():
            title = f"{name} since {day}, calm to {target}: {part['made']} made, {part['real']} real windows"
            lines += ["", f"| {title} | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
            for what, row in part["rows"].items():
                cells = [form.format(row[key]) if key in row else "" for key, form in COLUMNS.items()]
                lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.transfer", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE[@CALENDAR]")
    parser.add_argument("--config", type=Path, help="TOML file of the training")
    given = parser.parse_args()
    config = TransferConfig() if given.config is None else TransferConfig.load(given.config)
    out, began = Console(highlight=False, soft_wrap=True), time.monotonic()
    use_one_thread()

    def tell(text: str) -> None:
        out.print(f"{time.monotonic() - began:.0f} s {text}", markup=False)

    found: dict[str, Any] = {"machine": host(), "config": asdict(config), "lags": LAGS, "data": {}}
    for name in given.files:
        found["data"][Path(name.partition("@")[0]).stem] = measure(name, config, tell)
        JSON.write_text(json.dumps(found, indent=1))
    out.print(sentence(found["machine"]), markup=False)
    out.print(markdown(found), markup=False)


if __name__ == "__main__":
    main()
