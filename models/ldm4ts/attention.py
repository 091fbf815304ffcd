"""What computes the attention of a U-Net and an autoencoder of diffusers, and what is kept of their work.

`set_attention_backend` of diffusers does nothing to `UNet2DConditionModel` and `AutoencoderKL`: their
attention asks torch directly. What works is a processor on each `Attention`, which `use_backend` sets.

`sdpa`, also called `default`, is torch's own attention, which on a GPU chooses a flash or a memory-efficient
kernel itself. `flash` and `sage` are the packages flash-attn and sageattention. Both compute in 16 bits:
float16 and bfloat16 go in as they are, float32 is rounded to bfloat16 and the result is float32 again.
Neither has been run on hardware by this project's tests, which hold how they are called against stubs.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from barcast.models.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

KERNEL_DEVICE = "cuda"
"""Where flash-attn and sageattention compute."""
CAPABILITY = (8, 0)
"""Of the oldest GPU that they run on: Ampere."""
CUDA = Version("12.0")
SAGE_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
"""Those for which sageattention 2 has kernels: it raises on others, newer ones too."""
SAGE_HEADS = frozenset({64, 96, 128})
"""Channels of a head that sageattention is made for: smaller heads it would fill up to 64 with zeros."""
FLASH_HEAD = 256
"""The most channels of a head that flash-attn takes."""
UNTESTED = "untested on hardware"


class Backend(StrEnum):
    """What computes attention. `default` is `sdpa`; `auto` takes the best that is usable."""

    auto = "auto"
    default = "default"
    sdpa = "sdpa"
    flash = "flash"
    sage = "sage"


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found out of a backend on this machine.

    `why` says what is there, or what is missing; `remedy` what to do about it, empty where it is usable.
    `dtypes` are those that it computes in, `training` is whether gradients pass through it.
    """

    name: Backend
    usable: bool
    why: str
    remedy: str
    dtypes: tuple[str, ...]
    training: bool
    tested: bool

    def line(self) -> str:
        """All of it in one line."""
        return f"{self.name}: {self.why}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True, slots=True)
class _Package:
    """A kernel's package: what is imported of it, and how it is installed."""

    name: str
    module: str
    function: str
    least: Version
    install: str


FLASH_ATTN = _Package(
    "flash-attn",
    "flash_attn",
    "flash_attn_func",
    Version("2.0"),
    "pip install ninja, then pip install --no-build-isolation flash-attn, which compiles with nvcc",
)
SAGEATTENTION = _Package(
    "sageattention",
    "sageattention",
    "sageattn",
    Version("2.1.1"),
    "build 2.2.0 from https://github.com/thu-ml/SageAttention by pip install --no-build-isolation .",
)
PACKAGES = {Backend.flash: FLASH_ATTN, Backend.sage: SAGEATTENTION}
HALF = ("float16", "bfloat16")
NO_BACKWARD = "sageattention has no backward pass: gradients would end there, and no error would tell"


def probe() -> list[Probe]:
    """What each backend needs and whether it is here, torch's own first.

    It asks the driver, and imports a kernel's package where a GPU is there that could run it.
    """
    kernels = ", which has flash and memory-efficient kernels on a GPU" if torch.version.cuda else ""
    own = Probe(Backend.sdpa, True, f"torch {torch.__version__}{kernels}", "", ("any",), True, True)
    return [own, *map(_probe, PACKAGES)]


def _probe(backend: Backend) -> Probe:
    why, remedy = _missing(backend)
    if not remedy:
        why = f"{PACKAGES[backend].name} {why} on {torch.cuda.get_device_name()}"
    training = backend is not Backend.sage
    return Probe(backend, not remedy, why, remedy, HALF, training, tested=False)


def _missing(backend: Backend) -> tuple[str, str]:
    """What is missing for a backend, and the remedy; without a remedy, the version that is there."""
    package = PACKAGES[backend]
    if torch.version.cuda is None:
        remedy = f"on a machine with an NVIDIA GPU install torch for CUDA {CUDA} or newer"
        return f"torch {torch.__version__} is built without CUDA", remedy
    if Version(torch.version.cuda) < CUDA:
        return f"torch is built for CUDA {torch.version.cuda}", f"install torch for CUDA {CUDA} or newer"
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA device",
            "see whether nvidia-smi shows one; in a container, whether it is passed on",
        )
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY or (backend is Backend.sage and capability not in SAGE_CAPABILITIES):
        found = f"{torch.cuda.get_device_name()} has compute capability {_dotted(capability)}"
        known = [_dotted(each) for each in SAGE_CAPABILITIES]
        needed = f"one of {', '.join(known)}" if backend is Backend.sage else "8.0 (Ampere) or newer"
        return f"{found}, and {package.name} needs {needed}", f"choose {Backend.sdpa}"
    spec = find_spec(package.module)
    if spec is None:
        return f"{package.name} is not installed", package.install
    if spec.origin is None:
        left = f"{package.module} is an empty folder without {package.function}, such as flash-attn-4 leaves"
        return left, package.install
    try:
        version = metadata.version(package.name)
        if Version(version) < package.least:
            return f"{package.name} {version} is too old, {package.least} is needed", package.install
        getattr(import_module(package.module), package.function)
    except (metadata.PackageNotFoundError, ImportError, AttributeError, OSError) as error:
        broken = f"{package.module} is there, and {package.function} cannot be imported from it ({error})"
        return broken, f"it may be built for another torch, or lack triton: {package.install}"
    return version, ""


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def named(requested: str) -> Backend:
    """The backend of this name. Raises `ConfigError` for an unknown one."""
    try:
        return Backend(requested)
    except ValueError as error:
        raise ConfigError(
            f"attention backend {requested!r} is unknown: choose {', '.join(Backend)}"
        ) from error


def refused(
    found: Probe, training: bool, head_dims: Collection[int] = (), device: str | None = None
) -> tuple[str, str] | None:
    """Why a backend cannot be used, and what to do; None where it can. `device` is where the model is."""
    if training and not found.training:
        return NO_BACKWARD, f"train with {Backend.sdpa} or {Backend.flash}"
    if not found.usable:
        return found.why, found.remedy
    if found.name in PACKAGES and device not in (None, KERNEL_DEVICE):
        return f"it computes on {KERNEL_DEVICE}, and the model is on {device}", f"choose {Backend.sdpa}"
    heads = sorted(head_dims)
    if found.name is Backend.sage and not SAGE_HEADS.issuperset(heads):
        wanted = f"heads of {', '.join(map(str, sorted(SAGE_HEADS)))} channels"
        return f"it takes {wanted}, and the model has {heads}", f"choose {Backend.sdpa} or {Backend.flash}"
    if found.name is Backend.flash and heads and heads[-1] > FLASH_HEAD:
        return f"it takes heads of up to {FLASH_HEAD} channels, and the model has {heads}", (
            f"choose {Backend.sdpa}"
        )
    return None


def choose(
    requested: str,
    training: bool,
    head_dims: Collection[int] = (),
    tell: "Callable[[str], None] | None" = None,
    device: str | None = None,
) -> Backend:
    """The backend to use: `sdpa`, `flash` or `sage`.

    `auto` takes sage, else flash, else sdpa, of those that can be used: sage never for training. It says by
    `tell` in one line what it took, and why not another. A backend that is asked for by name is taken or
    refused by `ConfigError`, never replaced. `head_dims` are the channels of a head, see `head_dims`;
    `device` is where the model is, such as cpu.
    """
    wanted = named(requested)
    if wanted in (Backend.sdpa, Backend.default):
        return Backend.sdpa
    if wanted is not Backend.auto:
        if (why := refused(_probe(wanted), training, head_dims, device)) is not None:
            raise ConfigError(f"attention backend {wanted} cannot be used: {'; '.join(why)}")
        return wanted
    passed = []
    taken = Backend.sdpa
    for name in (Backend.sage, Backend.flash):
        if (why := refused(_probe(name), training, head_dims, device)) is None:
            taken = name
            break
        passed.append(f"not {name}: {why[0]}")
    if tell is not None:
        tell(f"attention by {taken}" + "".join(f"; {each}" for each in passed))
    return taken


def _attentions(module: nn.Module) -> list[tuple[str, Any]]:
    from diffusers.models.attention_processor import Attention

    return [(name, each) for name, each in module.named_modules() if isinstance(each, Attention)]


def head_dims(module: nn.Module) -> set[int]:
    """The channels of a head, of every attention in a module."""
    return {each.inner_dim // each.heads for _, each in _attentions(module)}


def use_backend(module: nn.Module, backend: str, training: bool, device: str | None = None) -> int:
    """Let every attention in a module be computed by a backend; how many there are.

    `device` is where it will compute, such as cpu, as for `choose`.

    Raises `ConfigError` where the backend cannot be used, as `choose` does, where the module has no
    attention, and for attention that is more than softmax(Q K^T / sqrt(d)) V.
    """
    found = _attentions(module)
    if not found:
        raise ConfigError(f"{type(module).__name__} has no attention: there is nothing to set a backend for")
    for name, each in found:
        if each.added_kv_proj_dim is not None or not each.scale_qk or each.inner_kv_dim != each.inner_dim:
            raise ConfigError(
                f"the attention {name} has added keys, unscaled scores or shared keys: "
                "leave it with the processor that diffusers gave it"
            )
    heads = {each.inner_dim // each.heads for _, each in found}
    chosen = choose(backend, training, heads, device=device)
    for _, each in found:
        each.set_processor(Processor(chosen))
    return len(found)


def set_gradient_checkpointing(module: nn.Module, on: bool) -> int:
    """Let every model of diffusers in a module keep its blocks' inputs alone, or all; how many there are.

    The rest is computed again in the backward pass, to the same gradients. Raises `ConfigError` for a module
    that holds none, or one that has no checkpointing, such as `UNet1DModel`.
    """
    found = list(_models(module))
    if not found:
        raise ConfigError(f"{type(module).__name__} holds no model of diffusers: nothing can be checkpointed")
    for each in found:
        if not each._supports_gradient_checkpointing:
            raise ConfigError(f"{type(each).__name__} has no gradient checkpointing: train it without")
        if on:
            each.enable_gradient_checkpointing()
        else:
            each.disable_gradient_checkpointing()
    return len(found)


def _models(module: nn.Module) -> Iterator[Any]:
    """The models of diffusers in a module, of which each also sets those inside of it."""
    from diffusers import ModelMixin

    if isinstance(module, ModelMixin):
        yield module
        return
    for each in module.children():
        yield from _models(each)


class Processor:
    """Attention as `AttnProcessor2_0` of diffusers computes it, by a backend of choice."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(B, N, C), or an image (B, C, H, W), to the same shape; keys come from (B, M, C') where given.

        Raises `ConfigError` for a mask that the backend does not take, for what is not on its device, and
        where sage would have to give gradients.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image = hidden_states.shape if hidden_states.ndim == 4 else None
        if image is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (B, N, C)
        keyed = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        B, M = keyed.shape[:2]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, M, B)
            attention_mask = attention_mask.view(B, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        q = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            keyed = hidden_states
        elif attn.norm_cross:
            keyed = attn.norm_encoder_hidden_states(encoder_hidden_states)
        k, v = attn.to_k(keyed), attn.to_v(keyed)
        q, k, v = (x.view(B, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2) for x in (q, k, v))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        x = attend(self.backend, q, k, v, attention_mask)
        x = x.transpose(1, 2).reshape(B, -1, q.shape[1] * q.shape[3]).to(q.dtype)
        for layer in attn.to_out:  # the projection and its dropout
            x = layer(x)
        if image is not None:
            x = x.transpose(-1, -2).reshape(image)
        if attn.residual_connection:
            x = x + residual
        found: Tensor = x / attn.rescale_output_factor
        return found


def attend(backend: Backend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V: q (B, heads, N, d), k and v (B, heads, M, d) to q's shape and type.

    Raises `ConfigError` as `Processor` does.
    """
    if backend is Backend.sdpa:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
    if mask is not None:
        raise ConfigError(f"attention backend {backend} takes no mask: choose {Backend.sdpa}")
    if q.device.type != KERNEL_DEVICE:
        raise ConfigError(
            f"attention backend {backend} computes on {KERNEL_DEVICE}, and the model is on {q.device}: "
            f"move the model there, or choose {Backend.sdpa}"
        )
    if backend is Backend.sage and torch.is_grad_enabled() and _need_gradients((q, k, v)):
        raise ConfigError(
            f"{NO_BACKWARD}: call it under torch.no_grad(), or train with {Backend.sdpa} or {Backend.flash}"
        )
    dtype = q.dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ConfigError(
            f"attention backend {backend} computes in 16 bits, and {dtype} would lose more than they hold: "
            f"choose {Backend.sdpa}"
        )
    if dtype is torch.float32:
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    return (_flash if backend is Backend.flash else _sage)(q, k, v).to(dtype)


def _need_gradients(tensors: Iterable[Tensor]) -> bool:
    return any(each.requires_grad for each in tensors)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, heads, d)
    found: Tensor = flash_attn_func(q, k, v, dropout_p=0.0, causal=False)
    return found.transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn

    found: Tensor = sageattn(q, k, v, tensor_layout="HND", is_causal=False, smooth_k=True)
    return found
