"""The network: a conditional quantile map, and a diffusion denoiser behind a structured state-space encoder.

An outcome z (log return over its scale, one number per horizon) is M(u): a monotone map of a normal score u,
shaped by the features of the bars; it is the average of the maps of several members. The scores of all steps
of a path are u = W w with W W' their correlation, and the diffusion model is one of w given the context c of
features and sequence. It starts at w ~ N(0, I), where the velocity that is to be predicted averages to zero
for every x_t: a denoiser that says zero IS the map with a Gaussian copula, and it begins there.

Shapes: B origins, S samples, H horizons, G steps of a path, M members, K knots, F features, L steps of a
sequence of C channels.
"""

import torch
from torch import Generator, Tensor, nn

from barcast.models.sssd.encoder import Encoder
from barcast.models.sssd.head import build_head
from barcast.models.sssd.layers import Architecture
from barcast.models.sssd.marginal import QuantileMap


class SSSD(nn.Module):
    """All that a checkpoint stores as weights.

    `whiten` (G, G) is the Cholesky factor W of the scores' correlation, `noise` (S, G) the fixed standard
    normals from which every forecast starts, `bridge` (G,) that of every `Coupling`.
    """

    whiten: Tensor
    noise: Tensor
    bridge: Tensor

    def __init__(self, a: Architecture, generator: Generator) -> None:
        super().__init__()
        self.architecture = a
        self.map = QuantileMap(a, generator)
        self.encoder = Encoder(a, generator)
        self.denoiser = build_head(a, generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        self.register_buffer("whiten", torch.eye(a.path))
        self.register_buffer("noise", sobol_normals(a.samples, a.path, seed))
        self.register_buffer("bridge", torch.ones(a.path))


def sobol_normals(samples: int, dimensions: int, seed: int) -> Tensor:
    """Scrambled Sobol points as standard normals, (S, dimensions) float32 (Owen 1998)."""
    engine = torch.quasirandom.SobolEngine(dimensions, True, seed)  # type: ignore[no-untyped-call]
    points = engine.draw(samples, dtype=torch.float64)
    normals: Tensor = torch.special.ndtri(points.clamp(2**-31, 1 - 2**-31)).float()
    return normals
