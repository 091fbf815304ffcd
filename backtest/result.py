"""What a backtest hands over to the report and to notebooks, and how it is kept in a folder."""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.backtest.tables import PREFIX, Rows, Store, collected, write_rows
from barcast.models import ConfigError, DataError
from barcast.models.joint import Outlook

INDEX = "result.json"
"""The file of a folder that says it is a saved result: it is written last."""

PARTIAL = "result.partial"
"""What says of a folder that a save was killed in it: it is written first, and is the last to go."""

FORMAT = 1
"""Rises when a saved result can no longer be read as before."""

LARGE = 64 * 2**20
"""Bytes of a file that is read at once, at most."""


class _Frame:
    """A frame of a result: where its rows lie in files, they are read at each access."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, result: object, owner: type | None = None) -> pl.DataFrame:
        if result is None:
            raise AttributeError(self._name)  # a field without a default
        return collected(vars(result)[self._name])

    def __set__(self, result: object, rows: Rows) -> None:
        vars(result)[self._name] = rows


@dataclass(frozen=True, eq=False, kw_only=True)
class BacktestResult:
    """Everything a replay over history recorded. Times are datetime[ns, UTC], returns are log returns.

    The frames of a long replay lie in files, as long as the result is there: each access reads a whole one.
    `rows` has those that memory does not hold as LazyFrames.

    - `signals`: symbol, close_time, horizon (bars), a column for each level (`q05` ...), reference, mean,
      std, rise, model, and as of live signals the flag warming and in degraded the reasons (joined by "; "),
      empty where nothing is wrong. One row a horizon. With `touch` also touch_up_2_1 and touch_down_2_1 for
      the pair 2, 1 and so on, and drawdown, all of the longest horizon: see `outlook_columns`.
    - `outcomes`: symbol, close_time, horizon, end_time, price and outcome (the log return of the symbol's own
      `horizon`-th next bar), of the forecasts whose horizon has passed.
    - `bars`: symbol, close_time, open, high, low, close, basis, of the accepted bars of the tested time.
      `basis` is what costs now what cost 1 before all declared adjustments: 0.5 after a split in two.
    - `targets`: strategy, symbol, close_time, target (-1 to 1).
    - `fills`: strategy, symbol, decided, close_time, price, units, commission, spread and slippage (cash),
      position (units after it), basis.
    - `equity`: strategy, close_time, cash, equity, gross and net exposure (shares of equity), carry (borrow
      and funding paid since the row before, cash). The strategy `buy-and-hold` is what the others are beside.
    - `trainings`: a row for each training that was over: asked, reasons (joined by "; "), judged, accepted,
      challenger, champion, challenger_crps, champion_crps, gain and gain_error (shares of CRPS), origins,
      reason. An accepted challenger serves from `judged` on. Empty without retraining.
    - `scores`: a row for each symbol and horizon, see `scoring.scores`.
    - `skill`: symbol, horizon, regime, other (the baseline), n, times, crps, other_crps, skill and error
      (percent). The symbol and the regime `all` pool the others.
    - `portfolio`: a row for each strategy.
    - `meta`: what identifies the run, in JSON's values: config, hashes, calendar, timeframe, costs.
    """

    signals: _Frame = _Frame()
    outcomes: _Frame = _Frame()
    bars: _Frame = _Frame()
    targets: _Frame = _Frame()
    fills: _Frame = _Frame()
    equity: _Frame = _Frame()
    trainings: _Frame = _Frame()
    scores: _Frame = _Frame()
    skill: _Frame = _Frame()
    portfolio: _Frame = _Frame()
    meta: dict[str, Any]
    store: Store | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy by pickle gets: all rows, as the files go with this one."""
        return {**vars(self), **{name: getattr(self, name) for name in FRAMES}, "store": None}

    def __repr__(self) -> str:
        """In a line: model, timeframe, and how many rows each frame has."""
        counts = (f"{name} {collected(self.rows(name).lazy().select(pl.len())).item():,}" for name in FRAMES)
        told = f"{self.meta.get('model')} on {self.meta.get('timeframe')} bars"
        return f"BacktestResult({told}: {', '.join(counts)} rows)"

    def rows(self, name: str) -> Rows:
        """A frame by its name: a DataFrame, or where it lies in files a LazyFrame, in order of its closes.

        That of fills and equity has one strategy after another. Raise ConfigError for another name.
        """
        if name not in FRAMES:
            raise ConfigError(f"a result has no frame {name!r}: take one of {', '.join(FRAMES)}")
        rows: Rows = vars(self)[name]
        return rows

    def save(self, folder: Path | str) -> None:
        """Write each frame to NAME.parquet of the folder, and what is small to `result.json` for other tools.

        That holds meta, the tables and the definitions of their columns; a number that is none is null there.
        A result that was in the folder is replaced once all of this one is written, for which there must be
        room beside it. Raise ConfigError for a folder that is not empty and holds no result, OSError when it
        cannot be written, ValueError for a `meta` that JSON has no value for: what was there is there still.
        """
        folder = Path(folder)
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        told = {
            "barcast_result": FORMAT,
            "meta": self.meta,
            **{
                name: json_rows(getattr(self, name)) for name in ("portfolio", "scores", "skill", "trainings")
            },
            "definitions": definitions(),
        }
        text = json.dumps(told, indent=1, allow_nan=False, ensure_ascii=False)
        index, frames = folder / PARTIAL, {name: folder / f"{name}.partial" for name in FRAMES}
        with ExitStack() as partials:
            for path in (index, *frames.values()):
                partials.callback(path.unlink, missing_ok=True)
            index.write_text(text + "\n", encoding="utf-8")
            for name, path in frames.items():
                write_rows(self.rows(name), path)
            partials.pop_all()
        (folder / INDEX).unlink(missing_ok=True)  # until all is there, the folder holds no result
        for name, path in frames.items():
            path.replace(folder / f"{name}.parquet")
        index.replace(folder / INDEX)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read what `save` wrote, the same to the bit. Raise DataError for a folder that holds no result.

        Of files of more than `LARGE` bytes the rows stay there, and are read as long as nobody changes them.
        """
        folder = Path(folder)
        remedy = "name a folder that BacktestResult.save has written"
        try:
            told = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{folder}: holds no {INDEX}; {remedy}") from error
        except ValueError as error:
            raise DataError(f"{folder / INDEX}: is damaged ({error}); save the result again") from error
        version = told.get("barcast_result") if isinstance(told, dict) else None
        if version != FORMAT:
            raise DataError(
                f"{folder / INDEX}: barcast_result = {version!r}, and {FORMAT} can be read; {remedy} "
                "with this version of the program"
            )
        frames: dict[str, Rows] = {}
        for name in FRAMES:
            path = folder / f"{name}.parquet"
            try:
                if path.stat().st_size > LARGE:
                    frames[name] = pl.scan_parquet(path, glob=False)
                    frames[name].collect_schema()
                else:
                    frames[name] = pl.read_parquet(path, glob=False)
            except FileNotFoundError as error:
                raise DataError(f"{path}: is missing; save the result again") from error
            except pl.exceptions.PolarsError as error:
                raise DataError(f"{path}: is damaged ({error}); save the result again") from error
            if lacks := [
                column for column in _columns(name) if column not in frames[name].lazy().collect_schema()
            ]:
                raise DataError(
                    f"{path}: has no column {lacks[0]}: it is no table of a result; save the result again"
                )
        return cls(meta=told["meta"], **frames)  # type: ignore[arg-type]


FRAMES = tuple(one.name for one in fields(BacktestResult) if one.name not in ("meta", "store"))
"""The names of a result's frames."""


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder in which something lies, and no result: it may be of somebody else."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder")
    found = {each.name for each in folder.iterdir()} if folder.is_dir() else set()
    found = {name for name in found if not name.startswith(PREFIX)}  # of a run that was killed
    if found - {"models"} and not found & {INDEX, PARTIAL}:
        raise ConfigError(f"{folder} is not empty, and holds no backtest: name a new folder")


def _columns(name: str) -> Iterable[str]:
    """The columns that each frame of a name has."""
    from barcast.backtest import ledger, metrics, skill, walk  # they know the names of this module

    return {
        "signals": ledger.SIGNALS,
        "outcomes": ledger.OUTCOMES,
        "bars": ledger.BARS,
        "targets": ledger.TARGETS,
        "fills": ledger.FILLS,
        "equity": ledger.EQUITY,
        "trainings": walk.TRAININGS,
        "scores": ("symbol", "horizon", "crps"),
        "skill": skill.SCHEMA,
        "portfolio": metrics.SCHEMA,
    }[name]


def definitions() -> dict[str, dict[str, str]]:
    """What the numbers of each table are, by the names of its columns."""
    from barcast.backtest import metrics, scoring, skill  # they know the names of this module

    return {
        "portfolio": dict(metrics.DEFINITIONS),
        "scores": dict(scoring.DEFINITIONS),
        "skill": dict(skill.DEFINITIONS),
    }


def json_rows(frame: pl.DataFrame) -> list[dict[str, object]]:
    """Rows in JSON's values: times as text, what is no finite number as null."""
    finite = pl.selectors.float()
    return frame.with_columns(
        pl.when(finite.is_finite()).then(finite),
        pl.selectors.datetime().dt.strftime("%Y-%m-%dT%H:%M:%S%.fZ"),
    ).to_dicts()


def level_column(level: float) -> str:
    """The column of a level: `q05` for 0.05, `q97.5` for 0.975."""
    percent = f"{100 * level:.6g}"
    return f"q0{percent}" if 100 * level < 9.9999995 else f"q{percent}"


def outlook_columns(outlooks: Sequence[Outlook]) -> dict[str, NDArray[np.float64]]:
    """What paths say of the same pairs of barriers, as columns (N,).

    `touch_up_2_1` and `touch_down_2_1` are the probabilities of touching 2 deviations up before 1 down and
    the other way round, `drawdown` the expected maximum drawdown.
    """
    columns = {}
    for k, (up, down) in enumerate(outlooks[0].pairs):
        columns[f"touch_up_{up:g}_{down:g}"] = np.array([o.touch.up[k] for o in outlooks])
        columns[f"touch_down_{up:g}_{down:g}"] = np.array([o.touch.down[k] for o in outlooks])
    return {**columns, "drawdown": np.array([o.drawdown for o in outlooks])}


def levels_of(columns: Sequence[str]) -> dict[float, str]:
    """The levels among a frame's columns, rising, and the column of each."""
    named = [name for name in columns if name[:1] == "q" and name[1:].replace(".", "", 1).isdigit()]
    return dict(sorted((round(float(name[1:]) / 100, 8), name) for name in named))
