"""Does anything look ahead, or keep a state? The same run again with other bars later, and from later on.

At cuts drawn from the tested closes a run is repeated on the bars up to the cut alone, and on bars of which
those after the cut are poisoned: prices jump and turn, volumes change, bars are missing or there twice.
Whatever it tells of the time up to the cut must be the same to the bit. And it is begun at later closes:
signals and targets from there on must be the same, or they could not be told again after a restart. And at
closes spread over the test each strategy is made anew and asked: it must say what it said. `audit` does that
to any function of frames, `audit_backtest` to a backtest over files.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.backtest import caveats
from barcast.backtest.anew import anew as made_anew
from barcast.backtest.arguments import check_adjustments, listed, nanoseconds, paths_of, settings_of
from barcast.backtest.replay import found_timeframe, learnt_warning, run_backtest
from barcast.backtest.result import BacktestResult, levels_of
from barcast.backtest.tables import scratch_in, write_rows
from barcast.backtest.workers import writing_in
from barcast.daemon.adjustments import adjusted
from barcast.daemon.calendar import Calendars, iso
from barcast.daemon.history import KNOWN, PRICES, TIMES, Stamp, digest, files, read_windows, scan, stamped
from barcast.daemon.pipeline import MAX_JUMP, StrategySettings
from barcast.daemon.timeframe import Timeframe
from barcast.models import Adjustment, BarcastError, ConfigError, DataError, Window, open_model
from barcast.models.bar import LEAST, MOST

Told = BacktestResult | Mapping[str, pl.DataFrame]
"""What a run tells: a result, or frames of its own by name."""

Times = NDArray[np.int64]

FRAMES = ("bars", "signals", "targets", "fills", "equity", "outcomes", "trainings")
"""The frames of a result whose rows belong to a time, those first that others follow from."""

WHEN = {"outcomes": "end_time", "trainings": "judged"}
"""The column of a frame that says when a row is known; of all others it is `close_time`."""

AFTER = ("trainings",)
"""Frames whose rows are made only after all else of their moment, and of a run that ends there not at all."""

KEYS = ("strategy", "symbol", "close_time", "end_time", "judged", "asked", "decided", "horizon")
"""What tells the rows of a frame apart, as far as it has these columns."""

STATELESS = ("signals", "targets")
"""Frames of which nothing depends on where a run begins, as books and their outcomes do."""

KEEPING = ("start", "anew")
"""The checks of what is kept from one close to the next."""

STARTS = 2
"""Closes in a row at which a run is begun later: what counts its calls is off at one of them at least."""

ASKED = 200
"""Closes at which strategies are made anew, at most: what decides otherwise at one in fifty is found."""

SHOWN = 20
"""Violations that are kept of one frame and strategy in one run, the oldest first."""

ROUNDING = 1e-9
"""Deviations by which a quantile may be off and count as unchanged by bars far back: sums that run along."""

REMOVED, DOUBLED = 0.1, 0.1
"""Shares of the poisoned bars that are left out, and that are there twice."""

JUMPS = (0.25, 0.5, 2.0, 4.0)
"""Factors of poisoned prices and volumes: powers of two, which are exact in every type and text."""

LEFT_ALONE = ("symbol", "timeframe", "open_time", "close_time", *TIMES)
"""Columns that no poison changes."""

_TIME, _COUNT, _THERE, _OTHER = "\0time", "\0count", "\0there", "\0other"


@dataclass(frozen=True, slots=True)
class Violation:
    """One value up to a cut that depends on what comes after it, or after a start on what came before.

    `check` is `cut` for a run without what comes after, `poison` for one with other bars there, `repeat`
    for the very same run again, `start` for one that begins at the close `cut`, and `anew` for what is asked
    at that close without having been asked before. `strategy`, `symbol`,
    `close_time` and `horizon` (bars) say which row of the frame, as far as it has them; `close_time`, when it
    is known, and `cut` are nanoseconds. The `field` called `row` is a row that is there in one run only,
    `error` a run that ended early. `ahead` is how many bars must at least have been known too early; 0 where
    nothing says so.
    """

    check: str
    cut: int
    frame: str
    strategy: str | None
    symbol: str | None
    close_time: int
    horizon: int | None
    field: str
    whole: object
    other: object
    ahead: int


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: at which cut or start (nanoseconds), how many values were compared, how many differ.

    That of `anew` has the first of its closes.

    `ended` says why it ended early, where it did.
    """

    check: str
    cut: int
    values: int
    differ: int
    ended: str = ""


@dataclass(frozen=True, slots=True)
class Reach:
    """The signals of one close with so many `bars` behind them, that one included.

    Of the `signals` that are made of all bars `same` are the same to the bit, and `lacking` are not made.
    `distance` is the farthest that a quantile is off, in deviations of the forecast; None where none is made.
    """

    bars: int
    signals: int
    same: int
    lacking: int
    distance: float | None


@dataclass(frozen=True, slots=True)
class Warmup:
    """How far back signals look, tried at the close `at` (nanoseconds).

    `window` is how far they say to look, in bars, `most` how many bars there are at that close, and `first`
    how many a signal at the first tested close has at least. With `settled` bars or more nothing changes but
    by `ROUNDING`; it is `most` where the oldest bar still counts. `tried` is in order of bars.
    """

    at: int
    window: int
    most: int
    first: int
    settled: int
    tried: tuple[Reach, ...]


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found.

    `cuts` are in nanoseconds, and so are `starts` and the closes `asked` anew, which are empty where that was
    not tried. `unseen` are sentences on files that could not be cut. `data` is the report on the bars, `meta`
    what identifies the run; both are in JSON's values, and empty for a run of one's own.
    """

    seed: int
    cuts: tuple[int, ...]
    starts: tuple[int, ...]
    trials: tuple[Trial, ...]
    violations: tuple[Violation, ...]
    warmup: Warmup | None
    asked: tuple[int, ...] = ()
    unseen: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing up to a cut depends on what comes after it, nothing on what was asked before."""
        return not self.violations

    def json(self) -> str:
        """All of it, times as texts; a number that is none is null."""
        told = {"barcast_audit": 1, "passed": self.passed, **asdict(self)}
        told |= {name: [iso(at) for at in getattr(self, name)] for name in ("cuts", "starts", "asked")}
        return json.dumps(_plain(told), indent=1, allow_nan=False, ensure_ascii=False)


def audit(
    run: Callable[..., Told],
    frames: Sequence[pl.DataFrame] | pl.DataFrame,
    *,
    cuts: int = 12,
    seed: int = 1,
    window: int | None = None,
    late: Callable[..., Told] | None = None,
    anew: Callable[..., Told] | None = None,
    known: str = "close_time",
    progress: Callable[[int, str], None] = lambda _count, _at: None,
) -> Audit:
    """Audit `run`, which is called as `run(*frames)` and tells what it makes of them.

    Each frame has the column `known`, when a row was known: datetimes, or integers in nanoseconds. Bars are
    in `symbol, open, high, low, close, volume`; in other columns poison puts values of other rows. What is
    told is a `BacktestResult`, or frames by name that have their time in `WHEN`. What a run keeps in memory
    between calls, or reads beside its frames, escapes.

    There is a run on everything, the same once more, and two at each of the `cuts`, drawn by `seed` one from
    each equal part of the closes from the first signal on. A run that raises a `BarcastError` on the bars up
    to a cut is a violation; with poisoned bars it is told only, as the fault may be after the cut.
    `late(close, *frames)` is a run that begins at a close (nanoseconds), what came before being known: frames
    of the names `signals` and `targets` must say the same from there on, which is tried at `STARTS` closes of
    the third quarter of the signals. `anew(closes, *frames)` is a run in which whatever decides at each of
    these closes decides nothing before: the frame `targets` must say the same at them, which are up to
    `ASKED`, one of each equal part of the signals' closes. With a `window` (bars) it is tried how far back
    the last signals look, by `late` if there is one, else by `run`; not where a run failed or a signal
    changed. `progress` is called with 1 and a text after each run. Raise ConfigError for cuts or frames that
    cannot be and for a run that tells of no frames by name, DataError where nothing is told of, and what
    `run` raises.
    """
    if cuts < 1:
        raise ConfigError(f"cuts = {cuts!r}: give a number from 1")
    frames = listed(frames, "frames", (pl.DataFrame,), "polars frames, such as [bars]")
    times = [_times(frame, known) for frame in frames]
    last = max((int(own.max()) for own in times if len(own)), default=-1)

    def told(text: str, given: Sequence[pl.DataFrame], close: int | None = None) -> _Said:
        said = _Said(run(*given) if late is None or close is None else late(close, *given))
        progress(1, text)
        return said

    whole = told("all bars", frames)
    bars = [own for frame, own in zip(frames, times, strict=True) if "close" in _columns(frame)] or times
    closes = np.unique(np.concatenate(bars)) if bars else np.empty(0, np.int64)
    tested = closes[(closes >= whole.begin()) & (closes < last)]
    if not len(tested):
        raise DataError("nothing is told of a time before the last bar: test more bars")
    trial, violations = whole.against(told("all bars, again", frames), "repeat", last, closes)
    trials = [trial]
    drawn = _drawn(tested, cuts, seed) if not violations else []
    for number, cut in enumerate(drawn):
        rng = np.random.default_rng([seed, number])
        runs = {
            "cut": [frame.filter(pl.Series(own <= cut)) for frame, own in zip(frames, times, strict=True)],
            "poison": poisoned(frames, times, cut, rng, known),
        }
        for check, given in runs.items():
            at = f"{check} {number + 1} of {len(drawn)}, {iso(cut)}"
            try:
                said = told(at, given)
            except BarcastError as error:
                progress(1, at)
                trials.append(Trial(check, cut, 0, 0, str(error)))
                if check == "cut":
                    nowhere = (check, cut, "run", None, None, cut, None)
                    violations.append(Violation(*nowhere, "error", "none", str(error), 1))
                continue
            trial, found = whole.against(said, check, cut, closes)
            trials.append(trial)
            violations += found
    starts = _starts(whole, seed) if late is not None and drawn else []
    for number, start in enumerate(starts):
        at = f"start {number + 1} of {len(starts)}, {iso(start)}"
        try:
            said = told(at, frames, start)
        except BarcastError as error:
            progress(1, at)
            trials.append(Trial("start", start, 0, 0, str(error)))
            nowhere = ("start", start, "run", None, None, start, None)
            violations.append(Violation(*nowhere, "error", "none", str(error), 0))
            continue
        trial, found = whole.since(start).against(said.since(start), "start", start, closes)
        trials.append(trial)
        violations += found
    asked = _drawn(whole.closes(), ASKED, seed) if anew is not None and drawn else []
    if anew is not None and asked:
        at = f"asked anew at {len(asked)} closes"
        try:
            said = _Said(anew(asked, *frames))
        except BarcastError as error:
            trials.append(Trial("anew", asked[0], 0, 0, str(error)))
            nowhere = ("anew", asked[0], "run", None, None, asked[0], None)
            violations.append(Violation(*nowhere, "error", "none", str(error), 0))
        else:
            trial, found = whole.decided(asked).against(said.decided(asked), "anew", asked[0], closes)
            trials.append(trial)
            violations += [replace(one, cut=one.close_time) for one in found]
        progress(1, at)
    warmup = None
    if window is not None and drawn and not any(one.frame in ("run", "signals") for one in violations):
        warmup = _warmup(told, frames, times, whole, window)
    return Audit(
        seed=seed,
        cuts=tuple(drawn),
        starts=tuple(starts),
        asked=tuple(asked),
        trials=tuple(trials),
        violations=tuple(violations),
        warmup=warmup,
    )


def audit_backtest(
    paths: Sequence[Path | str] | Path | str,
    *,
    stamp: Stamp,
    cuts: int = 12,
    seed: int = 1,
    progress: Callable[[int, str], None] = lambda _count, _at: None,
    **settings: Any,
) -> Audit:
    """Audit a backtest over files with bars; `settings` are those of `run_backtest`.

    Every run reads copies. A strategy's parameter that is the path of one of these files, of a folder of
    them, or of another Parquet or CSV file with a time, is given the copy: a strategy that looks at a whole
    frame has the cut one. Files of strategies are loaded anew for each run. `Audit.unseen` names parameters
    whose path could not be cut; what a strategy reads without a parameter is not seen at all. Later starts,
    and how far back signals look, are tried unless models are retrained, which depends on the start. Raise as
    `run_backtest` and `audit` do.
    """
    named = paths_of(paths)
    calendar, symbols = settings.get("calendar", "24x7"), settings.get("symbols")
    timeframe = settings.get("timeframe") or found_timeframe(named, stamp, calendar, symbols)[0]
    closes = Calendars(calendar, Timeframe.parse(timeframe), settings.get("calendars", {}))
    since, until = (nanoseconds(settings.get(name), name) for name in ("since", "until"))
    history = read_windows(scan(named, stamp, closes, symbols, None, until))  # says what cannot be used
    strategies = settings_of(settings.get("strategies", ("quantile-band", "median-drift")))
    adjustments = check_adjustments(settings.get("adjustments", ()))
    model = str(settings.get("model", "fhs"))
    sampled = settings.get("sampler"), settings.get("steps"), bool(settings.get("touch"))
    card = open_model(model, timeframe, *sampled).card
    copies = _Copies(named, strategies, stamp, closes, adjustments)

    # Unless they are named, groups expect the symbols that came before, which depends on where a run begins.
    expected = symbols or list(history)

    def run(*frames: pl.DataFrame, **changes: Any) -> BacktestResult:
        with copies.written(frames, expected) as own:
            given = {"stamp": stamp, "timeframe": timeframe, "baselines": False}
            return run_backtest(**settings | given | own | changes)

    def anew(closes: list[int], *frames: pl.DataFrame) -> BacktestResult:
        with copies.written(frames, expected) as own:
            given = {"stamp": stamp, "timeframe": timeframe, "baselines": False}
            asked = [made_anew(strategy, closes) for strategy in own["strategies"]]
            return run_backtest(**settings | given | own | {"strategies": asked})

    fixed = settings.get("retrain") is None
    found = audit(
        run,
        copies.frames,
        cuts=cuts,
        seed=seed,
        window=card.window if fixed else None,
        late=(lambda close, *frames: run(*frames, since=close)) if fixed else None,
        anew=anew,
        known=KNOWN,
        progress=progress,
    )
    start = min(int(own.close_times[0]) for own in history.values()) if since is None else since
    max_jump = settings.get("max_jump", MAX_JUMP)
    warnings = [
        learnt_warning(model, start),
        *caveats.of_ends(history, start, closes),
        *caveats.of_adjustments(history, adjustments),
    ]
    data = {
        "timeframe": timeframe,
        "calendar": calendar,
        "stamp": stamp,
        "other_end": _other_end(named, stamp, closes, symbols),
        "symbols": _symbols(history, copies, closes, adjustments, until, max_jump),
        "warning": "\n".join(filter(None, warnings)),
    }
    meta = {
        "model": card.model,
        "strategies": msgspec.to_builtins(strategies),
        "files": [path.name for path in named],
        "files_sha256": digest(named),
        "since": None if since is None else iso(since),
        "until": None if until is None else iso(until),
    }
    return replace(found, unseen=tuple(copies.unseen), data=data, meta=meta)


def poisoned(
    frames: Sequence[pl.DataFrame],
    times: Sequence[Times],
    cut: int,
    rng: np.random.Generator,
    known: str,
) -> list[pl.DataFrame]:
    """The frames with other rows after the cut; `times` (N,) says when each row of a frame is known.

    Bars stay valid, and one that is in several frames, or more than once in one, stays the same in all.
    """
    keys = [
        pl.DataFrame({"symbol": _symbol(frame), "time": own})
        for frame, own in zip(frames, times, strict=True)
    ]
    fates = pl.concat(keys).filter(pl.col("time") > cut).unique().sort("time", "symbol")
    n = fates.height
    removed, doubled = rng.random((2, n)) < np.array([[REMOVED], [DOUBLED]])
    fates = fates.with_columns(
        copies=np.where(removed, 0, 1 + doubled),
        turned=rng.random(n) < 0.5,
        jump=rng.choice(JUMPS, n),
        above=rng.choice((1.0, 2.0), n),
        below=rng.choice((1.0, 0.5), n),
        traded=rng.choice(JUMPS, n),
    )
    made = []
    for frame, own, key in zip(frames, times, keys, strict=True):
        columns = _columns(frame)
        fate = key.join(fates, on=["symbol", "time"], how="left", maintain_order="left")
        changed = dict(_spoilt(frame, fate, columns))
        pool = np.flatnonzero(own > cut)
        for plain, name in columns.items():
            kept = plain in LEFT_ALONE or name == known or frame[name].dtype.is_temporal()
            if len(pool) and name not in changed and not kept:
                changed[name] = frame[name].gather(rng.choice(pool, frame.height))
        before = pl.Series(own <= cut)
        rows = frame.with_columns(frame[name].zip_with(before, new) for name, new in changed.items())
        made.append(rows[np.repeat(np.arange(frame.height), fate["copies"].fill_null(1).to_numpy())])
    return made


class _Said:
    """What a run told: frames by name, those first that others follow from, with the time of each row."""

    def __init__(self, told: Told) -> None:
        if isinstance(told, BacktestResult):
            told = {name: getattr(told, name) for name in FRAMES}
        if not isinstance(told, Mapping) or not all(isinstance(one, pl.DataFrame) for one in told.values()):
            raise ConfigError(
                f'the run gave {type(told).__name__}, not polars frames by name: return {{"signals": frame}}'
            )
        order = sorted(told, key=lambda name: FRAMES.index(name) if name in FRAMES else -1)
        self.frames: dict[str, pl.DataFrame] = {}
        for name in order:
            times = _times(told[name], WHEN.get(name, "close_time"), f"the frame {name!r} that the run gave")
            self.frames[name] = told[name].with_columns(pl.Series(_TIME, times))

    def begin(self) -> int:
        """The first time that is told of beside the bars: of signals, if there are any."""
        known = {name: frame for name, frame in self.frames.items() if name != "bars" and frame.height}
        frames = [known["signals"]] if "signals" in known else known.values()
        return min((int(frame[_TIME].to_numpy().min()) for frame in frames), default=2**63 - 1)

    def since(self, start: int) -> "_Said":
        """What is told of the time from a start on by the frames that do not depend on it."""
        later = _Said({})
        there = {name: frame for name, frame in self.frames.items() if name in STATELESS}
        later.frames = {name: frame.filter(pl.col(_TIME) >= start) for name, frame in there.items()}
        return later

    def closes(self) -> Times:
        """The closes of signals, rising."""
        signals = self.frames.get("signals")
        return np.unique(signals[_TIME].to_numpy()) if signals is not None else np.empty(0, np.int64)

    def decided(self, closes: Sequence[int]) -> "_Said":
        """The targets of these closes."""
        at = _Said({})
        there = {name: frame for name, frame in self.frames.items() if name == "targets"}
        at.frames = {name: frame.filter(pl.col(_TIME).is_in(closes)) for name, frame in there.items()}
        return at

    def against(self, other: "_Said", check: str, cut: int, closes: Times) -> tuple[Trial, list[Violation]]:
        """What another run tells differently of the time up to the cut."""
        values = differ = 0
        found: list[Violation] = []
        place = int(np.searchsorted(closes, cut, "right"))
        last = 2**63 - 1 if check in KEEPING else cut
        for name in dict.fromkeys([*self.frames, *other.frames]):
            own, others = self.frames.get(name), other.frames.get(name)
            own = others.clear() if own is None and others is not None else own
            others = own.clear() if others is None and own is not None else others
            if own is None or others is None:
                continue
            until = pl.col(_TIME) < last if name in AFTER else pl.col(_TIME) <= last
            own, others = own.filter(until), others.filter(until)
            values += own.height * (own.width - 1)
            if _same(own, others):
                continue
            count, shown = _differences(own, others, SHOWN)
            differ += count
            for row, column, whole, changed in shown:
                ahead = (
                    0 if check in ("repeat", *KEEPING) else place - int(np.searchsorted(closes, row[_TIME]))
                )
                at = (row.get("strategy"), row.get("symbol"), row[_TIME], row.get("horizon"))
                found.append(Violation(check, cut, name, *at, column, whole, changed, ahead))
        return Trial(check, cut, values, differ), found


def _same(one: pl.DataFrame, other: pl.DataFrame) -> bool:
    """Whether two frames hold the same bits in the same order."""
    return (
        one.schema == other.schema
        and one.height == other.height
        and not any(_differ(one[name], other[name]).any() for name in one.columns)
    )


def _differ(one: pl.Series, other: pl.Series) -> NDArray[np.bool_]:
    """Which values of two columns of one length differ: of floats the bits, though none is another none."""
    if one.dtype == other.dtype == pl.Float64:
        a, b = (column.fill_null(0.0).to_numpy() for column in (one, other))
        nan = np.isnan(a) & np.isnan(b)
        unlike = (a.view(np.int64) != b.view(np.int64)) & ~nan
        return np.asarray(unlike | (one.is_null() != other.is_null()).to_numpy())
    if one.dtype != other.dtype:
        one, other = one.cast(pl.String, strict=False), other.cast(pl.String, strict=False)
    return np.asarray(one.ne_missing(other).to_numpy())


def _differences(
    own: pl.DataFrame, other: pl.DataFrame, most: int
) -> tuple[int, list[tuple[dict[str, Any], str, object, object]]]:
    """How many values differ; and the row, the column and both values of up to `most` of each strategy.

    They are in order of time. A column that one side lacks is empty there.
    """
    keys = [_TIME, *(name for name in KEYS if name in own.columns and name in other.columns)]
    other = other.cast({name: own.schema[name] for name in keys}, strict=False)
    columns = [name for name in dict.fromkeys([*own.columns, *other.columns]) if name not in keys]
    sides = [
        side.with_columns(
            *(pl.lit(None).alias(name) for name in columns if name not in side.columns),
            pl.int_range(pl.len()).over(keys).alias(_COUNT),
            pl.lit(True).alias(_THERE),
        )
        for side in (own, other)
    ]
    both = sides[0].join(
        sides[1], on=[*keys, _COUNT], how="full", coalesce=True, suffix=_OTHER, nulls_equal=True
    )
    both = both.sort(*keys, _COUNT)
    here, there = (both[name].fill_null(False).to_numpy() for name in (_THERE, _THERE + _OTHER))
    alone = here != there
    unlike = {name: _differ(both[name], both[name + _OTHER]) & ~alone for name in columns}
    rows = np.flatnonzero(np.any([alone, *unlike.values()], axis=0))
    if "strategy" in both.columns:
        picked = both[rows].select("strategy", at=rows).group_by("strategy", maintain_order=True).head(most)
        rows = picked["at"].sort().to_numpy()
    else:
        rows = rows[:most]
    shown: list[tuple[dict[str, Any], str, object, object]] = []
    counts = Counter[object]()
    for at in rows.tolist():
        row = both.row(at, named=True)
        told = [(name, row[name], row[name + _OTHER]) for name in columns if unlike[name][at]]
        if alone[at]:
            told = [("row", "there" if here[at] else "absent", "there" if there[at] else "absent")]
        for one in told[: most - counts[row.get("strategy")]]:
            counts[row.get("strategy")] += 1
            shown.append((row, *one))
    return int(alone.sum()) + sum(int(one.sum()) for one in unlike.values()), shown


def _drawn(closes: Times, cuts: int, seed: int) -> list[int]:
    """One close of each of `cuts` equal parts; all closes where there are fewer."""
    rng, count = np.random.default_rng(seed), min(cuts, len(closes))
    edges = np.linspace(0, len(closes), count + 1).astype(int)
    return [int(closes[rng.integers(low, high)]) for low, high in pairwise(edges)]


def _starts(whole: _Said, seed: int) -> list[int]:
    """Closes in a row, the first drawn from the third quarter of the signals' own: none for a single one."""
    closes = whole.closes()
    if len(closes) < 2:
        return []
    low = max(1, len(closes) // 2)
    first = int(np.random.default_rng([seed, STARTS]).integers(low, max(low + 1, 3 * len(closes) // 4)))
    return [int(close) for close in closes[first : first + STARTS]]


def _spoilt(
    frame: pl.DataFrame, fate: pl.DataFrame, columns: Mapping[str, str]
) -> Iterator[tuple[str, pl.Series]]:
    """Prices and volumes as they are poisoned, for all rows: a name and its values in the type they had."""
    there = [name for name in (*PRICES, "volume") if name in columns]
    values = {name: frame[columns[name]].cast(pl.Float64, strict=False).to_numpy() for name in there}
    jump, turned = fate["jump"].to_numpy(), fate["turned"].fill_null(False).to_numpy()
    if "open" in values and "close" in values:
        opened, closed = values["open"], values["close"]
        values["open"], values["close"] = (
            np.where(turned, closed, opened),
            np.where(turned, opened, closed),
        )
    factors = {"high": jump * fate["above"].to_numpy(), "low": jump * fate["below"].to_numpy()}
    factors["volume"] = fate["traded"].to_numpy()
    for name in there:
        dtype = frame.schema[columns[name]]
        least = 0.0 if name == "volume" else 2 * LEAST
        made = np.clip(values[name] * factors.get(name, jump), least, MOST / 2)
        if dtype.is_integer():
            made = np.ceil(made)
        yield columns[name], pl.Series(made, nan_to_null=True).cast(dtype, strict=False)


def _columns(frame: pl.DataFrame) -> dict[str, str]:
    """The columns by what they are called in small letters."""
    return {name.lower(): name for name in frame.columns}


def _symbol(frame: pl.DataFrame) -> pl.Series:
    """The symbol of each row; an empty text where the frame has none."""
    columns = _columns(frame)
    if "symbol" not in columns:
        return pl.repeat("", frame.height, eager=True)
    return frame[columns["symbol"]].cast(pl.String).fill_null("")


def _times(frame: pl.DataFrame, known: str, said: str = "a frame") -> Times:
    """When each row was known, in nanoseconds (N,)."""
    if known not in frame.columns:
        raise ConfigError(
            f"{said} has no column {known!r}, only {', '.join(frame.columns)}: add when each row was known"
        )
    column = frame[known]
    if isinstance(column.dtype, pl.Datetime):
        column = column.dt.cast_time_unit("ns").to_physical()
    if not column.dtype.is_integer() or column.null_count():
        raise ConfigError(
            f"column {known!r} holds {column.dtype} with {column.null_count()} empty: give datetimes, or "
            "integers in nanoseconds, and none empty"
        )
    return column.cast(pl.Int64).to_numpy()


def _warmup(
    told: Callable[[str, Sequence[pl.DataFrame], int], _Said],
    frames: Sequence[pl.DataFrame],
    times: Sequence[Times],
    whole: _Said,
    window: int,
) -> Warmup | None:
    """How far back the signals of the last close look; None where no signals are told."""
    signals = whole.frames.get("signals")
    if signals is None or not signals.height:
        return None
    told_at = signals[_TIME].to_numpy()
    at, begin = int(told_at.max()), int(told_at.min())
    bars = pl.concat(
        [
            pl.DataFrame({"symbol": _symbol(frame), "time": own})
            for frame, own in zip(frames, times, strict=True)
            if "close" in _columns(frame)
        ]
    ).unique()
    named = signals["symbol"].unique() if "symbol" in signals.columns else pl.Series([""])
    bars = bars.filter(pl.col("symbol").is_in(named.implode()) & (pl.col("time") <= at)).sort("time")
    counts = bars.group_by("symbol").len()["len"]
    begun, early = signals.filter(pl.col(_TIME) == begin), bars.filter(pl.col("time") <= begin)
    if "symbol" in begun.columns:
        early = early.filter(pl.col("symbol").is_in(begun["symbol"].unique().implode()))
    first = min(early.group_by("symbol").len()["len"].to_list(), default=0)
    most = max(counts.to_list(), default=0)

    def seen(count: int) -> pl.DataFrame:
        since = bars.group_by("symbol").agg(since=pl.col("time").tail(count).min())
        given = []
        for frame, own in zip(frames, times, strict=True):
            kept = own <= at
            if "close" in _columns(frame):
                key = pl.DataFrame({"symbol": _symbol(frame)})
                oldest = key.join(since, on="symbol", how="left", maintain_order="left")["since"]
                kept &= own >= oldest.fill_null(0).to_numpy()
            given.append(frame.filter(pl.Series(kept)))
        try:
            said = told(f"{count} bars up to {iso(at)}", given, at).frames["signals"]
        except DataError:  # so few that nothing is forecast
            return signals.clear()
        return said.filter(pl.col(_TIME) == at)

    full = seen(most)
    tried: dict[int, Reach] = {}

    def same(count: int) -> bool:
        if count not in tried:
            tried[count] = _reach(count, full, seen(count))
        reach = tried[count]
        near = reach.distance is not None and reach.distance <= ROUNDING
        return reach.same == reach.signals or (near and not reach.lacking)

    low, high = 0, most
    if window < most:
        low, high = (0, window) if same(window) else (window, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if same(middle) else (middle, high)
    return Warmup(at, window, most, first, high, tuple(tried[n] for n in sorted(tried)))


def _reach(count: int, full: pl.DataFrame, less: pl.DataFrame) -> Reach:
    """What signals of fewer bars are beside those of all."""
    keys = [name for name in ("symbol", "horizon") if name in full.columns]
    _, shown = _differences(full, less, full.height * full.width)
    unlike = {tuple(row.get(key) for key in keys) for row, *_ in shown}
    distance = None
    both = full.join(less, on=keys, suffix=_OTHER) if keys else full.clear()
    if both.height and "std" in full.columns:
        off = [
            ((pl.col(name) - pl.col(name + _OTHER)).abs() / pl.col("std")).max().alias(name)
            for name in levels_of(full.columns).values()
        ]
        distance = max(map(float, both.select(off).row(0)), default=None)
    return Reach(count, full.height, full.height - len(unlike), full.height - both.height, distance)


class _Copies:
    """The files that a backtest and its strategies read, as frames, and how they are written again.

    The state are the `sources`, where each file really is -> as it was named, those with `bars` first; the
    `folders` that were named; and `frames`, of the sources and after them of the declared adjustments.
    """

    def __init__(
        self,
        named: Sequence[Path],
        strategies: Sequence[StrategySettings],
        stamp: Stamp,
        calendars: Calendars,
        adjustments: Sequence[Adjustment],
    ) -> None:
        self.strategies, self.unseen = strategies, list[str]()
        self.folders = {path.resolve() for path in named if path.is_dir()}
        self.sources = {path.resolve(): path for path in files(named)}
        self.bars = len(self.sources)
        self.frames = [stamped(path, stamp, calendars) for path in self.sources.values()]
        for strategy in strategies:
            for name, path in _paths(strategy):
                if path.resolve() in self.folders or path.resolve() in self.sources:
                    continue
                why = "it is no Parquet or CSV file"
                if path.is_file() and path.suffix in (".parquet", ".csv"):
                    try:
                        self.frames.append(stamped(path, stamp, calendars))
                        self.sources[path.resolve()] = path
                        continue
                    except DataError as error:
                        why = str(error)
                self.unseen.append(
                    f"Strategy {strategy.name} is given {path} as {name}, which could not be cut: {why}"
                )
        told = [(each.symbol, each.time, each.factor, each.kind) for each in adjustments]
        schema = {"symbol": pl.String, KNOWN: pl.Int64, "factor": pl.Float64, "kind": pl.String}
        self.frames.append(pl.DataFrame(told, schema=schema, orient="row"))

    @contextmanager
    def written(self, frames: Sequence[pl.DataFrame], symbols: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Write frames in the place of the sources; give the settings of a backtest that name them."""
        with scratch_in(None) as folder:
            parents = [*(path.parent.resolve() for path in self.sources.values()), *self.folders]
            homes = {parent: folder / str(n) for n, parent in enumerate(dict.fromkeys(parents))}
            copies = {place: homes[p.parent.resolve()] / p.name for place, p in self.sources.items()}
            bars, found = list[Path](), set[str]()
            for n, (copy, frame) in enumerate(zip(copies.values(), frames, strict=False)):
                rows = frame.drop(KNOWN)
                with writing_in(None):
                    copy.parent.mkdir(exist_ok=True)
                    if copy.suffix == ".parquet":
                        write_rows(rows, copy)
                    else:
                        rows.write_csv(copy)
                if n < self.bars and rows.height:
                    bars.append(copy)
                    found |= set(_symbol(rows))
            copies |= {place: homes[place] for place in self.folders}
            settings: dict[str, Any] = {
                "files": bars,
                "strategies": [_given(strategy, copies) for strategy in self.strategies],
                "adjustments": [Adjustment(*row) for row in frames[-1].iter_rows()],
                # One that begins after the cut has no bars yet.
                "symbols": [symbol for symbol in symbols if symbol in found],
            }
            try:
                yield settings
            except BarcastError as error:
                text = str(error)
                for place, copy in copies.items():
                    text = text.replace(str(copy), str(self.sources.get(place, place)))
                raise type(error)(text) from error


def _paths(strategy: StrategySettings) -> Iterator[tuple[str, Path]]:
    """Which parameters of a strategy are paths of files or folders that there are."""
    built: Any = strategy.build()
    for one in fields(built):
        value = getattr(built, one.name)
        if one.name != "name" and one.init and isinstance(value, str) and value:
            try:
                path = Path(value)
                if path.exists():
                    yield one.name, path
            except (OSError, ValueError):  # too long, or not a path at all
                continue


def _given(strategy: StrategySettings, copies: Mapping[Path, Path]) -> StrategySettings:
    """The strategy with the copies in the place of the files that its parameters name."""
    named = {name: path.resolve() for name, path in _paths(strategy)}
    changed = {name: str(copies[place]) for name, place in named.items() if place in copies}
    return msgspec.structs.replace(strategy, params={**strategy.params, **changed})


def _other_end(
    paths: Sequence[Path], stamp: Stamp, calendars: Calendars, symbols: Sequence[str] | None
) -> bool:
    """Whether the times could as well be those of the other end of the bars, which would be other closes."""
    other: Stamp = "open" if stamp == "close" else "close"
    try:
        shifted = scan(paths, other, calendars, symbols)
    except DataError:
        return False
    known = scan(paths, stamp, calendars, symbols)
    return not known.select("close_time").collect().equals(shifted.select("close_time").collect())


def _symbols(
    history: Mapping[str, Window],
    copies: _Copies,
    calendars: Calendars,
    adjustments: Sequence[Adjustment],
    until: int | None,
    max_jump: float,
) -> list[dict[str, Any]]:
    """What is to be known of the bars of each symbol."""
    rows = []
    for frame in copies.frames[: copies.bars]:
        own = pl.DataFrame({"symbol": _symbol(frame), "time": frame[KNOWN]})
        rows.append(own.with_columns(back=pl.col("time").diff().over("symbol") < 0))
    given = pl.concat(rows).filter(pl.col("time") < (2**63 - 1 if until is None else until))
    counted = given.group_by("symbol").agg(rows=pl.len(), back=pl.col("back").sum())
    counts = {symbol: (n, back) for symbol, n, back in counted.iter_rows()}
    jumps = caveats.jumps(adjusted(history, adjustments), 0, 0, max_jump)
    told = []
    for symbol, window in history.items():
        missing, (most, after) = caveats.missing(window, calendars.of(symbol))
        ratios = [jump.ratio for jump in jumps if jump.symbol == symbol]
        told.append(
            {
                "symbol": symbol,
                "bars": len(window),
                "first": iso(int(window.close_times[0])),
                "last": iso(int(window.close_times[-1])),
                "missing": missing,
                "largest_hole": most,
                "hole_after": iso(after) if most else None,
                "doubled": counts[symbol][0] - len(window),
                "out_of_order": counts[symbol][1],
                "jumps": len(ratios),
                "largest_jump": max(ratios, key=lambda ratio: max(ratio, 1 / ratio), default=None),
                "without_volume": int((window.values[:, 4] == 0).sum()),
            }
        )
    return told


def _plain(value: Any) -> Any:
    """In JSON's values."""
    if isinstance(value, Mapping):
        return {
            key: iso(own) if key in ("cut", "close_time", "at") and isinstance(own, int) else _plain(own)
            for key, own in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, datetime):
        return value.isoformat()
    return value if isinstance(value, str | int | bool | None) else str(value)
