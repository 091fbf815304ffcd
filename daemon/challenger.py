"""The training of a challenger: the same in a process of the daemon and in a replay."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from barcast.daemon.panel import TrainingSettings
from barcast.models import Card, Window

if TYPE_CHECKING:
    from barcast.models.ldm4ts.trained import LatentTrained
    from barcast.models.optimiser import Progress
    from barcast.models.trained import Trained

HELD_OUT_SHARE = 0.1
"""Of the newest bars, which a challenger does not learn from: the gate judges on them."""


def train_challenger(
    histories: Mapping[str, Window],
    out: Path,
    timeframe: str,
    champion: Card,
    path: str,
    steps: int | None,
    progress: "Callable[[Progress], None]",
    settings: TrainingSettings | None = None,
) -> "tuple[str, Trained | LatentTrained]":
    """Train on all bars and write the checkpoint `out`; return its id and the model.

    It has the champion's horizons and levels, so that the gate can compare them, and the kind and sizes of
    the model at the champion's `path`, as `open_model` takes it, unless `settings` say others. `steps` are
    those of each phase where these say none, None: from the data. The same call again goes on with one that
    was interrupted. Raise as `barcast.models.training.train` does.
    """
    from barcast.models.checkpoint import check_target, learner_like, save

    out = check_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    state = out.with_name(f".{out.name}.training")
    if settings is None:
        learn, own = learner_like(path), histories
    else:
        learn, steps = _learner(settings), settings.steps or steps
        own = {name: histories[name] for name in settings.symbols} or histories
    trained = learn(
        list(own.values()),
        timeframe=timeframe,
        horizons=champion.horizons,
        levels=champion.levels,
        hold_out=HELD_OUT_SHARE,
        steps=steps,
        state=state,
        progress=progress,
    )
    model = save(trained, out)
    state.unlink(missing_ok=True)
    return model, trained


def _learner(settings: TrainingSettings) -> "Callable[..., Trained | LatentTrained]":
    """`train` of the kind that is wanted, with its options."""
    from barcast.models import training
    from barcast.models.ldm4ts import training as latent

    train = training.train if settings.kind == "sssd" else latent.train
    learn = partial(train, preset=settings.preset, rate=settings.rate, seed=settings.seed)
    if settings.kind == "sssd":
        return learn
    whole = latent.BATCHES["diffusion"]
    return partial(
        learn,
        image=settings.image,
        accumulate=whole // (settings.batch or whole),
        attention=settings.attention or "sdpa",
        checkpoint_gradients=settings.checkpoint_gradients,
    )
