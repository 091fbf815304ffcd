"""Commands that look at models, and at what computes them here."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from barcast.backtest.cli.terminal import HISTORY, app, out, wide

if TYPE_CHECKING:
    from barcast.models.ldm4ts.memory import Recommended

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


@app.command(rich_help_panel=HISTORY)
def backends(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, for scripts.")] = False,
) -> None:
    """Say what can compute the attention of an LDM4TS on this machine, and what is missing."""
    from barcast.models.ldm4ts.attention import UNTESTED, probe

    found = probe()
    if as_json:
        print(json.dumps([{**asdict(each), "line": each.line()} for each in found]))
        return
    table = Table(box=None)
    for name in ("backend", "usable", "training", "computes in", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for each in found:
        name = each.name if each.tested else f"{each.name} ({UNTESTED})"
        marks = ("yes" if each.usable else "no", "yes" if each.training else "no")
        table.add_row(name, *marks, ", ".join(each.dtypes), each.why, each.remedy)
    wide().print(table, highlight=False, markup=False)


@app.command(rich_help_panel=HISTORY)
def vram(
    batch: Annotated[int | None, typer.Option(help="Images of a batch. \\[default: 4]")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of a side: 64, 128, 224 or 256. \\[default: 64]")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the condition of each image.")] = 100,
    sampling: Annotated[bool, typer.Option("--sampling", help="Calls without gradients.")] = False,
    part: Annotated[
        str | None, typer.Option(help="unet or autoencoder; default: the one that takes more.")
    ] = None,
    budget_gb: Annotated[
        float | None, typer.Option(help="Also the largest batch for so many units of 10^9 bytes.")
    ] = None,
    recommended: Annotated[
        bool, typer.Option("--recommend", help="How to train in 6, 8, 12 and 16 GB, or in --budget-gb.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, for scripts.")] = False,
) -> None:
    """Estimate what training or sampling an LDM4TS takes in memory, by attention backend and checkpointing.

    It is for the preset small and the autoencoder that is trained. What a GPU's context and libraries take
    comes on top.
    """
    from barcast.models.ldm4ts import memory

    if recommended:
        if sampling or part or batch is not None or image_size is not None:
            raise typer.BadParameter(
                "it is for training, and names batch and image size itself: leave the others out",
                param_hint="--recommend",
            )
        budgets = memory.BUDGETS if budget_gb is None else (budget_gb,)
        ways = list(memory.recommend(budgets, tokens))
        print(json.dumps([asdict(each) for each in ways])) if as_json else out.print(_ways(ways))
        return
    batch, image_size = 4 if batch is None else batch, 64 if image_size is None else image_size
    found = []
    for backend in ("sdpa", "flash"):
        for checkpointing in (False,) if sampling else (False, True):
            how = (tokens, image_size, backend, checkpointing, not sampling, part)
            row: dict[str, Any] = dict(memory.estimate_vram_usage(batch, *how))
            if budget_gb is not None:
                row["largest_batch"] = memory.largest_batch(budget_gb, *how)
            found.append(row)
    print(json.dumps(found)) if as_json else out.print(_usage(found, image_size, sampling))


def _usage(found: list[dict[str, Any]], image: int, sampling: bool) -> Table:
    doing = "Sampling" if sampling else "Training"
    title = f"{doing}, {found[0]['batch_size']} images of {image} pixels, GB at the peak"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("attention")
    table.add_column("checkpointing")
    for name in ("model", "activations", "all", "saved"):
        table.add_column(name, justify="right")
    if "largest_batch" in found[0]:
        table.add_column("largest batch", justify="right")
    for row in found:
        sizes = (row[f"{name}_gb"] for name in ("base_model", "activation_memory", "total_estimated"))
        most = [f"{row['largest_batch']:,}"] if "largest_batch" in row else []
        checkpointing = "yes" if row["gradient_checkpointing"] else "no"
        saved = f"{row['savings_vs_default_pct']:.0f} %"
        table.add_row(row["backend"], checkpointing, *(f"{each:.3f}" for each in sizes), saved, *most)
    return table


def _ways(ways: "list[Recommended]") -> Table:
    table = Table(title="Training within a budget", title_justify="left", box=None)
    table.add_column("attention")
    table.add_column("checkpointing")
    for name in ("GB", "pixels", "batch", "takes GB"):
        table.add_column(name, justify="right")
    for each in ways:
        checkpointing = "yes" if each.gradient_checkpointing else "no"
        numbers = (f"{each.budget_gb:g}", str(each.image_size), str(each.batch_size))
        table.add_row(each.backend, checkpointing, *numbers, f"{each.total_estimated_gb:.1f}")
    return table


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
    if about["kind"] == "ldm4ts":
        sizes = (f"{name} {value}" for name, value in about["architecture"].items())
        lines += [
            ("preset", about["preset"] or "none: sizes of its own"),
            ("sizes", ", ".join(sizes)),
            ("parameters", ", ".join(f"{part} {count:,}" for part, count in about["parameters"].items())),
            ("paths", f"{len(about['path'])} steps: {_listed(about['path'])}"),
            ("autoencoder", "given, and left as it was" if about["architecture"]["given"] else "trained"),
            ("text", about["text"] or "none"),
            ("latents", f"of the deviation {about['latent_spread']:.3f}, measured"),
            ("diffusion", f"of step {about['denoiser_step']}"),
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
    if about["kind"] == "ldm4ts":
        return f"{about['samples']} paths by {about['sampler']} in {about['steps']} steps"
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
