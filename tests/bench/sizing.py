"""What a machine must have, computed from the measurements of the same run."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from barcast.daemon.timeframe import Timeframe
from tests.bench.report import Row, Section, sentence

SYMBOLS = (5, 100, 1000)
TIMEFRAMES = ("1m", "5m", "1h", "1d")
MODELS = ("fhs", "sssd")
DAY = 86_400


def compute(sections: Mapping[str, Section]) -> Section:
    """CPU, memory and disk for symbols and timeframes that trade around the clock, one message a bar.

    CPU is that of taking the bar, forecasting it and publishing its signal, and of standing by; memory is
    the most that a daemon with so many symbols took, from reading its history on; disk is what
    a bar and its signal add to the journal.
    """
    section = Section(
        "sizing",
        "What it takes: share of one core, memory at most, journal a day (24x7)",
        {
            **{f"cpu_{m}": (f"CPU {m}", ".2%") for m in MODELS},
            **{f"peak_mb_{m}": (f"memory {m}, MB", ",.0f") for m in MODELS},
            "disk_mb_a_day": ("disk a day, MB", ",.1f"),
        },
    )
    trials = {(r.raw["model"], r.raw["symbols"]): r.raw for r in sections["latency"].rows if "model" in r.raw}
    idle = mean(trial["idle_share"] for trial in trials.values())
    for symbols in SYMBOLS:
        for timeframe in TIMEFRAMES:
            seconds = (Timeframe.parse(timeframe).duration or 0) / 1e9
            raw: dict[str, Any] = {"symbols": symbols, "timeframe": timeframe}
            for model in MODELS:
                trial = trials[model, symbols]
                raw[f"cpu_{model}"] = idle + symbols * trial["cpu_us_per_signal"] / 1e6 / seconds
                raw[f"peak_mb_{model}"] = trial["peak_mb"]
            each = trials["fhs", symbols]["disk_bytes_per_signal"]
            raw["disk_mb_a_day"] = symbols * DAY / seconds * each / 1e6
            section.rows.append(Row(f"{symbols:,} symbols, {timeframe}", raw))
    return section


def markdown(bench: Mapping[str, Any]) -> str:
    """The table of the README, from what bench.json holds."""
    lines = [
        "| symbols | timeframe | CPU, `fhs` | CPU, SSSD | memory, `fhs` | memory, SSSD | disk a day |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in bench["sections"]["sizing"]["rows"]:
        shares = " | ".join(_share(row[f"cpu_{m}"]) for m in MODELS)
        sizes = " | ".join(f"{row[f'peak_mb_{m}']:,.0f} MB" for m in MODELS)
        disk = row["disk_mb_a_day"]
        lines.append(
            f"| {row['symbols']:,} | {row['timeframe']} | {shares} | {sizes} | "
            f"{f'{disk:,.0f}' if disk >= 10 else f'{disk:.2g}'} MB |"
        )
    return "\n".join([*lines, "", f"({sentence(bench['machine'])}; `make bench`.)"])


def _share(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"
