"""Training on the command line: with progress, and with what was chosen."""

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from barcast.backtest.cli.terminal import (
    HISTORY,
    Adjustments,
    CalendarName,
    Files,
    OtherCalendars,
    Stamped,
    Symbols,
    Timeframe,
    Until,
    app,
    calendars_of,
    err,
    found_timeframe,
    histories_of,
    in_folder,
    interruptible,
    progressing,
    tell,
)
from barcast.models import LEVELS, ConfigError, DataError, default_horizons

if TYPE_CHECKING:
    from barcast.daemon.calendar import Calendars
    from barcast.models import Window
    from barcast.models.optimiser import Progress as Stand
    from barcast.models.trained import Model

HELD_OUT = 1000
"""How many forecasts a new model is shown beside the baselines on, about."""


class Kind(StrEnum):
    """What is trained."""

    sssd = "sssd"
    ldm4ts = "ldm4ts"
    lgbm = "lgbm"
    ensemble = "ensemble"


DIFFUSED = (Kind.sssd, Kind.ldm4ts)
"""What is trained step by step, and can go on after an interruption."""


class Preset(StrEnum):
    """How large a network is trained: the names of `barcast.models.sssd.layers.PRESETS`."""

    tiny = "tiny"
    small = "small"
    base = "base"


class Precision(StrEnum):
    """In which numbers the losses of a training are computed."""

    fp32 = "fp32"
    bf16 = "bf16"


@app.command(rich_help_panel=HISTORY)
def train(
    files: Files,
    stamp: Stamped,
    out_dir: Annotated[
        Path,
        typer.Option("--out", help="Directory for the checkpoint; one that is there must be a checkpoint."),
    ],
    timeframe: Timeframe = None,
    calendar: CalendarName = "24x7",
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    symbol: Symbols = None,
    until: Until = None,
    horizon: Annotated[
        list[int] | None,
        typer.Option(
            help="Bars ahead; may be repeated. Default: 1, 5, 20 from a day on, else 1, 4, 16; of an "
            "ensemble, those of its first checkpoint."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps of each phase; default: from the data.", min=1)
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Cap on the training, shared evenly by its phases; that it was hit is recorded.", min=0
        ),
    ] = None,
    init_from: Annotated[Path | None, typer.Option(help="Begin from this checkpoint's weights.")] = None,
    hold_out: Annotated[
        float,
        typer.Option(help="Share of the newest bars that are not learnt from, to judge on.", min=0, max=0.5),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers of all but ensembles.")] = 0,
    kind: Annotated[
        Kind,
        typer.Option(
            help="sssd, the diffusion model; ldm4ts, latent diffusion over images (needs the extra hub); "
            "lgbm, boosted trees (needs the extra baselines); or ensemble."
        ),
    ] = Kind.sssd,
    member: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL", help="Of an ensemble: a baseline or a checkpoint directory; to be repeated."
        ),
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(
            help="Sizes of the network, see barcast models describe; default: small, or as --init-from."
        ),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="Numbers of the losses; bf16 pays only where the processor is built for it."),
    ] = Precision.fp32,
    accumulate: Annotated[
        int, typer.Option(help="Parts in which a batch is computed, one after another.", min=1)
    ] = 1,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Highest rate of learning in the phase of the diffusion. \\[default: 0.001]", min=1e-6, max=1
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Pixels of a side of an ldm4ts's images: 64, 128, 224 or 256. \\[default: 64]"),
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a Stable Diffusion autoencoder (config.json, safetensors) that an ldm4ts uses "
            "as it is; without it a small one is trained."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a BERT or CLIP text model (with tokenizer, safetensors; needs the extra "
            "text) that tells an ldm4ts of a sentence on each window."
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="What computes the attention of an ldm4ts while it learns, see barcast backends; auto takes "
            "the best. \\[default: default]"
        ),
    ] = None,
    checkpoint_gradients: Annotated[
        bool,
        typer.Option(
            "--checkpoint-gradients",
            help="Keep the inputs of an ldm4ts's blocks alone and compute the rest again: less memory, more "
            "time.",
        ),
    ] = False,
) -> None:
    """Train a model on bars closed before --until and write a checkpoint.

    An ensemble averages the quantiles of its members, with weights for each horizon that the validation part
    of the bars chose; it holds copies of members that are checkpoints. --steps, --minutes, --rate,
    --preset, --precision and --accumulate go with sssd and ldm4ts alone, --init-from with sssd; --image-size,
    --vae, --text, --attention and --checkpoint-gradients with ldm4ts.

    The same command again goes on with a training that was interrupted. Several processes share a training
    under `torchrun --standalone --nproc_per_node N -m barcast.backtest.cli train ...`.
    """
    wrong: dict[str, object] = {"--seed": seed} if kind == Kind.ensemble else {"--member": member}
    if kind not in DIFFUSED:
        wrong |= {"--steps": steps, "--minutes": minutes, "--preset": preset, "--rate": rate}
        wrong |= {"--precision": precision != Precision.fp32, "--accumulate": accumulate > 1}
    wrong |= {"--init-from": init_from} if kind != Kind.sssd else {}
    if kind != Kind.ldm4ts:
        wrong |= {"--image-size": image_size is not None, "--vae": vae, "--text": text}
        wrong |= {"--attention": attention, "--checkpoint-gradients": checkpoint_gradients}
    for option, given in wrong.items():
        if given:
            raise typer.BadParameter(f"{option} does not go with --kind {kind}: leave it out")
    if kind == Kind.ensemble and len(set(member or ())) < 2:
        raise typer.BadParameter(
            "an ensemble has two members or more: give --member twice, such as --member fhs --member ewma"
        )
    timeframe = timeframe or found_timeframe(files, stamp, calendar, symbol)
    closes = calendars_of(calendar, symbol_calendar, timeframe)
    from barcast.models.checkpoint import check_target

    try:
        out_dir = check_target(out_dir)
        out_dir.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {error}; name a directory that you may write") from error
    with (
        _alone(out_dir, kind in DIFFUSED) as speaks,
        interruptible(lambda: _left(out_dir)),
        histories_of(files, stamp, closes, symbol, until, adjustments, out_dir.parent) as histories,
    ):
        if speaks:
            _warn(histories, closes)
        written = _train(
            histories,
            out_dir,
            timeframe,
            kind=kind,
            members=member or (),
            horizons=tuple(horizon) if horizon else None,
            steps=steps,
            minutes=minutes,
            init_from=init_from,
            hold_out=hold_out,
            seed=seed,
            preset=preset,
            precision=precision,
            accumulate=accumulate,
            rate=rate,
            latent_options={
                "image": image_size,
                "vae": vae,
                "text": text,
                "attention": attention or "default",
                "checkpoint_gradients": checkpoint_gradients,
            },
        )
        if written and hold_out:
            _print_held_out(histories, out_dir, timeframe)
    if kind in DIFFUSED:
        from barcast.models import optimiser

        optimiser.leave()


@app.command(rich_help_panel=HISTORY)
def train_stress(
    files: Files,
    stamp: Stamped,
    out_dir: Annotated[
        Path,
        typer.Option("--out", help="Directory for the generator; one that is there must hold a model."),
    ],
    timeframe: Timeframe = None,
    calendar: CalendarName = "24x7",
    symbol_calendar: OtherCalendars = None,
    adjustments: Adjustments = None,
    symbol: Symbols = None,
    until: Until = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file of the training: steps, batch, cfg_scale and others; see the README."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Cap on the training, half for each phase; that it was hit is recorded.", min=0),
    ] = None,
    hold_out: Annotated[
        float, typer.Option(help="Share of the newest bars that are left alone.", min=0, max=0.5)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
) -> None:
    """Train a generator of stress scenarios on bars closed before --until.

    It brings bars into the texture of another regime: calm, trend, volatile or crisis. What it makes up is a
    scenario, not a forecast, and no model that forecasts. The same command again goes on with a training that
    was interrupted.
    """
    from barcast.models.checkpoint import check_target
    from barcast.models.transfer.config import TransferConfig

    settings = TransferConfig() if config is None else TransferConfig.load(config)
    timeframe = timeframe or found_timeframe(files, stamp, calendar, symbol)
    closes = calendars_of(calendar, symbol_calendar, timeframe)
    with in_folder("--out", out_dir.parent):
        out_dir = check_target(out_dir)
        out_dir.parent.mkdir(parents=True, exist_ok=True)
    with (
        _alone(out_dir, False),
        interruptible(lambda: _left(out_dir)),
        histories_of(files, stamp, closes, symbol, until, adjustments, out_dir.parent) as histories,
        epochs() as stand,
    ):
        from barcast.models.transfer import REGIMES, save_generator, train

        _warn(histories, closes)
        trained = train(
            histories.values(),
            timeframe=timeframe,
            config=settings,
            hold_out=hold_out,
            seed=seed,
            seconds=None if minutes is None else 60 * minutes,
            clock=time.monotonic,
            state=_state(out_dir),
            progress=stand,
        )
        model = save_generator(trained, out_dir)
        _state(out_dir).unlink(missing_ok=True)
    kept, record = trained.config, trained.record
    tell("windows: " + ", ".join(f"{n} {name}" for name, n in zip(REGIMES, record.windows, strict=True)))
    tell(f"chosen by validation: step {record.flow_step} of {kept.steps}, {record.energy_step} of energies")
    tell(f"stress generator {model} written to {out_dir}")


@contextmanager
def _alone(out_dir: Path, shared: bool) -> Iterator[bool]:
    """Hold a model's directory: a second training would write over the state of the first.

    Of processes that share a training the main one holds it and speaks: it has True. The lock file goes with
    the training.
    """
    if shared:
        from barcast.models import optimiser

        if not optimiser.is_main():
            yield False
            return
    path = out_dir.with_name(f".{out_dir.name}.lock")
    with in_folder("--out", out_dir.parent):
        file = path.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"--out: another training of {out_dir} is at work; wait for it, or name another directory"
            ) from error
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def _warn(histories: "Mapping[str, Window]", calendars: "Calendars") -> None:
    """Say what may mislead a training, as a backtest of these bars would."""
    from barcast.backtest import caveats
    from barcast.daemon.pipeline import MAX_JUMP

    for sentence in (
        *caveats.of_jumps(caveats.jumps(histories, 0, 0, MAX_JUMP), caveats.LEARNT),
        *caveats.of_missing(histories, calendars),
        *caveats.of_ends(histories, 0, calendars, caveats.UNSEEN),
    ):
        err.print(sentence, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _left(out_dir: Path) -> str:
    """What is left of a training that a person ends."""
    return "the same command goes on with it" if _state(out_dir).exists() else "nothing of it is kept"


def _state(out_dir: Path) -> Path:
    """The file of a training that is not over."""
    return out_dir.with_name(f".{out_dir.name}.training")


def _train(
    histories: "Mapping[str, Window]",
    out_dir: Path,
    timeframe: str,
    *,
    kind: Kind,
    members: Sequence[str],
    horizons: tuple[int, ...] | None,
    steps: int | None,
    minutes: float | None,
    init_from: Path | None,
    hold_out: float,
    seed: int,
    preset: str | None,
    precision: str,
    accumulate: int,
    rate: float | None,
    latent_options: Mapping[str, Any],
) -> bool:
    """Train, or go on with what was interrupted, and write the model; False in processes that only help."""
    from barcast.models import ensemble, gbm, optimiser, training
    from barcast.models.checkpoint import load, open_member, save
    from barcast.models.ldm4ts import training as latent
    from barcast.models.trained import Trained

    start = None
    if init_from:
        first = load(init_from)
        if not isinstance(first.trained, Trained):
            raise ConfigError(f"--init-from: {init_from} is no sssd; name one, or train from scratch")
        start = first.model, first.trained
    bars = histories.values()
    outputs: dict[str, Any] = {"timeframe": timeframe, "horizons": horizons or default_horizons(timeframe)}
    outputs |= {"levels": LEVELS, "hold_out": hold_out}
    trained: Model
    state = _state(out_dir)
    if kind in DIFFUSED:
        seconds = None if minutes is None else 60 * minutes
        outputs |= {"steps": steps, "seconds": seconds, "clock": time.monotonic, "seed": seed, "state": state}
        outputs |= {"precision": precision, "accumulate": accumulate, "rate": rate}
        with epochs() as stand:
            if kind == Kind.sssd:
                trained = training.train(bars, **outputs, init_from=start, preset=preset, progress=stand)
            else:
                trained = latent.train(bars, **outputs, **latent_options, preset=preset, progress=stand)
        if not optimiser.is_main():
            return False
    else:
        with progressing("training", None) as advance:

            def say(text: str) -> None:
                advance(0, text)

            if kind == Kind.ensemble:
                opened = [open_member(name) for name in members]
                known = next((m.trained for m in opened if m.trained is not None), None)
                if horizons is None and known is not None:
                    outputs["horizons"] = known.forecaster("", None, None, False).card.horizons
                trained = ensemble.train(bars, opened, **outputs, progress=say)
            else:
                trained = gbm.train(bars, **outputs, seed=seed, progress=say)
    model = save(trained, out_dir)
    state.unlink(missing_ok=True)
    tell_model(model, trained, out_dir)
    return True


def tell_model(model: str, trained: "Model", out_dir: Path) -> None:
    """Say which model was written, what was left out of its training, and what was chosen."""
    from barcast.models.ensemble import Ensemble
    from barcast.models.ldm4ts.trained import LatentTrained
    from barcast.models.trained import Trained

    if left_out := ", ".join(trained.record.left_out):
        tell(f"left out, as too short or standing still: {left_out}")
    if isinstance(trained, Ensemble):
        for line in trained.sentences():
            tell(line)
    if isinstance(trained, Trained):
        step = trained.record.denoiser_step
        added = f"the diffusion of step {step}" if step else "a Gaussian copula, step 0 of diffusion"
        tell(f"chosen by validation, for the steps of paths: {added}")
    if isinstance(trained, LatentTrained):
        tell(f"chosen by validation: the diffusion of step {trained.record.denoiser_step}")
    tell(f"model {model} written to {out_dir}")


@contextmanager
def epochs() -> "Iterator[Callable[[Stand], None]]":
    """Show a training: a bar with the time left on a terminal, a log line for each epoch elsewhere."""
    if err.is_terminal:
        columns = (BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=err, transient=True) as bar:
            task, crps = bar.add_task("training", total=None), ""

            def show(p: "Stand") -> None:
                nonlocal crps
                if p.note:
                    err.print(p.note, markup=False, soft_wrap=True)
                crps = crps if p.crps is None else f" crps {p.crps:.4f}"
                loss = "" if p.loss is None else f" loss {p.loss:.4f}"
                text = f"{p.phase} {p.step}/{p.steps}{loss}{crps}"
                bar.update(task, total=p.total, completed=p.done, description=text)

            yield show
        return
    import structlog

    from barcast.daemon import log

    log.configure()
    logger = structlog.get_logger()

    def line(p: "Stand") -> None:
        if p.note:
            logger.info("training", note=p.note)
        if p.crps is not None:
            stand = {"phase": p.phase, "step": p.step, "steps": p.steps, "done": p.done, "total": p.total}
            logger.info("epoch", **stand, loss=p.loss, crps=p.crps)

    yield line


def _print_held_out(histories: "Mapping[str, Window]", model: Path, timeframe: str) -> None:
    """Show how a new model does beside the baselines on the bars that its training left for the gate."""
    from barcast.daemon.wire import to_text
    from barcast.models import BASELINES, compare, even_stride
    from barcast.models.checkpoint import costly, load
    from barcast.models.evaluation import COSTLY_BARS, newest

    checkpoint = load(model)
    mine, record = checkpoint.forecaster(), checkpoint.trained.record
    since = record.validation_end
    if costly(checkpoint.trained):
        since = max(since, newest(histories.values(), COSTLY_BARS, max(mine.card.horizons)))
    others = [BASELINES[name](timeframe, mine.card.horizons, mine.card.levels) for name in ("hs", "fhs")]
    held_out = sum(int((w.close_times >= since).sum()) for w in histories.values())
    try:
        scores = compare(
            [mine, *others],
            histories.values(),
            since=since,
            until=record.until,
            stride=even_stride(held_out, HELD_OUT),
        )
    except DataError as error:
        err.print(f"no score on held-out bars: {error}")
        return
    period = f"{to_text(since)[:10]} to {to_text(record.until)[:10]}"
    table = Table(
        title=f"CRPS in bp on {scores[0].n} held-out forecasts, {period}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("model")
    for h in mine.card.horizons:
        table.add_column(f"+{h}", justify="right")
        table.add_column("in 90 %", justify="right")
    for score in scores:
        cells = []
        for h in range(len(score.horizons)):
            inside = score.coverage[h, score.intervals.index(0.9)] if 0.9 in score.intervals else float("nan")
            cells += [f"{1e4 * score.crps[h]:.2f}", f"{100 * inside:.1f} %"]
        table.add_row(score.model, *cells)
    err.print(table)
