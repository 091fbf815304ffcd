"""A small `SSSDModel`, rows whose law is known, and the names and shapes of the former SSSD's weights."""

from typing import Any

import torch
from torch import Generator, Tensor

from barcast.models.sssd import SSSDConfig, SSSDModel

TABLES: dict[str, Any] = {
    "model": {
        "s4": {"state_dim": 16, "n_layers": 1},
        "encoder": {"timeframes": ["5m", "1h"], "feature_dim": 6, "context_dim": 24},
        "head": {"latent_dim": 32},
        "horizons": {"minutes": [5, 15, 60], "weights": [0.5, 0.3, 0.2], "embedding_dim": 8},
    },
    "data": {"lookback_bars": {"5m": 24, "1h": 8}},
    "training": {"steps": 150, "learning_rate": 8e-3},
}
LENGTHS = {"5m": 24, "1h": 8}
NOISE = 0.5  # of an outcome over its spread, what the features do not tell


def config(**model: dict[str, Any]) -> SSSDConfig:
    """The small configuration with other tables of its `model`."""
    return SSSDConfig.from_dict(TABLES | {"model": TABLES["model"] | model})


def generator(seed: int = 0) -> Generator:
    """A generator of this seed."""
    return Generator().manual_seed(seed)


def features(rows: int, seed: int = 1) -> dict[str, Tensor]:
    """Normal sequences of both timeframes."""
    g = generator(seed)
    return {name: torch.randn(rows, length, 6, generator=g) for name, length in LENGTHS.items()}


def targets(x: dict[str, Tensor], seed: int = 2) -> Tensor:
    """Outcomes (B, 3) in thousandths: one tells of 5m, one of 1h, one of nothing."""
    noise = torch.randn(len(x["5m"]), 3, generator=generator(seed))
    known = torch.stack([x["5m"][:, -1, 0], x["1h"][:, -1, 1], torch.zeros(len(noise))], 1)
    return 1e-3 * ((1 - NOISE**2) ** 0.5 * known + torch.tensor([NOISE, NOISE, 1.0]) * noise)


def model(kind: type[SSSDModel] = SSSDModel, **arguments: Any) -> SSSDModel:
    """A model whose denoiser has been made to matter, without training."""
    made = kind(config(), **arguments)
    with torch.no_grad():
        for layer in (made.head.leave, made.location):
            layer.weight.normal_(0, 0.1, generator=generator(3))
        made.centre.copy_(torch.tensor([1e-4, 0.0, -1e-4]))
        made.spread.copy_(torch.tensor([1e-3, 2e-3, 4e-3]))
    return made.eval()


def former_weights(frames: int = 4, width: int = 200, poles: int = 128, layers: int = 4) -> dict[str, Tensor]:
    """Zeros of the names and shapes that the former SSSD saved, with its settings."""
    shapes: dict[str, tuple[int, ...]] = {"encoder.attention_query": (1, 1, width)}
    for frame in ("5m", "15m", "1h", "4h")[:frames]:
        stack = f"encoder.timeframe_encoders.{frame}"
        for i in range(layers):
            block = f"{stack}.layers.{i}"
            shapes |= {f"{block}.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in _AFFINE}
            shapes |= {
                f"{block}.s4.Lambda": (poles,),
                f"{block}.s4.B": (poles, 1),
                f"{block}.s4.C": (width, poles),
                f"{block}.s4.D": (width,),
                f"{block}.s4.log_dt": (width,),
                f"{block}.ffn.0.weight": (4 * width, width),
                f"{block}.ffn.0.bias": (4 * width,),
                f"{block}.ffn.3.weight": (width, 4 * width),
                f"{block}.ffn.3.bias": (width,),
            }
        shapes |= {f"{stack}.norm.{part}": (width,) for part in _AFFINE}
    attention = "encoder.cross_attention"
    shapes |= {
        f"{attention}.in_proj_weight": (3 * width, width),
        f"{attention}.in_proj_bias": (3 * width,),
        f"{attention}.out_proj.weight": (width, width),
        f"{attention}.out_proj.bias": (width,),
    }
    for place, out, n_in in ((0, 1024, frames * width), (4, 512, 1024)):
        shapes |= {
            f"encoder.fusion_mlp.{place}.weight": (out, n_in),
            f"encoder.fusion_mlp.{place}.bias": (out,),
        }
        shapes |= {f"encoder.fusion_mlp.{place + 1}.{part}": (out,) for part in _AFFINE}
    shapes["horizon_embeddings.weight"] = (4, 128)
    shapes["diffusion_head.timestep_embedding.embeddings"] = (10_000, 128)
    for place, out, n_in in ((0, 512, 1024), (4, 256, 512), (8, 128, 256)):
        shapes |= {
            f"diffusion_head.mlp.{place}.weight": (out, n_in),
            f"diffusion_head.mlp.{place}.bias": (out,),
        }
        shapes |= {f"diffusion_head.mlp.{place + 1}.{part}": (out,) for part in _AFFINE}
    shapes |= {"diffusion_head.mlp.12.weight": (256, 128), "diffusion_head.mlp.12.bias": (256,)}
    shapes |= {"target_proj.weight": (1, 256), "target_proj.bias": (1,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


_AFFINE = ("weight", "bias")
