"""The bars an instance knows: its history files, and its journal, which wins where both have a bar."""

from pathlib import Path

import numpy as np

from barcast.daemon.adjustments import adjusted
from barcast.daemon.calendar import Calendars
from barcast.daemon.events import events
from barcast.daemon.history import history_files, read_windows, scan
from barcast.daemon.journal import Journal
from barcast.daemon.ports import Arrival, Declaration, Warmup
from barcast.models import Adjustment, DataError, Window


def known_bars(state_dir: Path, calendars: Calendars, now: int) -> dict[str, Window]:
    """Every bar of each symbol that closed by `now`, from `history/` and `journal.db`, one window for each.

    The journal may be in use by a running daemon. A corrected bar has its last values, and a payload that
    comes again after its correction changes nothing: the rule of the windows. All prices of a symbol are on
    the basis of its newest bar.
    """
    known: dict[str, dict[int, tuple[float, ...]]] = {}
    adjustments: list[Adjustment] = []
    seen: dict[tuple[str, int], set[tuple[float, ...]]] = {}
    if files := history_files(state_dir / "history"):
        for symbol, window in read_windows(scan(files, "close", calendars, until=now + 1)).items():
            rows = zip(window.close_times.tolist(), window.values.tolist(), strict=True)
            known[symbol] = {time: tuple(values) for time, values in rows}
    if (state_dir / "journal.db").is_file():
        journal = Journal(state_dir / "journal.db", readonly=True)
        try:
            for _, event in events(journal.records()):
                if isinstance(event, Warmup):
                    for bar in event.bars:
                        known.setdefault(bar.symbol, {}).setdefault(bar.close_time, bar.values)
                elif isinstance(event, Declaration):
                    adjustments.append(event.adjustment)
                elif isinstance(event, Arrival):
                    for bar in event.bars:
                        payloads = seen.setdefault((bar.symbol, bar.close_time), set())
                        if bar.values not in payloads:
                            payloads.add(bar.values)
                            known.setdefault(bar.symbol, {})[bar.close_time] = bar.values
        finally:
            journal.close()
    if not known:
        raise DataError(
            f"{state_dir}: neither history/ nor journal.db holds a bar; let the daemon collect some first"
        )
    return adjusted({symbol: _window(symbol, known[symbol]) for symbol in sorted(known)}, adjustments)


def _window(symbol: str, rows: dict[int, tuple[float, ...]]) -> Window:
    times = np.array(sorted(rows), np.int64)
    return Window(symbol, times, np.array([rows[time] for time in times.tolist()]))
