"""The command that looks for look-ahead, and for what strategies keep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from barcast.backtest.cli.quants import check_given, settings_of
from barcast.backtest.cli.terminal import (
    HISTORY,
    Adjustments,
    CalendarOf,
    ConfigOf,
    Files,
    OtherCalendars,
    Retraining,
    RetrainSteps,
    Sampler,
    Since,
    Stamped,
    Steps,
    Strategies,
    Symbols,
    Tested,
    Timeframe,
    Touch,
    TrainingTime,
    Until,
    app,
    check_output,
    err,
    in_folder,
    moment,
    out,
    progressing,
    wide,
)

if TYPE_CHECKING:
    from barcast.backtest.audit import Audit, Violation, Warmup

NAME = "audit.json"
"""The file in the folder of an audit."""

SHOWN = 12
"""Lines of what changed that the table has; the file has more."""


@app.command(rich_help_panel=HISTORY)
def audit(
    files: Files,
    stamp: Stamped,
    config: ConfigOf = None,
    model: Tested = None,
    timeframe: Timeframe = None,
    calendar: CalendarOf = None,
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    strategy: Strategies = None,
    symbol: Symbols = None,
    since: Since = None,
    until: Until = None,
    sampler: Sampler = None,
    steps: Steps = None,
    touch: Touch = None,
    retrain: Retraining = None,
    retrain_steps: RetrainSteps = None,
    training_time: TrainingTime = None,
    cuts: Annotated[
        int, typer.Option(help="Closes at which the bars end, or are poisoned from there on.", min=1)
    ] = 12,
    seed: Annotated[int, typer.Option(help="Draws the cuts and the poison.", min=0)] = 1,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help=f"Folder to write {NAME} to, with everything that was found.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print that file, and no tables.")] = False,
) -> None:
    """Look for look-ahead: backtest again without the bars after a cut, and with poisoned ones there.

    Nothing up to a cut may change; the exit status is 1 if anything does. A strategy's parameter that is the
    path of one of the files is given the cut copy. Nor may signals and targets change when the test begins
    later, or targets when a strategy is made anew, as they do where it keeps a state. Also tells how far back
    signals look, and what is wrong with the bars.
    """
    given = {
        "model": model,
        "timeframe": timeframe,
        "calendar": calendar,
        "symbol-calendar": symbol_calendar,
        "strategy": strategy,
        "symbol": symbol,
        "sampler": sampler,
        "steps": steps,
        "touch": touch,
        "retrain": retrain,
        "retrain-steps": retrain_steps,
        "training-time": training_time,
    }
    check_given(config, given)
    file = None if out_dir is None else out_dir / NAME
    if out_dir is not None and file is not None:
        if out_dir.exists() and not out_dir.is_dir():
            raise typer.BadParameter(f"{out_dir} is a file: name a folder", param_hint="--out")
        check_output("--out", file, [*files, *([adjustments] if adjustments else [])], "folder")
    from barcast.backtest.audit import audit_backtest
    from barcast.daemon.adjustments import read_adjustments

    settings = settings_of(files, stamp, config, given)
    with progressing("auditing", None) as advance:
        found = audit_backtest(
            files,
            stamp=stamp.value,
            cuts=cuts,
            seed=seed,
            progress=advance,
            **settings,
            adjustments=read_adjustments(adjustments) if adjustments else (),
            since=moment(since),
            until=moment(until),
        )
    if as_json:
        typer.echo(found.json())
    else:
        _print(found, settings["retrain"] is not None)
    if out_dir is not None and file is not None:
        with in_folder("--out", out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
            file.write_text(found.json() + "\n", encoding="utf-8")
        if not as_json:
            out.print(f"everything that was found: {file.absolute()}", soft_wrap=True)
    if not found.passed:
        raise typer.Exit(1)


def _print(found: "Audit", retrained: bool) -> None:
    """The bars, how far back signals look unless models were retrained, what changed, and the verdict."""
    from barcast.backtest.audit import KEEPING
    from barcast.daemon.calendar import iso

    console = wide()
    console.print(_bars(found.data))
    if found.data["other_end"]:
        other = {"open": "close", "close": "open"}[found.data["stamp"]]
        _say(
            "By the calendar the times may be "
            f"the {found.data['stamp']} of bars, as was said, or their {other}."
        )
    for sentence in filter(None, (found.data["warning"], *found.unseen)):
        err.print(sentence, style="yellow", markup=False)
    if found.warmup is not None:
        console.print(_back(found.warmup))
        far = found.warmup
        said = f"From {far.settled} bars on nothing changes any more; the model says {far.window}"
        if far.settled == far.most:
            said = f"Even the oldest of {far.most} bars counts; the model says that it looks at {far.window}"
        if far.settled > far.window:
            said += ", and looks farther back than that"
        remedy = ": give more bars before --since" if far.first < min(far.settled, far.window) else ""
        _say(f"{said}. The first signals have {far.first} behind them{remedy}.")
    elif retrained:
        _say("Later starts, and how far back signals look, are not tried: trainings depend on both.")
    elif not found.passed:
        _say("How far back signals look is not tried, as a run failed, or signals changed: mend that first.")
    failures = {
        "cut": "on the bars up to a cut failed",
        "poison": "with poisoned bars failed",
        "start": "that begin later failed",
        "anew": "that ask strategies anew failed",
    }
    for check, which in failures.items():
        ended = [trial for trial in found.trials if trial.ended and trial.check == check]
        if ended:
            proves = ", which proves nothing" if check == "poison" else ""
            first = f"the first at {iso(ended[0].cut)}: {ended[0].ended}"
            _say(f"{len(ended)} runs {which}{proves}; {first}")
    if ahead := _first(found, ("cut", "poison", "repeat")):
        console.print(_ahead(ahead, len(found.cuts)))
    if kept := _first(found, KEEPING):
        console.print(_kept(kept, len(found.starts), len(found.asked)))
    _verdict(found)


def _verdict(found: "Audit") -> None:
    """The last line."""
    from barcast.backtest.audit import KEEPING

    begun = [trial for trial in found.trials if trial.check in KEEPING]
    others = [trial for trial in found.trials if trial.check not in KEEPING]
    values, differ = (sum(getattr(trial, name) for trial in others) for name in ("values", "differ"))
    later, moved = (sum(getattr(trial, name) for trial in begun) for name in ("values", "differ"))
    runs = f"({len(found.trials)} runs, seed {found.seed})"
    cuts = f"{len(found.cuts)} cut{'s' * (len(found.cuts) > 1)}"
    starts = f"from {len(found.starts)} later start{'s' * (len(found.starts) > 1)} on" if found.starts else ""
    anew = f"at {len(found.asked)} closes asked anew" if found.asked else ""
    kept = " and ".join(filter(None, (starts, anew)))
    if found.passed:
        far = ", as far as what the strategies are given could be cut" if found.unseen else ""
        same = f", and {later:,} {kept}" if begun else ""
        _say(
            f"passes{far}: {values:,} values up to {cuts} are the same to the bit, whatever comes "
            f"after them{same} {runs}",
            "green",
        )
        return
    if not found.cuts:
        _say(f"fails: {differ:,} of {values:,} values are others when the very same run is repeated", "red")
        return
    said = []
    failed, broken = (
        sum(bool(t.ended) and t.check in checks for t in found.trials) for checks in (("cut",), KEEPING)
    )
    if differ or failed:
        said.append(f"{differ:,} of {values:,} values up to {cuts} depend on what comes after them")
    if failed:
        said.append(f"{failed} runs fail without it")
    if moved or broken:
        said.append(f"{moved:,} of {later:,} values {kept} depend on what was asked before")
    if broken:
        said.append(f"{broken} of the later runs fail")
    _say(f"fails: {', and '.join(said)} {runs}", "red")


def _say(sentence: str, style: str | None = None) -> None:
    out.print(sentence, style=style, highlight=False, markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    """A table of texts at the left and figures at the right."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in columns:
        left = name in ("symbol", "what", "strategy", "field")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    return table


def _bars(data: Mapping[str, Any]) -> Table:
    table = _table(
        f"bars of {data['timeframe']}, calendar {data['calendar']}",
        *(
            "symbol",
            "bars",
            "from",
            "to",
            "missing",
            "most at once",
            "twice",
            "unsorted",
            "jumps",
            "no volume",
        ),
    )
    for row in data["symbols"]:
        hole = f"{row['largest_hole']} after {row['hole_after'][:10]}" if row["hole_after"] else "-"
        counts = (row[name] for name in ("doubled", "out_of_order", "jumps", "without_volume"))
        dates = row["first"][:10], row["last"][:10]
        table.add_row(row["symbol"], str(row["bars"]), *dates, str(row["missing"]), hole, *map(str, counts))
    return table


def _back(warmup: "Warmup") -> Table:
    table = _table("signals of fewer bars", "bars", "the same", "not made", "off by, deviations")
    for reach in warmup.tried:
        off = "-" if reach.distance is None else f"{reach.distance:.2g}"
        table.add_row(str(reach.bars), f"{reach.same} of {reach.signals}", str(reach.lacking), off)
    return table


def _first(found: "Audit", checks: Sequence[str]) -> "dict[str | None, list[Violation]]":
    """Of each strategy what these checks found to change first of all, as the rest follows from it."""
    from barcast.backtest.audit import FRAMES

    order = {frame: n for n, frame in enumerate(FRAMES)}
    groups: dict[str | None, list[Violation]] = {}
    changed = [one for one in found.violations if one.frame != "run" and one.check in checks]
    for one in sorted(changed, key=lambda one: order.get(one.frame, -1)):
        own = groups.setdefault(one.strategy, [])
        if not own or own[0].frame == one.frame:
            own.append(one)
    return dict([*groups.items()][:SHOWN])


def _ahead(groups: "Mapping[str | None, list[Violation]]", count: int) -> Table:
    """What depends on what comes after one of so many cuts, and the change farthest back."""
    table = _table(
        "what depends on bars after a cut: at how many cuts, how many bars ahead, and the farthest",
        *("strategy", "what", "cut", "poisoned", "ahead", "symbol", "close", "field", "whole", "other"),
    )
    for strategy, own in groups.items():
        cuts = [len({one.cut for one in own if one.check == check}) for check in ("cut", "poison")]
        first = max(own, key=lambda one: one.ahead)
        table.add_row(
            strategy or "-",
            first.frame,
            *(f"{at}/{count}" for at in cuts),
            f"{first.ahead}+" if first.ahead else "-",
            *_place(first),
        )
    return table


def _kept(groups: "Mapping[str | None, list[Violation]]", starts: int, asked: int) -> Table:
    """What depends on what was asked before: at how many starts and closes, and the first change."""
    table = _table(
        "what depends on what was asked before, as a state does: at how many later starts, at how many "
        "closes where it was made anew, and the first",
        *("strategy", "what", "start", "anew", "symbol", "close", "field", "whole", "other"),
    )
    for strategy, own in groups.items():
        first = min(own, key=lambda one: one.close_time)
        at = [len({one.cut for one in own if one.check == check}) for check in ("start", "anew")]
        counts = (f"{at[0]}/{starts}", f"{at[1]}/{asked}")
        table.add_row(strategy or "-", first.frame, *counts, *_place(first))
    return table


def _place(one: "Violation") -> tuple[str, ...]:
    """Symbol, close, field and both values."""
    from barcast.daemon.calendar import iso

    field = one.field if one.horizon is None else f"{one.field} +{one.horizon}"
    return one.symbol or "-", iso(one.close_time)[:16], field, _value(one.whole), _value(one.other)


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
