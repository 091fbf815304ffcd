"""How `barcast watch` looks: what is seen, what was asked for, the moment and the size give lines of text.

Nothing here reads the clock or the terminal. Every number is one of a message, or follows from those of one.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from textwrap import wrap

from rich.cells import cell_len
from rich.text import Text

from barcast.backtest.cli.terminal import price
from barcast.daemon.watch import Aim, Figures, Moment, Row, Seen
from barcast.daemon.wire import from_text, to_text

LEAST = (40, 8)
"""Columns and rows below which there is no room for anything."""
DETAILED = 18
"""Rows from which on there is room for the details of a symbol."""
FAN, WIDEST_FAN = 13, 33
"""Columns of a fan."""
NAME, LONG_NAME, BROAD = 10, 32, 120
"""Columns that a symbol takes at most, and from how many columns of a terminal on it takes more. With half of
those there is room for a date."""
WHY = 20
"""Columns from which on reasons are shown beside a symbol."""
GAP = 1
SIGNS = {"!": "degraded", "w": "warming up", "x": "not tradable", "z": "stale: past its validity"}
NOTHING = "·"
_ASCII = str.maketrans("─━┃┊·…±↑↓←→", "-=|:.~=^v<>")
CALM, LOUD = "bold green", "bold red"
_S, _UNITS = 10**9, (("d", 86_400), ("h", 3600), ("m", 60))


class Sort(StrEnum):
    """By what symbols are sorted."""

    name = "name"
    width = "width"
    skew = "skew"
    rise = "rise"
    staleness = "staleness"


@dataclass(frozen=True, slots=True)
class View:
    """What a person asked for.

    The `horizon` is in bars (None: the nearest), `chosen` the symbol with the details (None: the first).
    While the prefix is `typed`, keys are letters of it.
    """

    sort: Sort = Sort.name
    prefix: str = ""
    horizon: int | None = None
    chosen: str | None = None
    typed: bool = False


def rows(seen: Seen, view: View) -> list[Row]:
    """The symbols that are shown, in their order: the widest, the most skewed upwards, the likeliest to rise
    or the oldest first; those of whom the signal does not say it come last."""
    bars = horizon(seen, view)
    prefix = view.prefix.upper()
    found = [row for name, row in sorted(seen.rows.items()) if name.upper().startswith(prefix)]
    if view.sort is Sort.staleness:
        return sorted(found, key=lambda row: row.close)
    if view.sort is Sort.name or bars is None:
        return found

    def key(row: Row) -> tuple[bool, float]:
        figures = row.figures.get(bars)
        value = None if figures is None else getattr(figures, view.sort.value)
        return value is None, 0.0 if value is None else -value

    return sorted(found, key=key)


def horizon(seen: Seen, view: View) -> int | None:
    """The horizon that is shown, in bars; None without signals."""
    known = seen.horizons
    return view.horizon if view.horizon in known else next(iter(known), None)


def keys(typed: bytes) -> list[str]:
    """What was pressed, by name, of the bytes that a terminal sends; what has no name is left out."""
    names = {
        b"[A": "up", b"OA": "up", b"[B": "down", b"OB": "down", b"[C": "right", b"OC": "right",
        b"[D": "left", b"OD": "left", b"[5~": "page up", b"[6~": "page down", b"[H": "home", b"OH": "home",
        b"[1~": "home", b"[F": "end", b"OF": "end", b"[4~": "end", b"": "escape",
    }  # fmt: skip
    single = {b"\r": "enter", b"\n": "enter", b"\x7f": "back", b"\b": "back"}
    found = []
    for press in re.findall(rb"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Z])?|.", typed, re.DOTALL):
        if press[:1] == b"\x1b":
            name = names.get(press[1:])
        else:
            name = single.get(press, press.decode("ascii", "ignore"))
        if name and (len(name) > 1 or name.isprintable()):
            found.append(name)
    return found


def pressed(key: str, view: View, seen: Seen, height: int) -> View | None:
    """What is asked for after a key; None to end. Keys that mean nothing change nothing."""
    if view.typed:
        return _typed(key, view)
    known, bars = seen.horizons, horizon(seen, view)
    match key:
        case "q":
            return None
        case "s" | "S":
            sorts = list(Sort)
            step = 1 if key == "s" else -1
            return replace(view, sort=sorts[(sorts.index(view.sort) + step) % len(sorts)])
        case "/":
            return replace(view, typed=True)
        case "escape":
            return replace(view, prefix="")
        case "left" | "right" | "h" | "l" if bars is not None:
            step = 1 if key in ("right", "l") else -1
            return replace(view, horizon=known[(known.index(bars) + step) % len(known)])
    shown = [row.signal.symbol for row in rows(seen, view)]
    page = _room(seen, view, height).rows
    steps = {"down": 1, "j": 1, "up": -1, "k": -1, "page down": page, " ": page, "page up": -page, "b": -page}
    steps |= {"home": -len(shown), "g": -len(shown), "end": len(shown), "G": len(shown)}
    if key in steps and shown:
        at = shown.index(view.chosen) if view.chosen in shown else 0
        return replace(view, chosen=shown[max(0, min(len(shown) - 1, at + steps[key]))])
    return view


def _typed(key: str, view: View) -> View:
    match key:
        case "enter":
            return replace(view, typed=False)
        case "escape":
            return replace(view, typed=False, prefix="")
        case "back":
            return replace(view, prefix=view.prefix[:-1])
    return replace(view, prefix=view.prefix + key.upper()) if len(key) == 1 and key != " " else view


def draw(
    seen: Seen, view: View, at: Moment, broker: str, size: tuple[int, int], keyboard: bool = True
) -> list[Text]:
    """The screen: as many lines as the terminal has rows, none wider than its columns."""
    width, height = size
    if width < LEAST[0] or height < LEAST[1]:
        said = [f"{seen.instance} {seen.standing(at).word}", f"make it {LEAST[0]}x{LEAST[1]} at least"]
        return _filled([_cut(text, width) for text in said], height)
    shown, room = rows(seen, view), _room(seen, view, height)
    names = [row.signal.symbol for row in shown]
    place = names.index(view.chosen) if view.chosen in names else 0
    first = place // room.rows * room.rows
    page = shown[first : first + room.rows]
    lines = _head(seen, at, broker, width)
    chosen = page[place - first] if page and room.details else None
    lines += _table(seen, view, at, page, width, chosen, LONG_NAME if width >= BROAD else NAME)
    lines += [] if page else _empty(seen, view, width)
    lines = _filled(lines, height - room.details - 2)
    if chosen is not None:
        lines += _details(seen, view, at, chosen, width, room.details)
    return [*_filled(lines, height - 2), *_foot(seen, view, first, len(page), len(shown), width, keyboard)]


def snapshot(seen: Seen, view: View, at: Moment, broker: str, width: int) -> list[Text]:
    """All symbols in one table, for what is no terminal; below it, what is wrong with their bars, in full."""
    shown = rows(seen, view)
    lines = [*_head(seen, at, broker, width), *_table(seen, view, at, shown, width, None, LONG_NAME)]
    lines += [] if shown else _empty(seen, view, width)
    used = {sign for row in shown for sign in _signs(row, at)}
    if used:
        lines += [Text(), _cut(_legend(used), width)]
    said = [f"{row.signal.symbol}: {'; '.join(row.signal.reasons)}" for row in shown if row.signal.reasons]
    return [*lines, *(Text(clean(f"! {text}")) for text in said)]


@dataclass(frozen=True, slots=True)
class _Room:
    """How many rows the symbols have, and the details below them."""

    rows: int
    details: int


def _room(seen: Seen, view: View, height: int) -> _Room:
    """Head, heads of the columns and foot take seven rows."""
    left = height - 7
    wanted = len(seen.horizons) + 4 if height >= DETAILED and seen.rows else 0
    details = min(wanted, left // 2)
    return _Room(max(1, left - details), details)


# Lines above and below the table.


def _head(seen: Seen, at: Moment, broker: str, width: int) -> list[Text]:
    standing, status, done = seen.standing(at), seen.status, seen.done
    first = Text.assemble(
        (clean(seen.instance), "bold"), " ", (f" {standing.word} ", f"reverse {_mood(standing.word)}")
    )
    clock = to_text(at.time // _S * _S)[0 if width >= BROAD // 2 else 11 :]
    left = width - first.cell_len - cell_len(clock)
    place = f"  {broker} {seen.root} {seen.timeframe}  "
    first.append_text(_cut(place, left) if left > 4 else Text(" "))
    first.append(" " * (width - first.cell_len - cell_len(clock)) + clock)
    served = ["no model told yet"]
    if seen.model:
        served = [f"model {seen.model.model} since {_day(seen.model.activated, at)}"]
    if status is not None:
        served.append(f"processed {_day(status.processed, at) if status.processed else 'nothing yet'}")
        served += [] if status.waiting is None else [f"waiting {status.waiting}"]
    served += [f"unreadable {seen.unreadable}"] if seen.unreadable else []
    group = ["no group yet"]
    if done is not None and from_text(done.close_time) >= (seen.close or 0):
        told = "SHED" if done.shed else f"{len(done.symbols)} after {span(seen.took, True)}"
        group = [f"group {_day(done.close_time, at)}: {told}"]
        group += [f"missing {len(done.missing)}", f"withheld {len(done.withheld)}"]
    elif seen.close is not None:
        group = [f"group {_day(to_text(seen.close), at)}: {len(seen.came)} of {seen.due}"]
    group.append(f"late {seen.stragglers}  shed {seen.shed} of {seen.groups}")
    why = _cut(standing.why, width, LOUD)
    return [_cut_text(first, width), _cut("  ".join(served), width), _cut("  ".join(group), width), why]


def _mood(word: str) -> str:
    return {"LIVE": CALM, "CONNECTING": "bold", "STARTING": "bold", "PAUSED": "bold yellow"}.get(word, LOUD)


def _empty(seen: Seen, view: View, width: int) -> list[Text]:
    if seen.rows:
        text = f"none of the {len(seen.rows)} symbols begins with {view.prefix}"
    elif seen.linked:
        text = f"no signals yet: they come when the {seen.timeframe} bars of a group have been forecast"
    else:
        text = "no signals yet"
    return [Text(), _cut(text, width, "dim")]


def _foot(seen: Seen, view: View, first: int, shown: int, of: int, width: int, keyboard: bool) -> list[Text]:
    places = f"{first + 1}-{first + shown} of {of}" if shown else f"0 of {of}"
    where = f"{places} by {view.sort.value}"
    if view.typed:
        return [
            _cut(_legend(SIGNS), width, "dim"),
            _cut(f"symbols that begin with: {view.prefix}_", width, "bold"),
        ]
    if (bars := horizon(seen, view)) is not None:
        where += f", +{bars}"
    if view.prefix:
        where += f", {view.prefix}*"
    told = "q quit  s sort  / filter  ←→ horizon  ↑↓ PgUp PgDn" if keyboard else "Ctrl-C ends"
    return [_cut(_legend(SIGNS), width, "dim"), _cut(f"{where} | {told}", width, "bold")]


def _legend(signs: Iterable[str]) -> str:
    return "  ".join(f"{sign} {text}" for sign, text in SIGNS.items() if sign in signs)


def _details(seen: Seen, view: View, at: Moment, row: Row, width: int, height: int) -> list[Text]:
    signal, bars = row.signal, horizon(seen, view)
    told = [
        f"{signal.symbol} at {price(signal.reference)}  close {_day(signal.close_time, at)}  "
        f"valid until {_day(signal.valid_until, at)}  {signal.model}"
    ]
    if signal.sampler != "none":
        told.append(f"{signal.sampler}, {signal.steps} steps, {signal.samples} samples")
    lines = [_cut("  ".join(told), width, "bold")]
    below = _below(seen, row, at, width)
    own = list(row.figures.values())
    at_least = max(1, height - 1 - len(below))
    place = next((i for i, figures in enumerate(own) if figures.bars == bars), 0)
    start = max(0, min(place - at_least // 2, len(own) - at_least))
    lines += [
        _cut(_said(figures, at), width, "bold" if figures.bars == bars else "")
        for figures in own[start : start + at_least]
    ]
    return _filled([*lines, *(_cut(text, width) for text in below)], height)


def _below(seen: Seen, row: Row, at: Moment, width: int) -> list[str]:
    """Targets and what is wrong with a signal."""
    own = seen.targets.get(row.signal.symbol, {})
    lines = []
    if own:
        told = [f"{name} {t.target.target:+.3g} {_stale(t, at)}".rstrip() for name, t in sorted(own.items())]
        lines.append("targets " + "  ".join(told))
    wrong = [SIGNS[sign] for sign in _signs(row, at) if sign != "!"]
    if row.signal.reasons or wrong:
        lines += wrap(clean("! " + "; ".join([*row.signal.reasons, *wrong])), width)[:2]
    return lines


def _said(figures: Figures, at: Moment) -> str:
    """What a signal says of a horizon, in one line, what matters most first."""
    pieces = [f"+{figures.bars:<3d} {_day(figures.end_time, at)}", f"rise {_percent(figures.rise)}"]
    pieces += [f"median {price(figures.median)}"] if figures.median else []
    for name, pair in (("90%", figures.most), ("50%", figures.half)):
        pieces += [f"{name} {price(pair[0])} {price(pair[1])}"] if pair else []
    if figures.inside is not None:
        pieces.append(f"inside {_percent(figures.inside)} of {figures.outcomes}")
    return "  ".join(pieces)


# The table.


@dataclass(frozen=True, slots=True)
class _Column:
    """One column: where it stands, its head, and its cells, or how they are drawn in some columns."""

    place: int
    head: str
    cells: list[Text]
    width: int
    fan: int | None = None
    left: bool = False


def _table(
    seen: Seen,
    view: View,
    at: Moment,
    page: Sequence[Row],
    width: int,
    chosen: Row | None,
    name: int,
) -> list[Text]:
    """The heads and a line for each symbol: the columns that matter most, as many as there is room for."""
    if not page:
        return [Text()]
    columns: list[_Column] = []
    left = width
    for column in _columns(seen, view, at, page, name):
        if column.width + bool(columns) * GAP <= left:
            left -= column.width + bool(columns) * GAP
            columns.append(column)
    fans = [column for column in columns if column.fan is not None]
    more = min(WIDEST_FAN - FAN, left // len(fans) // 2 * 2) if fans else 0
    left -= more * len(fans)
    final = []
    for column in sorted(columns, key=lambda column: column.place):
        if column.fan is not None:
            column = _fan_column(column, page, column.fan, column.width + more)
        elif column.head == "WHY":
            column = replace(column, width=column.width + left)
        final.append(column)
    lines = [_line(final, [Text(column.head) for column in final], "bold underline")]
    for i, row in enumerate(page):
        style = "reverse" if row is chosen else "dim" if row.until <= at.time else ""
        lines.append(_line(final, [column.cells[i] for column in final], style))
    return lines


def _line(columns: Sequence[_Column], cells: Sequence[Text], style: str) -> Text:
    line = Text(style=style)
    for column, cell in zip(columns, cells, strict=True):
        cell = _cut_text(cell.copy(), column.width)
        space = " " * (column.width - cell.cell_len)
        line.append(" " * GAP if line.plain else "")
        line.append("" if column.left else space).append_text(cell).append(space if column.left else "")
    return line


def _columns(seen: Seen, view: View, at: Moment, page: Sequence[Row], name: int) -> list[_Column]:
    """What could be shown, what matters most first."""
    bars = horizon(seen, view)
    of = [row.figures.get(bars) if bars is not None else None for row in page]

    def plain(
        place: int, head: str, cells: Iterable[str | Text], left: bool = False, most: int = 99
    ) -> _Column:
        made = [Text(clean(cell)) if isinstance(cell, str) else cell for cell in cells]
        broad = max([cell_len(head), *(cell.cell_len for cell in made)])
        return _Column(place, head, made, min(most, broad), left=left)

    def figure(place: int, head: str, cell: Callable[[Figures], str | Text | None]) -> _Column:
        return plain(place, head, ((cell(f) if f else None) or NOTHING for f in of))

    def pair(one: tuple[float, float] | None) -> str | None:
        return f"{price(one[0])} {price(one[1])}" if one else None

    found = [
        plain(0, "SYMBOL", [row.signal.symbol for row in page], True, name),
        plain(1, "", [Text(_signs(row, at), "bold yellow") for row in page], True),
        plain(2, "LAST", [price(row.signal.reference) for row in page]),
        plain(3, "AGE", [span(at.time - row.close) for row in page]),
        figure(4, "MOVE", lambda f: None if f.move is None else _signed(f.move)),
        _Column(7, "", [], FAN, fan=bars),
        figure(8, "90%", lambda f: None if f.width is None else _percent(f.width, 2)),
        figure(9, "RISE", lambda f: _percent(f.rise)),
        figure(11, "IN90", lambda f: None if f.inside is None else _percent(f.inside)),
    ]
    for i, strategy in enumerate(seen.strategies):
        own = [seen.targets.get(row.signal.symbol, {}).get(strategy) for row in page]
        cells = [NOTHING if t is None else f"{t.target.target:+.2f}{_stale(t, at)}" for t in own]
        found.append(plain(12 + i, _cut(strategy, 7).plain, cells))
    last = 12 + len(seen.strategies)
    skew = figure(10, "SKEW", lambda f: None if f.skew is None else f"{f.skew:+z.2f}")
    found.insert(len(found) - len(seen.strategies) * (view.sort is Sort.skew), skew)
    others = [other for other in seen.horizons if other != bars]
    found += [_Column(last + i, "", [], FAN, fan=other) for i, other in enumerate(others[:2])]
    found.append(figure(5, "90% FROM TO", lambda f: pair(f.most)))
    found.append(
        _Column(
            last + 99, "WHY", [Text(clean("; ".join(row.signal.reasons))) for row in page], WHY, left=True
        )
    )
    found.append(figure(6, "50% FROM TO", lambda f: pair(f.half)))
    found += [_Column(last + 2 + i, "", [], FAN, fan=other) for i, other in enumerate(others[2:])]
    return found


def _fan_column(column: _Column, page: Sequence[Row], bars: int, width: int) -> _Column:
    """Fans on one scale: so far to either side of the last price as the widest of the page."""
    ends = [
        abs(end / row.signal.reference - 1)
        for row in page
        if (found := row.figures.get(bars)) is not None
        for end in (*(found.most or ()), *(found.half or ()), found.median or row.signal.reference)
    ]
    reach = max(ends, default=0.0)
    head = f"+{bars} ±{_percent(reach, 2)}"
    cells = [fan(row.figures.get(bars), row.signal.reference, reach, width) for row in page]
    return replace(column, head=head, cells=cells, width=width)


def fan(figures: Figures | None, reference: float, reach: float, width: int) -> Text:
    """Median, 50 and 90 % interval around the last price, which is in the middle, on `width` columns.

    They reach from `reach`, a share of the reference, below it to as far above it.
    """
    marks = [" "] * width
    marks[width // 2] = "┊"
    if figures is None or not reach:
        return Text("".join(marks))

    def place(at: float) -> int:
        return max(0, min(width - 1, round(((at / reference - 1) / reach + 1) / 2 * (width - 1))))

    for interval, mark in ((figures.most, "─"), (figures.half, "━")):
        if interval is not None:
            low, high = map(place, interval)
            marks[low : high + 1] = mark * (high + 1 - low)
    if figures.median is not None:
        marks[place(figures.median)] = "┃"
    return Text("".join(marks))


# Texts.


def ascii_only(line: Text) -> Text:
    """A line for terminals that know ASCII alone."""
    plain = line.copy()
    plain.plain = line.plain.translate(_ASCII).encode("ascii", "replace").decode()
    return plain


def clean(text: str) -> str:
    """A text of a message without what a terminal would take for an order."""
    return "".join(c if c.isprintable() else "?" for c in text)


def span(ns: int, fine: bool = False) -> str:
    """A span of time in its largest unit, in five characters; seconds with decimals if `fine`."""
    seconds = ns / _S
    for unit, length in _UNITS:
        if abs(seconds) >= length:
            count = seconds / length
            return f"{count:.1f}{unit}" if abs(count) < 9.95 else f"{count:.0f}{unit}"
    return f"{seconds:.3g}s" if fine else f"{seconds:.0f}s"


def _signs(row: Row, at: Moment) -> str:
    flags = row.signal.flags
    stale, untradable = row.until <= at.time, not row.signal.tradable
    return "!" * ("degraded" in flags) + "w" * ("warming" in flags) + "x" * untradable + "z" * stale


def _stale(target: Aim, at: Moment) -> str:
    return "z" * (target.until <= at.time)


def _percent(share: float, digits: int = 0) -> str:
    """A share in percent, with so many decimals below 10 %."""
    percent = 100 * share
    return f"{percent:.{digits if percent < 10 else min(digits, 1)}f}%"


def _signed(share: float) -> Text:
    return Text(f"{100 * share:+z.2f}%", "green" if share > 0 else "red" if share < 0 else "")


def _day(time: str, at: Moment) -> str:
    """A time of today, a minute of this year, or the day of another one."""
    today = to_text(at.time)
    if time[:10] == today[:10]:
        return time[11:]
    return f"{time[5:10]} {time[11:16]}" if time[:4] == today[:4] else time[:10]


def _cut(text: str, width: int, style: str = "") -> Text:
    return _cut_text(Text(clean(text), style), width)


def _cut_text(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    return text


def _filled(lines: list[Text], height: int) -> list[Text]:
    """So many lines."""
    return [*lines[:height], *(Text() for _ in range(height - len(lines)))]
