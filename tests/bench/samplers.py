"""What a path costs by sampler and by architecture, and how much of the machine's arithmetic it uses.

All is CPU time on one thread: the least of several rounds, as other work on the machine can only add to it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from barcast.models import SAMPLERS
from barcast.models.catalog import SAMPLER, STEPS
from barcast.models.diffusion import Distribution, use_one_thread
from barcast.models.samplers import build
from barcast.models.sssd.layers import PRESET, PRESETS, Architecture
from barcast.models.sssd.network import SSSD
from barcast.models.training import architecture
from tests.bench.report import Row, Section

TIMEFRAME, HORIZONS = "1h", (1, 4, 16)
ARCHITECTURES = {name: architecture(name, TIMEFRAME, HORIZONS) for name in PRESETS}
ROUNDS = 25
SIDE = 2048
"""Of the square matrices whose product, in float32, stands for what the machine can do."""


@dataclass(frozen=True)
class Work:
    """Something that the network does, and how often a sampler asks for it."""

    what: str
    does: Callable[[], Tensor]
    asks: int | None = None

    def gflop(self) -> float:
        """What it computes: matrix products and convolutions alone are counted."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.does()
        return float(counter.get_total_flops()) / 1e9

    def seconds(self) -> float:
        """Processor time, once."""
        began = time.process_time()
        self.does()
        return time.process_time() - began


def measure(tell: Callable[[str], None], _folder: Path) -> Section:
    """The network's work for one forecast: map, encoder, and paths by each sampler."""
    use_one_thread()
    section = Section(
        "samplers",
        f"CPU time of the network on one core for a forecast (one symbol, {len(HORIZONS)} hourly horizons, a "
        f"path of {max(HORIZONS)} steps)",
        {
            "evaluations": ("asks", ",d"),
            "cpu_ms": ("CPU ms", ",.2f"),
            "gflop": ("GFLOP", ",.3f"),
            "gflops": ("GFLOP/s", ",.1f"),
            "of_peak": ("of peak", ".0%"),
        },
    )
    a, b = torch.randn(2, SIDE, SIDE, generator=Generator().manual_seed(1))
    works = [Work(f"peak: product of {SIDE} x {SIDE} float32 matrices", lambda: a @ b)]
    for name, sizes in ARCHITECTURES.items():
        works += _network(name, sizes, list(SAMPLERS) if name == PRESET else [SAMPLER])
    least = [float("inf")] * len(works)
    with torch.inference_mode():
        for k in range(ROUNDS):
            tell(f"round {k + 1} of {ROUNDS}")
            least = [min(had, work.seconds()) for had, work in zip(least, works, strict=True)]
    peak = works[0].gflop() / least[0]
    for work, seconds in zip(works, least, strict=True):
        gflop = work.gflop()
        rate = gflop / seconds
        raw = {"cpu_ms": 1e3 * seconds, "gflop": gflop, "gflops": rate, "of_peak": rate / peak}
        asks = {} if work.asks is None else {"evaluations": work.asks}
        section.rows.append(Row(work.what, {**asks, **raw}))
    return section


def _network(name: str, a: Architecture, samplers: list[str]) -> list[Work]:
    generator = Generator().manual_seed(1)
    net = SSSD(a, generator).eval()
    features = torch.randn(1, a.features, generator=generator)
    sequence = torch.randn(1, a.context, a.channels, generator=generator)
    with torch.inference_mode():
        c = net.encoder(features, sequence)
    works = [
        Work(f"{name}: map", lambda: net.map.average(features)),
        Work(f"{name}: encoder", lambda: net.encoder(features, sequence)),
    ]
    for sampler in samplers:
        d = Distribution(net, sampler, STEPS, a.samples)
        what = f"{name}: {a.samples} paths by {sampler}, {STEPS} steps"
        works.append(Work(what, partial(d.joint, c), len(build(sampler, STEPS).lambdas)))
    return works
