"""Commands that look at models."""

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from barcast.backtest.cli.terminal import HISTORY, app, out

models = typer.Typer(no_args_is_help=True, help="Look at models.")
app.add_typer(models, name="models", rich_help_panel=HISTORY)

TIMEFRAME = "1h"
"""Of the bars for which presets are shown: the number of features follows from it."""


@models.command()
def describe(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint directory; without it the presets are shown.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Say what a model forecasts, what it has learnt from, how large it is and how it is sampled.

    Without one, say how large a network `barcast train --preset` makes.
    """
    from barcast.models import description

    if model is None:
        found = description.presets(TIMEFRAME)
        print(json.dumps({"presets": found})) if as_json else out.print(_presets(found))
        return
    about = description.describe(model)
    if as_json:
        print(json.dumps(about))
        return
    title = f"{about['kind']} {about['model']}"
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, text in _lines(about):
        table.add_row(name, text)
    out.print(table, highlight=False, markup=False)


def _lines(about: dict[str, Any]) -> list[tuple[str, str]]:
    """What is to be said of a model, line by line."""
    symbols = ", ".join(about["symbols"])
    lines = [
        ("forecasts", f"{about['timeframe']} bars over {_listed(about['horizons'])} bars"),
        ("levels", _listed(about["levels"])),
        ("window", f"{about['window']} bars"),
        ("learnt from", f"{about['bars']} bars to {about['learnt_until']}: {symbols}"),
    ]
    if about["known_until"] != about["learnt_until"]:
        lines += [("judged to", about["judged_until"]), ("held out to", about["known_until"])]
    if about["left_out"]:
        lines.append(("left out", ", ".join(about["left_out"])))
    if about["kind"] == "sssd":
        a, chosen = about["architecture"], about["denoiser_step"]
        sizes = (f"{name} {a[name]}" for name in a if name not in ("encoder", "head"))
        lines += [
            ("encoder, head", f"{a['encoder']}, {a['head']}"),
            ("preset", about["preset"] or "none: sizes of its own"),
            ("sizes", ", ".join(sizes)),
            ("parameters", ", ".join(f"{part} {count:,}" for part, count in about["parameters"].items())),
            ("paths", f"{len(about['path'])} steps: {_listed(about['path'])}"),
            ("denoiser", f"of step {chosen}" if chosen else "not used: a Gaussian copula was as good"),
        ]
    if about["kind"] == "lgbm":
        lines.append(("trees", str(about["trees"])))
    if about["kind"] == "ensemble":
        for member in about["members"]:
            shares = ", ".join(f"{weight:.2f}" for weight in member["weights"])
            lines.append((f"member {member['name']}", f"weights {shares}"))
    return [
        *lines,
        ("by default", _sampled(about)),
        ("size", f"{about['megabytes']:.2f} MB"),
        ("learnt on", about["learnt_on"]),
        ("here", about["fingerprint"]),
    ]


def _sampled(about: dict[str, Any]) -> str:
    """What is sampled of a model that no option says more of."""
    if about["kind"] != "sssd":
        return "nothing is sampled"
    how = about["coupling"]
    by = "a Gaussian copula"
    if how["sampler"] != "none":
        by = f"the diffusion model: {how['sampler']}, {how['steps']} steps, {how['samples']} samples"
    return f"quantiles by the map, not sampled; paths by {by}"


def _presets(found: list[dict[str, Any]]) -> Table:
    first = found[0]
    features = first["architecture"]["features"]
    default = next(row["preset"] for row in found if row["default"])
    horizons = _listed(first["horizons"])
    bars = f"{first['timeframe']} bars: {features} features, horizons {horizons}"
    title = f"Presets, for {bars}; by default {default}"
    table = Table(title=title, title_justify="left", box=None)
    parts = list(first["parameters"])
    for name in ("preset", "encoder", "head"):
        table.add_column(name)
    for name in (*parts, "MB"):
        table.add_column(name, justify="right")
    for row in found:
        a = row["architecture"]
        counts = (f"{row['parameters'][part]:,}" for part in parts)
        table.add_row(row["preset"], a["encoder"], a["head"], *counts, f"{row['megabytes']:.1f}")
    return table


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
