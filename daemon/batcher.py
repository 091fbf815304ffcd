"""Which symbols are forecast together, decided from recorded arrival times alone."""

from collections.abc import Iterable, Iterator

from barcast.daemon.ports import Group
from barcast.models import Bar

MEMORY = 3
"""How many past groups say which symbols to expect when none are configured."""


class Batcher:
    """Collects the newest bars of a close time into a group.

    A group is due when every expected symbol has come, or `max_wait` nanoseconds after its first arrival,
    and it takes older groups with it, so that groups leave in order of their close. Expected are the
    configured symbols or, when there are none, those seen in the last three groups.

    There is no timer in here: lateness is decided by the time that the caller passes, and the caller
    passes the recorded arrival time of a bar before it adds the bar. That makes the decision the same in
    a replay, however late a live timer woke up.

    The state is `_waiting` (close time -> deadline and symbols), `_seen` (the symbols of the last groups)
    and `_closed` (the close time of the newest group that left).
    """

    def __init__(self, symbols: Iterable[str], max_wait: int) -> None:
        self.reconfigure(symbols, max_wait)
        self._waiting: dict[int, tuple[int, set[str]]] = {}
        self._seen: dict[int, set[str]] = {}
        self._closed = -1

    def reconfigure(self, symbols: Iterable[str], max_wait: int) -> None:
        """Expect other symbols, or wait longer or shorter for the groups that are still to begin."""
        self._configured, self._max_wait = frozenset(symbols), max_wait

    @property
    def deadline(self) -> int | None:
        """When the next waiting group is due even if it stays incomplete."""
        return min((deadline for deadline, _ in self._waiting.values()), default=None)

    def due(self, now: int) -> Iterator[Group]:
        """Take out the groups whose wait ended at or before `now`, oldest close first."""
        late = [close for close, (deadline, _) in self._waiting.items() if deadline <= now]
        if late:
            yield from self._release(max(late))

    def add(self, bar: Bar, now: int) -> Iterator[Group]:
        """Add the newest bar of its symbol, received at `now`; take out the groups that this completes."""
        if bar.close_time <= self._closed:
            self._seen.setdefault(bar.close_time, set()).add(bar.symbol)
            self._forget()
            yield Group(bar.close_time, (bar.symbol,), straggler=True)
            return
        _, symbols = self._waiting.setdefault(bar.close_time, (now + self._max_wait, set()))
        symbols.add(bar.symbol)
        expected = self._configured or frozenset().union(*self._seen.values())
        if expected and symbols >= expected:
            yield from self._release(bar.close_time)

    def _release(self, newest: int) -> Iterator[Group]:
        for close in sorted(close for close in self._waiting if close <= newest):
            _, symbols = self._waiting.pop(close)
            self._seen[close] = symbols
            self._closed = close
            self._forget()
            yield Group(close, tuple(sorted(symbols)))

    def _forget(self) -> None:
        for close in sorted(self._seen)[:-MEMORY]:
            del self._seen[close]
