"""Backtests over stress scenarios: what books and forecasts come to where the market has another texture.

Each scenario goes through the very path of a backtest, from the close on where it is made up, beside the bars
as they were. A scenario is not a forecast: what is counted here are outcomes of what was made up, and says
nothing about how likely they are.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.backtest import caveats
from barcast.backtest.arguments import Moment, check_adjustments, listed, nanoseconds, paths_of
from barcast.backtest.cache import Remembered
from barcast.backtest.ledger import Execution
from barcast.backtest.replay import found_timeframe, run_backtest
from barcast.backtest.result import json_rows
from barcast.backtest.scoring import POOLED
from barcast.backtest.tables import scratch_in
from barcast.backtest.workers import check_jobs, is_partial, open_workers, run_jobs, write_whole, writing_in
from barcast.daemon import wire
from barcast.daemon.adjustments import adjusted
from barcast.daemon.calendar import Calendars
from barcast.daemon.history import History, Stamp, digest
from barcast.daemon.pipeline import StrategySettings
from barcast.daemon.timeframe import Timeframe
from barcast.models import Adjustment, ConfigError, DataError, Window

if TYPE_CHECKING:
    from barcast.models.transfer import Scenario, StressScenarioGenerator
    from barcast.models.transfer.trained import TransferRecord

HISTORY = "history"
"""What the bars as they were are called among the regimes."""
REGIMES = ("volatile", "crisis")
NOTE = "scenario, not forecast"
INDEX = "stress.json"
TOLD = (
    *("warning", "model", "kind", "sampler", "steps", "samples", "fingerprint", "timeframe", "calendar"),
    *("strategies", "execution", "periods_per_year"),
)
"""What the result says of all its backtests."""
FRAMES = ("books", "scores", "equity", "prices")
REPORT = "report.html"
OWN = {INDEX, REPORT, *(f"{name}.parquet" for name in FRAMES)}
"""What lies in the folder of a result."""
TOGETHER = 5  # scenarios of a job: what they share is found once
MOST_DRAWN = 20  # scenarios of a regime whose prices are kept
SYMBOLS_DRAWN = 6  # symbols whose prices are kept
CLOSES = 2_000
"""At which equity and prices are kept, at most, evenly: what is kept does not grow with the bars."""
WORST, TAIL = 0.05, 20
"""Share of the scenarios that value at risk and expected shortfall are of: one in so many."""

DEFINITIONS = {
    "scenarios": "backtests; of history there is one",
    "median_return": "median over the scenarios of last equity / first equity - 1, after costs and carry",
    "worst_return": "5 % quantile over the scenarios of that return, linear in between: value at risk",
    "shortfall": "mean of the lowest 1 + floor((scenarios - 1) / 20) of these returns: expected shortfall",
    "losing": "share of the scenarios whose return is below 0",
    "median_drawdown": "median over the scenarios of the maximum drawdown: lowest / highest before - 1",
    "worst_drawdown": "5 % quantile over the scenarios of the maximum drawdown",
    "var_95": "median over the scenarios of the 5 % quantile of the returns of a period",
    "cvar_95": "median over the scenarios of the mean of the lowest 5 % of the returns of a period",
    "volatility": "median over the scenarios of the standard deviation of the returns, a year",
}
"""Of the columns of `StressResult.summary`."""


@dataclass(frozen=True)
class StressResult:
    """What backtests over scenarios came to. `number` counts the scenarios of a regime from 0.

    `books` has `regime`, `number`, `strategy` and the columns of `BacktestResult.portfolio`; `scores` has
    `regime`, `number` and the columns of `BacktestResult.scores` of all symbols together; `equity` has
    `regime`, `number`, `strategy`, `close_time` and `growth`, the equity over the first; `prices` has
    `regime`, `number`, `symbol`, `close_time` and `close`, of the first scenarios and symbols. Both have
    `CLOSES` closes at most, the same ones in all scenarios. The bars as they were stand there as the regime
    `history`. `meta` says what was asked for, and holds `warning`, which also says what is true of some
    scenarios, and of how many.
    """

    books: pl.DataFrame
    scores: pl.DataFrame
    equity: pl.DataFrame
    prices: pl.DataFrame
    meta: dict[str, Any]

    @property
    def summary(self) -> pl.DataFrame:
        """A row for each regime and strategy; what its columns are is in `DEFINITIONS`."""
        total, fall = pl.col("total_return"), pl.col("max_drawdown")
        worst = 1 + (pl.len() - 1) // TAIL
        return self.books.group_by("regime", "strategy", maintain_order=True).agg(
            scenarios=pl.len(),
            median_return=total.median(),
            worst_return=total.quantile(WORST, "linear"),
            shortfall=total.sort().head(worst).mean(),
            losing=(total < 0).mean(),
            median_drawdown=fall.median(),
            worst_drawdown=fall.quantile(WORST, "linear"),
            **{name: pl.col(name).median() for name in ("var_95", "cvar_95", "volatility")},
        )

    def save(self, folder: Path | str) -> None:
        """Write each frame to NAME.parquet of the folder, meta and summary to `stress.json`.

        A result that was in the folder is replaced. Raise ConfigError for a folder with anything else, and
        where it cannot be written.
        """
        folder = Path(folder)
        check_folder(folder)
        with writing_in(folder):
            (folder / INDEX).unlink(missing_ok=True)  # until all is there, the folder holds no whole result
        for name in FRAMES:
            rows = BytesIO()
            getattr(self, name).write_parquet(rows)
            write_whole(folder / f"{name}.parquet", rows.getvalue())
        told = {"note": NOTE, "meta": self.meta, "summary": json_rows(self.summary)}
        text = json.dumps(told | {"definitions": DEFINITIONS}, indent=1, allow_nan=False, ensure_ascii=False)
        write_whole(folder / INDEX, (text + "\n").encode())

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read what `save` wrote. Raise DataError for a folder that holds none."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / INDEX).read_text(encoding="utf-8"))["meta"]
            return cls(meta=meta, **{n: pl.read_parquet(folder / f"{n}.parquet", glob=False) for n in FRAMES})
        except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
            raise DataError(
                f"{folder}: holds no whole result of scenarios ({error}); name a folder that `stress` wrote"
            ) from error


def run_stress(
    files: Sequence[Path | str] | Path | str,
    *,
    stamp: Stamp,
    generator: Path | str,
    regimes: Sequence[str] | str = REGIMES,
    n: int = 100,
    seed: int = 0,
    cfg_scale: float | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    timeframe: str | None = None,
    calendar: str = "24x7",
    calendars: Mapping[str, str] = MappingProxyType({}),
    adjustments: Sequence[Adjustment] = (),
    symbols: Sequence[str] | None = None,
    model: Path | str = "fhs",
    strategies: Sequence[str | StrategySettings] | str = ("quantile-band", "median-drift"),
    sampler: str | None = None,
    steps: int | None = None,
    execution: Execution | None = None,
    jobs: int = -1,
    progress: Callable[[int, str], None] = lambda _count, _at: None,
) -> StressResult:
    """Run a backtest over `n` scenarios of each regime, and over the bars as they were.

    `generator` is the directory of one that `train-stress` has written. Bars from `since` on are made up, by
    default from the first close on at which all symbols have a past that is long enough; a symbol whose past
    is not is left out, and named in `meta["warning"]`. `cfg_scale` is the severity, by default that of the
    generator. The other arguments are those of `run_backtest`; adjustments are applied to the bars before
    scenarios are made of them. `jobs` scenarios are at work at a time, -1: one a core. The same arguments,
    files and seed give the same tables to the bit, whatever `jobs`. `progress` is told of scenarios.

    Raise ConfigError, DataError and CheckpointError as `run_backtest` and the generator do.
    """
    from barcast.models.transfer import load_generator
    from barcast.models.transfer.generator import check_count, check_seed
    from barcast.models.transfer.regimes import regime_id

    paths, generator = paths_of(files), Path(generator)
    n, seed = check_count(n), check_seed(seed)
    check_jobs(jobs)
    regimes = listed(regimes, "regimes", (str,), f"names such as {REGIMES}")
    if len(set(map(regime_id, regimes))) < len(regimes):
        raise ConfigError(f"regimes = {', '.join(regimes)}: name each once")
    timeframe = timeframe or found_timeframe(paths, stamp, calendar, symbols)[0]
    closes = Calendars(calendar, Timeframe.parse(timeframe), calendars)
    loaded = load_generator(generator)
    begun = nanoseconds(since, "since")
    with scratch_in(None) as folder:
        with writing_in(None):
            (folder / "bars").mkdir()
            history = History(paths, stamp, closes, symbols, nanoseconds(until, "until"), folder / "bars")
        known = adjusted(history, check_adjustments(adjustments))
        kept, start, left_out = _able(known, begun)
        for regime in regimes:  # what cannot be is said here, not by a worker
            next(loaded.scenarios(kept, regime, (0,), seed, since=start, cfg_scale=cfg_scale))
        asked = _Asked(
            generator,
            kept,
            start,
            _closes(kept, start),
            seed,
            cfg_scale,
            {
                "files": paths,
                "stamp": stamp,
                "model": str(model),
                "timeframe": timeframe,
                "calendar": calendar,
                "calendars": dict(calendars),
                "strategies": strategies,
                "sampler": sampler,
                "steps": steps,
                "execution": execution,
                "baselines": False,
            },
        )
        parts = [_Part(asked, folder, HISTORY, (0,))]
        for regime in regimes:
            parts += [
                _Part(asked, folder, regime, tuple(range(k, min(k + TOGETHER, n))))
                for k in range(0, n, TOGETHER)
            ]
        over = 0

        def done(count: int) -> None:
            nonlocal over
            for part in parts[over:count]:
                progress(len(part.numbers), part.regime)
            over = max(over, count)

        with open_workers("loky", jobs, None):
            try:
                run_jobs(_fill, parts, done)
            finally:
                _opened.cache_clear()  # of one that worked here itself
        frames = {
            name: pl.concat([pl.read_parquet(part.file(name), glob=False) for part in parts])
            for name in FRAMES
        }
        told = json.loads(parts[0].file("meta").read_text())
        warnings = [
            *filter(None, [left_out, *_learnt(loaded.trained.record, timeframe, start), told.pop("warning")]),
            *_of_scenarios(parts, n * len(regimes)),
        ]
    return StressResult(
        **frames,
        meta={
            "warning": "\n".join(warnings),
            "note": NOTE,
            "generator": loaded.model,
            "regimes": regimes,
            "scenarios": n,
            "seed": seed,
            "cfg_scale": loaded.trained.config.cfg_scale if cfg_scale is None else cfg_scale,
            "since": wire.to_text(start),
            "until": wire.to_text(max(w.close_time for w in kept)),
            "symbols": [w.symbol for w in kept],
            "files": [path.name for path in paths],
            "files_sha256": digest(paths),
            **told,
        },
    )


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder in which anything lies that is no part of a result of scenarios."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder")
    found = folder.iterdir() if folder.is_dir() else ()
    if foreign := {each.name for each in found if not is_partial(each)} - OWN:
        raise ConfigError(
            f"{folder} holds {min(foreign)}, which is no result of scenarios: name a new folder"
        )


def _able(history: Mapping[str, Window], since: int | None) -> tuple[list[Window], int, str]:
    """The histories of which scenarios can be made, the first close of these, and who is left out."""
    from barcast.models.transfer.generator import spans

    able = {symbol: spans(w) for symbol, w in history.items()}
    if since is None:
        since = max((span[0] for span in able.values() if span), default=0)
    out = [symbol for symbol, span in able.items() if not span or not span[0] <= since <= span[1]]
    if len(out) == len(able):
        ends = [span[1] for span in able.values() if span]
        few, then = ("after", "earlier") if ends and since > max(ends) else ("before", "later")
        raise DataError(
            f"no symbol has bars enough to make scenarios of them from {wire.to_text(since)} on: too few "
            f"come {few} it; begin {then}, or give longer histories"
        )
    warning = f"Left out, since too little comes before or after: {', '.join(out)}." if out else ""
    return [history[symbol] for symbol in able if symbol not in out], since, warning


def _learnt(record: "TransferRecord", timeframe: str, start: int) -> list[str]:
    """What of a generator's training does not go with the bars that scenarios are made of."""
    found = []
    if record.timeframe != timeframe:
        found.append(
            f"The generator has learnt from bars of {record.timeframe}, and these are of {timeframe}."
        )
    if record.validation_end > start:
        found.append(
            f"The generator has learnt from bars up to {wire.to_text(record.validation_end)[:10]}, and "
            f"scenarios begin at {wire.to_text(start)[:10]}: what they are like was learnt in part from what "
            "came then. Train it with --until, or begin later."
        )
    return found


def _closes(windows: Sequence[Window], since: int) -> NDArray[np.int64]:
    """Some of the closes from one on, `CLOSES` of them at most."""
    times = [w.close_times[np.searchsorted(w.close_times, since) :] for w in windows]
    every = np.unique(np.concatenate(times))
    return every[_evenly(len(every))]


def _evenly(count: int) -> NDArray[np.int64]:
    """Some of so many places, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, CLOSES)).round().astype(np.int64)


def _of_scenarios(parts: "Sequence[_Part]", count: int) -> list[str]:
    """What was to be said of some of so many scenarios, and not of history: the most frequent first."""
    said, *others = (json.loads(part.file("said").read_text()) for part in parts)
    total: Counter[str] = Counter()
    for each in others:
        total.update(each)
    often = sorted((-times, text) for text, times in total.items() if text not in said)
    found = [f"In {-times} of {count} scenarios: {text}" for times, text in often]
    return [caveats.few(found, "\n")] if found else []


@dataclass(frozen=True)
class _Asked:
    """What all scenarios share."""

    generator: Path
    windows: Sequence[Window]
    since: int
    closes: NDArray[np.int64]  # at which equity is kept
    seed: int
    cfg_scale: float | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _Part:
    """Some scenarios of a regime, which one worker goes through."""

    asked: _Asked
    folder: Path
    regime: str
    numbers: tuple[int, ...]

    def file(self, name: str) -> Path:
        """Where a table of it is."""
        return self.folder / f"{self.regime}-{self.numbers[0]}.{name}"


@lru_cache(1)
def _opened(_run: Path, generator: Path, since: int) -> "tuple[StressScenarioGenerator, Remembered]":
    """What a worker has for all parts of a run."""
    from barcast.models.transfer import load_generator

    return load_generator(generator), Remembered(since)


def _fill(part: _Part) -> None:
    """Backtest the scenarios of a part and write what came of them."""
    asked = part.asked
    generator, remembered = _opened(part.folder, asked.generator, asked.since)
    made: Iterable[Sequence[Scenario]] = [_as_it_was(asked)]
    if part.regime != HISTORY:
        made = generator.scenarios(
            asked.windows, part.regime, part.numbers, asked.seed, since=asked.since, cfg_scale=asked.cfg_scale
        )
    found: dict[str, list[pl.DataFrame]] = {name: [] for name in FRAMES}
    said: Counter[str] = Counter()
    some = pl.from_epoch(pl.Series("close_time", asked.closes), "ns").dt.replace_time_zone("UTC").to_frame()
    for number, scenario in zip(part.numbers, made, strict=True):
        result = run_backtest(**asked.settings, scenario=scenario, cache=remembered)
        key = pl.lit(part.regime).alias("regime"), pl.lit(number, pl.Int64).alias("number")
        growth = (pl.col("equity") / pl.col("equity").first()).over("strategy").alias("growth")
        pooled = result.scores.filter(symbol=POOLED).drop("symbol")
        equity = result.equity.select("strategy", "close_time", growth).join(
            some, on="close_time", how="semi", maintain_order="left"
        )
        said.update(filter(None, result.meta["warning"].split("\n")))
        rows = {"books": result.portfolio, "scores": pooled, "equity": equity}
        if number < MOST_DRAWN:
            rows["prices"] = _prices(scenario[:SYMBOLS_DRAWN])
        for name, frame in rows.items():
            found[name].append(frame.select(*key, pl.all()))
    for name, frames in found.items():
        empty = _prices([]).select(pl.lit("").alias("regime"), pl.lit(0, pl.Int64).alias("number"), pl.all())
        (pl.concat(frames) if frames else empty.clear()).write_parquet(part.file(name))
    part.file("said").write_text(json.dumps(said))
    if part.regime == HISTORY:
        told = {name: result.meta[name] for name in TOLD}
        part.file("meta").write_text(json.dumps(told))


def _as_it_was(asked: _Asked) -> "list[Scenario]":
    """The bars that scenarios are made of, from the same close on."""
    from barcast.models.transfer import Scenario

    return [
        Scenario(w.symbol, w.close_times, w.values, asked.since, HISTORY, "none", asked.seed, 0, 0.0)
        for w in asked.windows
    ]


def _prices(scenario: Sequence["Scenario"]) -> pl.DataFrame:
    """Closes from the one before a scenario on, `CLOSES` of each symbol at most."""
    close_time = pl.from_epoch("close_time", "ns").dt.replace_time_zone("UTC")
    parts = [pl.DataFrame(schema={"symbol": pl.String(), "close_time": pl.Int64(), "close": pl.Float64()})]
    for one in scenario:
        k = max(0, int(np.searchsorted(one.times, one.since)) - 1)
        at = k + _evenly(len(one.times) - k)
        parts.append(
            pl.DataFrame({"symbol": one.symbol, "close_time": one.times[at], "close": one.rows[at, 3]})
        )
    return pl.concat(parts).with_columns(close_time)
