"""Every forecaster by its name: the baselines, which need no files, and the directories of trained models."""

import json
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from barcast.models.baselines import FilteredHistoricalSimulation, HistoricalSimulation
from barcast.models.errors import CheckpointError, ConfigError
from barcast.models.fitted import Scaled
from barcast.models.forecast import LEVELS, Card, Forecaster, default_horizons
from barcast.models.garch import Garch

BASELINES: dict[str, Callable[[str, Sequence[int], Sequence[float]], Forecaster]] = {
    "hs": HistoricalSimulation,
    "fhs": FilteredHistoricalSimulation,
    **{name: partial(Scaled, name) for name in ("ewma", "har", "hs-s", "fhs-s", "ewma-s", "har-s")},
    **{name: partial(Garch, name) for name in ("garch", "garch-s")},
}
"""The forecasters that are not trained, of a timeframe, horizons and levels; -s with a time-of-week factor.

All raise `ConfigError` where they cannot serve: -s on daily bars, GARCH without the package arch.
"""


SAMPLERS: dict[str, int] = {
    "angle": 1,
    "ddim": 2,
    "ddpm": 2,
    "deis": 2,
    "dpmpp": 2,
    "dpmpp3": 3,  # predictions for its order
    "euler": 2,
    "kdpm2": 3,  # two let it leap from the first noise level to the last: errors of nine deviations
    "unipc": 2,
}
"""The samplers of diffusion models, and the fewest steps of each."""

MOST_STEPS = 400

SAMPLER, STEPS = "dpmpp", 8
"""What samples where nothing is said."""

REFUSED: dict[str, str] = {
    "euler_a": "it is ddpm in other letters: from the same draws both make the same samples within 0.0002 "
    "deviations; take ddpm",
    "heun": "its error with 19 evaluations is 7.4 times that of dpmpp with 20; take dpmpp",
    "lms": "its error with 8 evaluations is 2.8 times that of dpmpp; take dpmpp",
    "pndm": "it needs evenly spaced timesteps: its error with 21 evaluations is 7.1 times that of dpmpp with "
    "20; take dpmpp",
    "karras": "on these noise levels the error of dpmpp with 8 evaluations is 1.8 times that on its own; "
    "take dpmpp",
    "exponential": "these are the noise levels of every sampler here: the error of dpmpp with 20 evaluations "
    "is 1.0 times that on its own; take dpmpp",
    "beta": "on these noise levels the error of dpmpp with 20 evaluations is 26 times that on its own; "
    "take dpmpp",
}
"""Names that a user may know from elsewhere, and why there is no such sampler.

An error is the Wasserstein distance from four mixtures of normals in deviations, their mean;
`tests/models/test_samplers.py` measures each.
"""


TRANSFER = "transfer"
"""The kind of a stress generator, which is no forecaster."""

FORMAT = 3
"""That of a checkpoint's `JSON`."""
JSON = "model.json"
MOST_JSON = 500_000_000
"""Bytes of a `JSON` that are read, at most: a thousand symbols of a season each take some 20 million."""


def read(path: Path, most: int) -> bytes:
    """The contents of a checkpoint's file of at most so many bytes. Raise `CheckpointError` for any other."""
    try:
        if (size := path.stat().st_size) > most:
            raise CheckpointError(
                f"{path}: has {size} bytes, more than the {most} that a model may have; check the path"
            )
        return path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror}); check the path of the model") from e


def header(directory: Path) -> dict[str, Any]:
    """What is said of a checkpoint in plain text. Raise `CheckpointError` where there is none of `FORMAT`."""
    path = directory / JSON
    content = read(path, MOST_JSON)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON ({e}); copy the directory again") from e
    if not isinstance(body, dict):
        raise CheckpointError(
            f"{path}: holds a {type(body).__name__}, not an object; copy the directory again"
        )
    if (found := body.get("format")) != FORMAT or type(found) is not int:
        raise CheckpointError(
            f"{path}: format is {found!r}, not {FORMAT}; use the version of barcast that wrote it, or train "
            "again"
        )
    return body


def check_sampler(sampler: str, steps: int | None = None) -> None:
    """Raise `ConfigError` for a sampler that there is not, with the reason or the choices, or its steps."""
    if sampler in REFUSED:
        raise ConfigError(f"sampler = {sampler!r} is refused: {REFUSED[sampler]}")
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler = {sampler!r} is unknown: choose one of {', '.join(SAMPLERS)}")
    if steps is not None and not SAMPLERS[sampler] <= steps <= MOST_STEPS:
        raise ConfigError(
            f"steps = {steps} cannot be sampled by {sampler}: choose {SAMPLERS[sampler]} to {MOST_STEPS}"
        )


def open_model(
    name: Path | str, timeframe: str, sampler: str | None, steps: int | None, paths: bool = False
) -> Forecaster:
    """Open a checkpoint directory, or a baseline by its name. Imports torch for a checkpoint only.

    Sampler and steps are for models that are sampled; the others have none, see `check_sampled`. With `paths`
    forecasts carry them; raises `ConfigError` for a model that knows none.
    """
    name = str(name)
    if name in BASELINES:
        if paths:
            raise ConfigError(
                f"{name} is a baseline and forecasts no paths: name an SSSD or LDM4TS, or leave out what "
                "needs paths, such as touch"
            )
        return BASELINES[name](timeframe, default_horizons(timeframe), LEVELS)
    check_named(name)
    from barcast.models.checkpoint import open_forecaster

    forecaster = open_forecaster(Path(name), sampler, steps, paths)
    if forecaster.card.timeframe != timeframe:
        raise ConfigError(
            f"{name}: the model was trained on {forecaster.card.timeframe!r} bars, not on {timeframe!r}; "
            "name another model or train one"
        )
    return forecaster


def check_named(name: str) -> None:
    """Raise `CheckpointError` for what may be meant for a baseline, and is neither one nor a directory."""
    if name in BASELINES or Path(name).name != name or Path(name).exists():
        return
    near = get_close_matches(name, BASELINES, n=1)
    raise CheckpointError(
        f"model {name!r}: there is no such folder, and no baseline is called so: "
        + (f"did you mean {near[0]}?" if near else f"name a checkpoint, or one of {', '.join(BASELINES)}")
    )


def check_sampled(name: str, card: Card, sampler: str | None, steps: int | None) -> None:
    """Raise `ConfigError` where a sampler or steps are asked of a model that is not sampled."""
    if card.sampler == "none" and (sampler is not None or steps is not None):
        raise ConfigError(
            f"{name} is not sampled: leave sampler and steps out, or name a diffusion model, or an ensemble "
            "with one"
        )
