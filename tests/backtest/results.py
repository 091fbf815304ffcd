"""Results made up for the tests of what shows them: every frame is full, of any size, the same each time."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl

from barcast.backtest.ledger import BENCHMARK
from barcast.backtest.metrics import portfolio
from barcast.backtest.result import BacktestResult
from barcast.backtest.scoring import scores
from barcast.backtest.walk import TRAININGS

LEVELS = {"q05": -1.64, "q10": -1.28, "q25": -0.67, "q50": 0.0, "q75": 0.67, "q90": 1.28, "q95": 1.64}
UTC_TIME = pl.Datetime("ns", "UTC")
SIGMA = 0.012


def sessions(count: int) -> list[datetime]:
    """Closes of so many weekdays."""
    first = datetime(2009, 1, 5, 21, tzinfo=UTC)
    return [first + timedelta(days=7 * (k // 5) + k % 5) for k in range(count)]


def five_minutes(count: int) -> list[datetime]:
    """Closes of so many bars of 5 minutes in sessions of six and a half hours, with nights in between."""
    days = sessions(-(-count // 78))
    return [day - timedelta(minutes=5 * (77 - k)) for day in days for k in range(78)][:count]


def made_up(
    symbols: Sequence[str] = ("AAA", "BBB"),
    closes: Sequence[datetime] | None = None,
    horizons: Sequence[int] = (1, 5),
    strategies: Sequence[str] = ("drift", "band"),
    trainings: int = 5,
) -> BacktestResult:
    """Random walks under a forecast of about the right width; the last symbol is split two for one half way.

    Every strategy, and buy-and-hold beside them, trades each tenth bar of the first symbols.
    """
    rng = np.random.default_rng(7)
    times = pl.Series("close_time", sessions(400) if closes is None else closes, dtype=UTC_TIME)
    n, half = len(times), len(times) // 2
    models = [f"{k:x}5c1e0f9a7b3d286" for k in range(1 + trainings // 2)]
    in_force = [models[k * len(models) // n] for k in range(n)]
    bars, signals, outcomes, walks = [], [], [], []
    for symbol in symbols:
        walk = np.cumsum(SIGMA * rng.standard_normal(n))
        basis = np.where(np.arange(n) >= half, 0.5, 1.0) if symbol == symbols[-1] else np.ones(n)
        close = 100 * np.exp(walk) * basis
        opened = close * np.exp(0.2 * SIGMA * rng.standard_normal(n))
        highest, lowest = np.maximum(opened, close), np.minimum(opened, close)
        bars.append(
            pl.DataFrame(
                {
                    "symbol": [symbol] * n,
                    "close_time": times,
                    "open": opened,
                    "high": 1.002 * highest,
                    "low": 0.998 * lowest,
                    "close": close,
                    "basis": basis,
                }
            )
        )
        for h in horizons:
            std = SIGMA * np.sqrt(h) * np.ones(n)
            quantiles = {name: z * std for name, z in LEVELS.items()}
            same = {
                "symbol": [symbol] * n,
                "close_time": times,
                "horizon": pl.Series([h] * n, dtype=pl.Int64),
            }
            more = {"reference": close, "mean": 0 * std, "std": std, "rise": 0.5 + 0 * std, "model": in_force}
            more |= {"warming": [False] * n, "degraded": [""] * n}
            signals.append(pl.DataFrame(same | quantiles | more))
            end = {"end_time": times[h:], "price": close[h:], "outcome": walk[h:] - walk[:-h]}
            outcomes.append(pl.DataFrame({name: values[: n - h] for name, values in same.items()} | end))
        walks.append(walk)
    growth = np.diff(np.mean(walks, axis=0), prepend=0.0)
    books, fills, targets = [], [], []
    for k, strategy in enumerate([*strategies, BENCHMARK]):
        gross = np.ones(n) if strategy == BENCHMARK else 0.5 + 0.5 * np.sin(np.arange(n) / 40 + k)
        equity = 1e6 * np.cumprod(1 + gross * growth)
        books.append(
            pl.DataFrame(
                {
                    "strategy": [strategy] * n,
                    "close_time": times,
                    "cash": (1 - gross) * equity,
                    "equity": equity,
                    "gross": gross,
                    "net": 0.6 * gross,
                    "carry": np.full(n, 1.5 * k),
                }
            )
        )
        at = np.arange(1, 2 if strategy == BENCHMARK else n, 10)
        for own in bars:
            units = np.where(rng.random(len(at)) < 0.5, -1, 1) * rng.uniform(10, 900, len(at))
            row = own[at]
            value = np.abs(units) * row["open"].to_numpy()
            paid = {"commission": 1e-4 * value, "spread": 5e-5 * value, "slippage": 2e-4 * value}
            fills.append(
                pl.DataFrame(
                    {"strategy": [strategy] * len(at), "symbol": row["symbol"], "decided": times[at - 1]}
                )
                .with_columns(row["close_time"], row["open"].alias("price"), units=units)
                .with_columns(pl.Series(name, values) for name, values in paid.items())
                .with_columns(pl.Series("position", np.cumsum(units)), row["basis"])
            )
            if strategy != BENCHMARK:
                exposures = pl.Series("target", np.clip(units / 900, -1, 1))
                targets.append(
                    fills[-1].select("strategy", "symbol", close_time="decided").with_columns(exposures)
                )
    signal, outcome = pl.concat(signals), pl.concat(outcomes)
    equity_frame, fill = pl.concat(books), pl.concat(fills).sort("close_time", "strategy", "symbol")
    return BacktestResult(
        signals=signal,
        outcomes=outcome,
        bars=pl.concat(bars),
        targets=pl.concat(targets),
        fills=fill,
        equity=equity_frame,
        trainings=_trainings(times, models, trainings),
        scores=scores(signal, outcome),
        skill=_skill(rng, symbols, horizons),
        portfolio=portfolio(equity_frame, fill, 252, len(strategies)),
        meta={
            "warning": "",
            "model": models[0],
            "periods_per_year": 252,
            "config": {"symbols": list(symbols), "<b>": 0.1},
            "files_sha256": "4a8f77",
        },
    )


def _trainings(times: pl.Series, models: Sequence[str], count: int) -> pl.DataFrame:
    """Every other training is accepted; every fourth one could not be scored."""
    rows = []
    for k in range(count):
        at = times[(k + 1) * len(times) // (count + 1)]
        scored, accepted = k % 4 != 3, k % 2 == 0
        rows.append(
            {
                "asked": at - timedelta(hours=5),
                "reasons": "weekly schedule; coverage drifted by 4 points",
                "judged": at,
                "accepted": accepted,
                "challenger": models[(k + 2) // 2 % len(models)] if accepted else f"bad{k}",
                "champion": models[k // 2 % len(models)],
                "challenger_crps": 0.61 if scored else None,
                "champion_crps": 0.62 if scored else None,
                "gain": (0.012 if accepted else -0.004) if scored else None,
                "gain_error": 0.003 if scored else None,
                "origins": 900 if scored else 0,
                "reason": "CRPS 1.20 % below the champion's; it must be more than 0.20 % below",
            }
        )
    return pl.DataFrame(rows, schema=TRAININGS)


def _skill(rng: np.random.Generator, symbols: Sequence[str], horizons: Sequence[int]) -> pl.DataFrame:
    rows = []
    for symbol, regime in [("all", r) for r in ("all", "calm", "middle", "volatile")] + [
        (symbol, "all") for symbol in symbols
    ]:
        for h in horizons:
            for k, other in enumerate(("hs", "fhs", "ewma", "har")):
                gain = 4.0 - k + rng.normal()
                crps = 0.0065 * np.sqrt(h)
                key = {
                    "symbol": symbol,
                    "horizon": h,
                    "regime": regime,
                    "other": other,
                    "n": 900,
                    "times": 500,
                }
                found = {"crps": crps, "other_crps": crps / (1 - gain / 100), "skill": gain, "error": 0.8}
                rows.append(key | found)
    return pl.DataFrame(rows)
