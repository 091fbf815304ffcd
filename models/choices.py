"""What can be chosen of a training on this machine, and what that takes: for who asks from elsewhere."""

from itertools import product
from typing import Any

from barcast.models.ldm4ts.attention import probe
from barcast.models.ldm4ts.memory import ERROR, GB, IMAGE_SIZES, estimate_vram_usage
from barcast.models.ldm4ts.training import BATCHES
from barcast.models.scaling import layout_of

WHOLE = BATCHES["diffusion"]


def choices(timeframe: str, memory: int) -> dict[str, Any]:
    """Images, batches and attention backends, and the estimate of each combination of them, as plain values.

    A batch is what the U-Net computes at once of its `BATCHES`, and the autoencoder as large a part of its
    own. `memory`, bytes that a training may take, is told in units of 10^9; `window` is what the network
    sees, in bars.
    """
    batches = [WHOLE >> k for k in range(6)]
    usages = []
    for image, batch, backend, checkpointing in product(
        IMAGE_SIZES, batches, ("sdpa", "flash"), (False, True)
    ):
        gb = _peak(image, batch, backend, checkpointing)
        usages.append(
            {
                "batch": batch,
                "image": image,
                "attention": backend,
                "checkpoint_gradients": checkpointing,
                "gb": gb,
                "savings": 100 * (1 - gb / _peak(image, batch, "sdpa", False)),
                "needs": gb * (1 + ERROR),
            }
        )
    backends = [
        {"name": str(b.name), "usable": b.usable, "training": b.training, "why": b.why, "remedy": b.remedy}
        for b in probe()
    ]
    return {
        "images": list(IMAGE_SIZES),
        "batches": batches,
        "backends": backends,
        "usages": usages,
        "memory": memory / GB,
        "window": layout_of(timeframe).context,
    }


def _peak(image: int, batch: int, backend: str, checkpointing: bool) -> float:
    """The higher peak of both models, in units of 10^9 bytes."""
    parts = {"unet": batch, "autoencoder": max(1, batch * BATCHES["autoencoder"] // WHOLE)}
    found = (
        estimate_vram_usage(
            n, image_size=image, backend=backend, gradient_checkpointing=checkpointing, part=part
        )
        for part, n in parts.items()
    )
    return max(each["total_estimated_gb"] for each in found)
