"""The bars an instance knows: its history files, and its journal, which wins where both have a bar."""

from pathlib import Path

import numpy as np

from barcast.daemon.calendar import Calendar
from barcast.daemon.events import events
from barcast.daemon.history import history_files, read_windows, scan
from barcast.daemon.journal import Journal
from barcast.daemon.ports import Arrival, Warmup
from barcast.models import DataError, Window


def known_bars(state_dir: Path, calendar: Calendar) -> dict[str, Window]:
    """Every bar of each symbol, from `history/` and `journal.db`, as one window for each symbol.

    The journal may be in use by a running daemon. A corrected bar has its last values.
    """
    known: dict[str, dict[int, tuple[float, ...]]] = {}
    files = history_files(state_dir / "history")
    if files:
        for symbol, window in read_windows(scan(files, "close", calendar)).items():
            rows = zip(window.close_times.tolist(), window.values.tolist(), strict=True)
            known[symbol] = {time: tuple(values) for time, values in rows}
    if (state_dir / "journal.db").is_file():
        journal = Journal(state_dir / "journal.db", readonly=True)
        try:
            for _, event in events(journal.records()):
                for bar in event.bars if isinstance(event, (Arrival, Warmup)) else ():
                    known.setdefault(bar.symbol, {})[bar.close_time] = bar.values
        finally:
            journal.close()
    if not known:
        raise DataError(
            f"{state_dir}: neither history/ nor journal.db holds a bar; let the daemon collect some first"
        )
    return {symbol: _window(symbol, known[symbol]) for symbol in sorted(known)}


def _window(symbol: str, rows: dict[int, tuple[float, ...]]) -> Window:
    times = np.array(sorted(rows), np.int64)
    return Window(symbol, times, np.array([rows[time] for time in times.tolist()]))
