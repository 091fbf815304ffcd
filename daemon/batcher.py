"""Which symbols are forecast together, decided from recorded arrival times alone."""

from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from barcast.daemon.ports import Group
from barcast.models import Bar

MEMORY = 3
"""How many of its own groups a symbol may miss before it is no longer expected, when none are configured."""

Open = Callable[[Collection[str], int], set[str]]
"""Those of some symbols of which a bar closes at a time: nobody waits for a market that is shut."""


class _Waiting(msgspec.Struct):
    """A group that is not due yet: until when it waits, who came, whom it waits for."""

    deadline: int
    came: set[str]
    missing: set[str]


class BatcherState(msgspec.Struct, frozen=True):
    """All that a batcher knows, to be stored: see `Batcher`."""

    waiting: dict[int, _Waiting]
    missed: dict[str, int]
    closed: int


class Batcher:
    """Collects the newest bars of a close time into a group.

    A group is due when every expected symbol has come, or `max_wait` nanoseconds after its first arrival,
    and it takes older groups with it, so that groups leave in order of their close. Expected are the
    configured symbols or, when there are none, those that came to one of the last three groups that they
    could have come to; of both only those of which a bar closes at that time.

    There is no timer in here: lateness is decided by the time that the caller passes, and the caller
    passes the recorded arrival time of a bar before it adds the bar. That makes the decision the same in
    a replay, however late a live timer woke up.

    The state is `_waiting` (by close time), `_missed` (how many of its groups in a row each known symbol has
    missed) and `_closed` (the close time of the newest group that left).
    """

    def __init__(self, symbols: Iterable[str], max_wait: int, open_at: Open) -> None:
        self.reconfigure(symbols, max_wait, open_at)
        self._waiting: dict[int, _Waiting] = {}
        self._missed: dict[str, int] = {}
        self._closed = -1

    @property
    def state(self) -> BatcherState:
        """Everything known; not a copy."""
        return BatcherState(self._waiting, self._missed, self._closed)

    @state.setter
    def state(self, state: BatcherState) -> None:
        """Go on from there; the state is this batcher's from now on."""
        self._waiting, self._missed, self._closed = state.waiting, state.missed, state.closed

    def reconfigure(self, symbols: Iterable[str], max_wait: int, open_at: Open) -> None:
        """Expect other symbols, or wait longer or shorter, for the groups that are still to begin."""
        self._configured, self._max_wait, self._open_at = frozenset(symbols), max_wait, open_at

    @property
    def deadline(self) -> int | None:
        """When the next waiting group is due even if it stays incomplete."""
        return min((group.deadline for group in self._waiting.values()), default=None)

    def due(self, now: int) -> Sequence[Group]:
        """Take out the groups whose wait ended at or before `now`, oldest close first."""
        late = [close for close, group in self._waiting.items() if group.deadline <= now]
        return self._release(max(late), now) if late else ()

    def add(self, bar: Bar, now: int) -> Sequence[Group]:
        """Add the newest bar of its symbol, received at `now`; take out the groups that this completes."""
        close, symbol = bar.close_time, bar.symbol
        if close <= self._closed:
            self._missed[symbol] = 0
            return (Group(close, now, (symbol,), straggler=True),)
        group = self._waiting.get(close)
        if group is None:
            missing = self._open_at(self._configured or self._missed, close)
            group = self._waiting[close] = _Waiting(now + self._max_wait, set(), missing)
        group.came.add(symbol)
        missing = group.missing
        if symbol not in missing:
            return ()
        missing.remove(symbol)
        return () if missing else self._release(close, now)

    def _release(self, newest: int, now: int) -> list[Group]:
        """Take out the groups up to a close, each due when it or a newer one was: at `now` at the latest."""
        closes = sorted([close for close in self._waiting if close <= newest])
        due: dict[int, int] = {}
        for close in reversed(closes):
            now = due[close] = min(now, self._waiting[close].deadline)
        groups = []
        for close in closes:
            group = self._waiting.pop(close)
            for symbol in group.missing & self._missed.keys():
                self._missed[symbol] += 1
                if self._missed[symbol] == MEMORY:
                    del self._missed[symbol]
            self._missed.update(dict.fromkeys(group.came, 0))
            previous, self._closed = self._closed, close
            came, missing = tuple(sorted(group.came)), tuple(sorted(group.missing))
            groups.append(
                Group(close, due[close], came, missing, previous=None if previous < 0 else previous)
            )
        return groups
