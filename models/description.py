"""What a model is, as a person or a script wants to know it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Generator, nn

from barcast.models.catalog import BASELINES
from barcast.models.checkpoint import load
from barcast.models.ensemble import Ensemble
from barcast.models.errors import ConfigError
from barcast.models.forecast import default_horizons
from barcast.models.gbm import Boosted
from barcast.models.ldm4ts.trained import LatentTrained
from barcast.models.origins import to_text
from barcast.models.paths import path_steps
from barcast.models.sssd.layers import PRESET, PRESETS
from barcast.models.sssd.network import SSSD
from barcast.models.trained import Model, Trained
from barcast.models.training import architecture

PARTS = ("map", "encoder", "denoiser")
"""The parts of a network that learn."""
LATENT_PARTS = ("temporal", "map", "vae", "read", "unet", "statistics", "frequency", "said", "gate")
"""Those of an LDM4TS."""


def describe(name: str) -> dict[str, Any]:
    """A checkpoint directory: what it forecasts, has learnt and is made of; times are texts, sizes 1e6 bytes.

    `sampler`, `steps` and `samples` are those of its quantiles by default; of an SSSD, `coupling` has those
    of its paths, with the sampler `none` where they are put together by a Gaussian copula.

    Raise `ConfigError` for a baseline, which is no file, and `CheckpointError` for what cannot be read.
    """
    if name in BASELINES:
        raise ConfigError(f"{name} is a baseline, which has no checkpoint; name a checkpoint directory")
    checkpoint = load(Path(name))
    card, record = checkpoint.forecaster().card, checkpoint.trained.record
    size = sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file())
    learnt = {
        "symbols": record.symbols,
        "left_out": record.left_out,
        "bars": record.bars,
        "origins": record.origins,
        "learnt_until": to_text(record.train_end),
        "judged_until": to_text(record.validation_end),
        "known_until": to_text(record.until),
        "learnt_on": record.fingerprint,
    }
    return {
        "model": checkpoint.model,
        "kind": card.kind,
        "timeframe": card.timeframe,
        "horizons": card.horizons,
        "levels": card.levels,
        "window": card.window,
        **learnt,
        "sampler": card.sampler,
        "steps": card.steps,
        "samples": card.samples,
        **_made_of(checkpoint.trained),
        "megabytes": size / 1e6,
        "fingerprint": card.fingerprint,
    }


def presets(timeframe: str) -> list[dict[str, Any]]:
    """The presets with their sizes and parameters, for a timeframe and its default horizons."""
    horizons = default_horizons(timeframe)
    found = []
    for name in PRESETS:
        a = architecture(name, timeframe, horizons)
        net = SSSD(a, Generator().manual_seed(0))
        weights = sum(t.nbytes for t in net.state_dict().values())
        about = {"preset": name, "default": name == PRESET, "timeframe": timeframe, "horizons": horizons}
        about |= {"architecture": asdict(a), "parameters": _parameters(net), "megabytes": weights / 1e6}
        found.append(about)
    return found


def _made_of(trained: Model) -> dict[str, Any]:
    """What is in a model of this kind."""
    if isinstance(trained, Trained):
        a, record = trained.net.architecture, trained.record
        joint = trained.forecaster("", paths=True).card
        return {
            "path": joint.path,
            "coupling": {"sampler": joint.sampler, "steps": joint.steps, "samples": joint.samples},
            "preset": a.preset,
            "architecture": asdict(a),
            "parameters": _parameters(trained.net),
            "seed": record.seed,
            "map_step": record.map_step,
            "denoiser_step": record.denoiser_step,
        }
    if isinstance(trained, LatentTrained):
        sizes = trained.net.architecture
        learnt = {part: getattr(trained.net, part) for part in LATENT_PARTS}
        counts = {part: _count(module) for part, module in learnt.items() if module is not None}
        language = trained.net.language
        return {
            "path": path_steps(trained.scaling.horizons),
            "preset": sizes.preset,
            "architecture": asdict(sizes),
            "parameters": counts | {"all": _count(trained.net)},
            "text": None if language is None else str(language.folder),
            "latent_spread": float(trained.net.spread),
            "seed": trained.record.seed,
            "map_step": trained.record.map_step,
            "denoiser_step": trained.record.denoiser_step,
        }
    if isinstance(trained, Boosted):
        return {"seed": trained.record.seed, "trees": len(trained.trees.roots)}
    assert isinstance(trained, Ensemble)
    columns = zip(trained.members, trained.weights.T.tolist(), strict=True)
    return {"members": [{"name": member.name, "weights": weights} for member, weights in columns]}


def _parameters(net: SSSD) -> dict[str, int]:
    """Parameters of each part, and of all."""
    counts = {part: _count(getattr(net, part)) for part in PARTS}
    return counts | {"all": _count(net)}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
