"""Whether a symbol's bars follow each other as they should: holes inside sessions, and jumps of the price."""

from dataclasses import dataclass

import msgspec
import numpy as np

from barcast.daemon.calendar import Calendar
from barcast.daemon.ports import Hole
from barcast.models import Bar, Window


class Run(msgspec.Struct):
    """The newest close and price of a symbol, and how many of its bars up to it followed without a fault."""

    close_time: int
    price: float
    bars: int


@dataclass(frozen=True, slots=True)
class Faults:
    """What is wrong with the bars of a window.

    `missing` is how many are, `hole` those right before the newest; `jumps` are the closes (nanoseconds) of
    bars whose open or close was too far from the close before, and how many times it.
    """

    missing: int
    hole: Hole | None
    jumps: tuple[tuple[int, float], ...]


class Continuity:
    """Knows which symbols' bars follow each other, and finds the faults of the others.

    A window need only be searched where it is not known to be sound: a symbol without faults costs next to
    nothing. The state is one `Run` for each symbol. What a search found to be sound beyond it is remembered,
    and is no state: without it the same is found again.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self._before: dict[str, int] = {}  # bars before the run that followed each other, too

    def newest(self, bar: Bar, calendar: Calendar, max_jump: float) -> None:
        """Take note of a bar that is the newest of its symbol."""
        run = self.runs.get(bar.symbol)
        if run is None:
            self.runs[bar.symbol] = Run(bar.close_time, bar.close, 1)
            return
        most, before, close_time, close = 1 + max_jump, run.price, bar.close_time, bar.close
        least = 1 / most
        follows = (
            least <= bar.open / before <= most
            and least <= close / before <= most
            and calendar.follows(run.close_time, close_time)
        )
        if follows:
            run.bars += 1
        else:
            run.bars = 1
            self._before.pop(bar.symbol, None)
        run.close_time, run.price = close_time, close

    def disturbed(self, symbol: str) -> None:
        """Something in the past of a symbol changed: its next windows must be searched."""
        if symbol in self.runs:
            self.runs[symbol].bars = 0
            self._before.pop(symbol, None)

    def sound(self, symbol: str, close_time: int, length: int) -> bool:
        """Whether the last `length` bars up to this one are known to have followed each other."""
        run = self.runs.get(symbol)
        if run is None or run.close_time != close_time:
            return False
        bars = run.bars
        return bars >= length or bars + self._before.get(symbol, 0) >= length

    def faults(self, window: Window, length: int, calendar: Calendar, max_jump: float) -> Faults:
        """The faults between the last `length` bars of a window of at least two."""
        times, values = window.close_times[-length:], window.values[-length:]
        run = self.runs.get(window.symbol)
        missing = calendar.missing_between(int(times[0]), int(times[-1])) - (len(times) - 2)
        after, before = int(times[-2]), int(times[-1])
        last = calendar.missing_between(after, before)
        ratios = values[1:, (0, 3)] / values[:-1, 3:4]  # (length - 1, 2): open and close to the close before
        beyond = (ratios > 1 + max_jump) | (ratios < 1 / (1 + max_jump))
        rows = np.flatnonzero(beyond.any(1))
        clean = not missing and not len(rows) and run is not None and run.close_time == before
        # Closes that an older calendar had can make up for a hole, until they are out of the window.
        if clean and run is not None and calendar.are_closes(times).all():
            self._before[window.symbol] = len(times) - run.bars
        return Faults(
            max(0, missing),
            Hole(after, before, last) if last else None,
            tuple((int(times[k + 1]), float(ratios[k][beyond[k]][0])) for k in rows),
        )
