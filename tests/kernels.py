"""Stand-ins for a GPU, flash-attn and sageattention: they hold how they are called, and attend exactly."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from barcast.models.ldm4ts import attention

HALF = (torch.float16, torch.bfloat16)
VERSIONS = {"flash-attn": "2.8.3", "sageattention": "2.2.0"}


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, causal: bool = False) -> Tensor:
    """As flash-attn 2: (B, N, heads, d) in 16 bits, with a backward pass."""
    assert (dropout_p, causal) == (0.0, False)
    assert q.dtype in HALF
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[0] == k.shape[0]
    assert q.shape[2:] == k.shape[2:]
    assert k.shape == v.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "NHD", is_causal: bool = True, **options: Any
) -> Tensor:
    """As sageattention 2: (B, heads, N, d) by its layout HND, in 16 bits, and gradients end in it."""
    assert (tensor_layout, is_causal, options) == ("HND", False, {"smooth_k": True})
    assert q.dtype in HALF
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[:2] == k.shape[:2]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    with torch.no_grad():
        return scaled_dot_product_attention(q, k, v)


def package(name: str, function: Any = None) -> ModuleType:
    """A module to import, with a function in it."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin="stub")
    if function is not None:
        setattr(module, function.__name__, function)
    return module


@contextmanager
def installed(
    flash: ModuleType | None = None,
    sage: ModuleType | None = None,
    cuda: str | None = "12.8",
    devices: bool = True,
    capability: tuple[int, int] = (9, 0),
    device: str = "cpu",
    **versions: str,
) -> Iterator[None]:
    """A machine with a GPU of this capability, and these modules as the kernels' packages."""
    modules = {name: each for name, each in (("flash_attn", flash), ("sageattention", sage)) if each}
    known = VERSIONS | {name.replace("_", "-"): version for name, version in versions.items()}

    def version(name: str) -> str:
        return known[name] if name in known else metadata.version(name)

    fake = SimpleNamespace(version=version, PackageNotFoundError=metadata.PackageNotFoundError)
    with (
        patch.dict(sys.modules, modules),
        patch.object(attention, "metadata", fake),
        patch.object(attention, "KERNEL_DEVICE", device),
        patch.object(torch.version, "cuda", cuda),
        patch.object(torch.cuda, "is_available", lambda: devices),
        patch.object(torch.cuda, "get_device_capability", lambda *_: capability),
        patch.object(torch.cuda, "get_device_name", lambda *_: "Stub"),
    ):
        yield


@contextmanager
def both() -> Iterator[None]:
    """Both packages on a GPU that stands on the CPU."""
    with installed(package("flash_attn", flash_attn_func), package("sageattention", sageattn)):
        yield
