"""Attention backends: what they compute, how kernels are called, what is refused, and what is found here."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers import UNet1DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SpatialNorm
from torch import Generator

from barcast.models import ConfigError
from barcast.models.ldm4ts import attention
from barcast.models.ldm4ts.attention import (
    Backend,
    Processor,
    attend,
    choose,
    head_dims,
    probe,
    set_gradient_checkpointing,
    use_backend,
)
from tests import kernels
from tests.bench.attention import MODELS, inputs, loss, saved_bytes
from tests.kernels import both, flash_attn_func, installed, package, sageattn


@pytest.fixture(scope="module")
def models():
    """The two models of LDM4TS with weights of one seed, as diffusers makes them."""
    torch.manual_seed(0)
    return {part: make().eval() for part, make in MODELS.items()}


@pytest.fixture(params=list(MODELS))
def part(request):
    """One of the two models."""
    return request.param


def of(models, part):
    """A copy of a model, so that the others' processors stay."""
    return copy.deepcopy(models[part])


def called(model, part, dtype=torch.float32, tokens=5):
    """What comes out of it."""
    given = inputs(part, 2, 64, tokens)
    given = [each.to(dtype) if each.is_floating_point() else each for each in given]
    with torch.no_grad():
        return model.to(dtype)(*given).sample


def randn(*shape):
    """Numbers of one seed."""
    return torch.randn(*shape, generator=Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_is_what_diffusers_computes(models, part, dtype):
    """Both models give the same bits as with diffusers' own processor: images, cross attention, 16 bits."""
    ours = of(models, part)
    expected = called(of(models, part), part, dtype)
    count = use_backend(ours, "sdpa", training=True)
    processors = [each.processor for each in ours.modules() if isinstance(each, Attention)]
    assert count == len(processors) == {"unet": 14, "autoencoder": 2}[part]
    assert all(isinstance(each, Processor) for each in processors)
    assert torch.equal(called(ours, part, dtype), expected)


KINDS = {
    "plain": {},
    "cross": {"cross_attention_dim": 24},
    "norms": {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm", "qk_norm": "layer_norm"},
    "image": {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.7, "bias": True},
    "spatial": {"spatial_norm_dim": 6, "norm_num_groups": 4},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kind", "settings"), KINDS.items())
def test_every_part_of_attention_is_as_in_diffusers(kind, settings, masked):
    """Norms of groups, keys and places, residual, rescaled output, masks, sequences and images: same bits."""
    torch.manual_seed(1)
    layer = Attention(32, heads=4, dim_head=8, **settings).eval()
    given = [randn(2, 32, 4, 5)] if kind in ("image", "spatial") else [randn(2, 20, 32), randn(2, 32, 4, 5)]
    keys = randn(2, 7, 24) if "cross_attention_dim" in settings else None
    temb = randn(2, 6, 2, 2) if kind == "spatial" else None
    assert isinstance(layer.spatial_norm, SpatialNorm) == (kind == "spatial")
    mask = None
    if masked:
        mask = torch.where(randn(2, 1, 7 if keys is not None else 20) > 0, 0.0, -10_000.0)
    for x in given:
        layer.set_processor(AttnProcessor2_0())
        expected = layer(x, keys, mask, temb=temb)
        layer.set_processor(Processor(Backend.sdpa))
        assert torch.equal(layer(x, keys, mask, temb=temb), expected)


def test_sdpa_is_exact_attention():
    """As the formula says in 64 bits, but for 1e-5 in 32 and 1e-2 of the values in 16."""
    q, k, v = randn(2, 3, 40, 8), randn(2, 3, 9, 8).flip(1), randn(2, 3, 9, 8)
    scores = q.double() @ k.double().transpose(-1, -2) / 8**0.5
    exact = scores.softmax(-1) @ v.double()
    assert (attend(Backend.sdpa, q, k, v) - exact).abs().max() <= 1e-5
    half = attend(Backend.sdpa, q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert (half - exact).square().mean().sqrt() <= 1e-2 * exact.square().mean().sqrt()


@pytest.mark.parametrize("backend", ["flash", "sage"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_agree_with_sdpa(backend, dtype):
    """By stubs that attend exactly: rounding to 16 bits is all that differs, and the type is the input's."""
    q, k, v = randn(2, 3, 40, 64), randn(2, 3, 9, 64).flip(1), randn(2, 3, 9, 64)
    exact = attend(Backend.sdpa, q, k, v)
    with both(), torch.no_grad():
        found = attend(Backend(backend), *(x.to(dtype) for x in (q, k, v)))
    assert found.dtype is dtype
    assert (found - exact).square().mean().sqrt() / exact.square().mean().sqrt() < 1e-2
    if dtype is not torch.float32:
        assert (found - attend(Backend.sdpa, *(x.to(dtype) for x in (q, k, v)))).abs().max() <= 1e-3


def test_flash_in_the_models(models, part):
    """Forecasts by flash differ from sdpa's by what 16 bits lose, and gradients reach every weight."""
    model = of(models, part)
    expected = called(of(models, part), part)
    with both():
        assert use_backend(model, "flash", training=True) > 0
        found = called(model, part)
        loss(model, inputs(part, 2, 64, 5)).backward()
    assert (found - expected).square().mean() <= 1e-3 * expected.square().mean()
    assert not torch.equal(found, expected)
    assert [name for name, each in model.named_parameters() if each.grad is None] == []


def test_sage_where_its_heads_fit():
    """Heads of 64 channels go to sage, layout and all; the numbers are sdpa's but for 16 bits."""
    torch.manual_seed(1)
    layer = Attention(128, heads=2, dim_head=64).eval()
    x = randn(2, 20, 128)
    expected = layer(x)
    with both(), torch.no_grad():
        assert use_backend(layer, "sage", training=False) == 1
        assert (layer(x) - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("part_and_heads", [("unet", {4, 8}), ("autoencoder", {32})])
def test_sage_refuses_other_heads_at_once(models, part_and_heads):
    """It is refused when it is chosen, with the channels that it would take."""
    part, heads = part_and_heads
    assert head_dims(models[part]) == heads
    with both(), pytest.raises(ConfigError, match=r"sage cannot be used: it takes heads of 64, 96, 128 cha"):
        use_backend(of(models, part), "sage", training=False)


def test_flash_refuses_larger_heads():
    """More than 256 channels of a head are too many for it."""
    with both(), pytest.raises(ConfigError, match=r"up to 256 channels, and the model has \[320\]"):
        use_backend(Attention(320, heads=1, dim_head=320), "flash", training=False)


def test_sage_is_refused_for_training():
    """When it is chosen for training, and when an input needs a gradient: it has no backward pass."""
    with both():
        with pytest.raises(ConfigError, match=r"gradients would end there, .* train with sdpa"):
            choose("sage", training=True)
        q, k, v = randn(3, 1, 2, 5, 64)
        for needing in range(3):
            given = [x.clone().requires_grad_(i == needing) for i, x in enumerate((q, k, v))]
            with pytest.raises(ConfigError, match=r"under torch\.no_grad\(\)"):
                attend(Backend.sage, *given)
            with torch.no_grad():
                attend(Backend.sage, *given)
        assert choose("auto", training=True) is Backend.flash


@pytest.mark.parametrize("backend", ["flash", "sage"])
def test_masks_are_refused(backend):
    """A kernel without masks would attend to what is masked: no silent detour either."""
    q = randn(1, 2, 5, 64)
    with both(), torch.no_grad(), pytest.raises(ConfigError, match=f"{backend} takes no mask: choose sdpa"):
        attend(Backend(backend), q, q, q, torch.zeros(1, 1, 5, 5))


def test_other_devices_and_types_are_refused():
    """A model that is still on the CPU, and numbers of 64 bits."""
    q = randn(1, 2, 5, 64)
    with pytest.raises(ConfigError, match="flash computes on cuda, and the model is on cpu: move the model"):
        attend(Backend.flash, q, q, q)
    with both(), pytest.raises(ConfigError, match=r"computes in 16 bits, and torch\.float64 would lose"):
        attend(Backend.flash, *[q.double()] * 3)


def test_attention_of_another_kind_is_refused():
    """Added keys, unscaled scores and shared keys are no plain attention; no attention is nothing to set."""
    for settings in ({"added_kv_proj_dim": 8}, {"scale_qk": False}, {"kv_heads": 1}):
        with pytest.raises(ConfigError, match="leave it with the processor that diffusers gave it"):
            use_backend(torch.nn.Sequential(Attention(16, heads=2, dim_head=8, **settings)), "sdpa", False)
    with pytest.raises(ConfigError, match="Linear has no attention"):
        use_backend(torch.nn.Linear(2, 2), "sdpa", training=False)


def test_a_processor_can_be_copied_and_saved():
    """A model with it can be copied for an average of its weights, and sent to another process."""
    assert pickle.loads(pickle.dumps(Processor(Backend.flash))).backend is Backend.flash
    assert copy.deepcopy(Processor(Backend.sdpa)).backend is Backend.sdpa


FLASH, SAGE = package("flash_attn", flash_attn_func), package("sageattention", sageattn)
MISSING = [
    (
        "flash",
        {"cuda": None},
        "is built without CUDA; on a machine with an NVIDIA GPU install torch",
    ),
    ("sage", {"cuda": "11.6"}, "torch is built for CUDA 11.6; install torch for CUDA 12.0 or newer"),
    ("flash", {"devices": False}, "torch sees no CUDA device; see whether nvidia-smi shows one"),
    ("flash", {"capability": (7, 5)}, "Stub has compute capability 7.5, and flash-attn needs 8.0 .Ampere."),
    ("sage", {"capability": (7, 5)}, "and sageattention needs one of 8.0, 8.6, 8.9, 9.0, 12.0; choose sdpa"),
    ("sage", {"capability": (10, 0)}, "compute capability 10.0, and sageattention needs one of"),
    ("flash", {}, "flash-attn is not installed; pip install ninja, then pip install --no-build-isolation"),
    ("sage", {}, "sageattention is not installed; build 2.2.0 from https://github.com/thu-ml/SageAttention"),
    ("flash", {"flash": package("flash_attn")}, "cannot be imported from it .*built for another torch"),
    ("flash", {"flash": FLASH, "flash_attn": "1.0.9"}, "flash-attn 1.0.9 is too old, 2.0 is needed; pip"),
    (
        "sage",
        {"sage": SAGE, "sageattention": "1.0.6"},
        "sageattention 1.0.6 is too old, 2.1.1 is needed; b",
    ),
]


@pytest.mark.parametrize(("backend", "machine", "said"), MISSING)
def test_what_is_missing_is_said_in_one_line(backend, machine, said):
    """What was asked for, why it is not there and what to do, for each way in which it can be missing."""
    with installed(**machine), pytest.raises(ConfigError, match=said) as error:
        choose(backend, training=False)
    assert str(error.value).startswith(f"attention backend {backend} cannot be used: ")
    assert "\n" not in str(error.value)


def test_what_flash_attn_4_leaves_is_no_package(tmp_path, monkeypatch):
    """A folder without __init__.py can be imported as flash_attn: it is told from the real one."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    with installed(), pytest.raises(ConfigError, match="flash_attn is an empty folder without flash_attn_f"):
        choose("flash", training=False)
    assert "flash_attn" not in sys.modules


def test_what_is_there_is_found():
    """With both packages on a GPU all three are usable; neither was tried on hardware by our tests."""
    with both():
        own, flash, sage = probe()
    assert [each.usable for each in (own, flash, sage)] == [True] * 3
    assert (flash.why, sage.why) == ("flash-attn 2.8.3 on Stub", "sageattention 2.2.0 on Stub")
    assert [each.training for each in (own, flash, sage)] == [True, True, False]
    assert [each.tested for each in (own, flash, sage)] == [True, False, False]


def test_names_are_resolved():
    """`default` is sdpa, an unknown name is refused with those there are."""
    assert choose("default", training=True) is choose("sdpa", training=False) is Backend.sdpa
    with pytest.raises(ConfigError, match="'xformers' is unknown: choose auto, default, sdpa, flash, sage"):
        choose("xformers", training=True)


def test_auto_takes_the_best_that_is_usable_and_says_it_once():
    """sage, else flash, else sdpa; not sage in training or for other heads, and one line says why."""
    for training, heads, taken in (
        (False, (), Backend.sage),
        (False, {64}, Backend.sage),
        (False, {4, 8}, Backend.flash),
        (False, {320}, Backend.sdpa),
        (True, {64}, Backend.flash),
    ):
        said: list[str] = []
        with both():
            assert choose("auto", training, heads, said.append) is taken
        assert len(said) == 1
        assert said[0].startswith(f"attention by {taken}")
    said = []
    with installed(cuda=None):
        assert choose("auto", training=True, tell=said.append) is Backend.sdpa
    [line] = said
    assert line.startswith("attention by sdpa; not sage: sageattention has no backward pass")
    assert line.endswith("is built without CUDA")


def test_looking_imports_no_kernel_and_asks_no_driver():
    """A start with this module imported has neither kernels nor diffusers in it, and CUDA is not woken."""
    program = (
        "import sys, torch, barcast.models.ldm4ts.attention as a\n"
        "print({'flash_attn', 'sageattention', 'triton', 'diffusers'} & set(sys.modules))\n"
        "print(torch.cuda.is_initialized())\n"
        "a.choose('default', True)\n"
        "print({'flash_attn', 'sageattention', 'diffusers'} & set(sys.modules))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.stdout.split("\n") == ["set()", "False", "set()", ""], run.stderr


def test_checkpointing_keeps_gradients_and_less(models, part):
    """The same gradients to 1e-6, also with our processors, and at least 40 % less is kept for them."""
    given = inputs(part, 2, 64, 5)
    found = {}
    for on in (False, True):
        model = of(models, part).train()
        use_backend(model, "sdpa", training=True)
        assert set_gradient_checkpointing(model, on) == 1
        kept = saved_bytes(model, given)
        loss(model, given).backward()
        found[on] = kept, {name: each.grad for name, each in model.named_parameters()}
    (plain, gradients), (less, same) = found[False], found[True]
    assert less <= 0.6 * plain
    assert max((gradients[name] - same[name]).abs().max() for name in gradients) <= 1e-6
    assert all(each.abs().sum() > 0 for name, each in gradients.items() if not name.endswith("to_k.bias"))


def test_checkpointing_is_taken_back_and_refused_where_there_is_none(models):
    """Off again is off; what diffusers cannot checkpoint, and what is none of its models, is refused."""
    model = torch.nn.ModuleDict({part: of(models, part) for part in MODELS})
    assert set_gradient_checkpointing(model, True) == len(MODELS)
    assert all(each.is_gradient_checkpointing for each in model.values())
    set_gradient_checkpointing(model, False)
    assert not any(each.is_gradient_checkpointing for each in model.values())
    with pytest.raises(ConfigError, match="UNet1DModel has no gradient checkpointing"):
        set_gradient_checkpointing(UNet1DModel(sample_size=64, block_out_channels=(8, 8, 16)), True)
    with pytest.raises(ConfigError, match="Linear holds no model of diffusers"):
        set_gradient_checkpointing(torch.nn.Linear(2, 2), True)


def test_stubs_refuse_other_calls():
    """The control: a stub that is called otherwise than its package wants fails."""
    q = randn(1, 5, 2, 64).bfloat16()
    for wrong in (lambda: flash_attn_func(q.float(), q.float(), q.float()), lambda: sageattn(q, q, q)):
        with pytest.raises(AssertionError):
            wrong()
    with pytest.raises(AssertionError):
        flash_attn_func(q, q[:, :3, :1], q[:, :3, :1])


def test_backends_and_stubs_agree_on_names():
    """What is patched is what is asked."""
    assert set(attention.PACKAGES) == {Backend.flash, Backend.sage}
    assert {each.name for each in attention.PACKAGES.values()} == set(kernels.VERSIONS)
    assert {a.module for a in attention.PACKAGES.values()} == {"flash_attn", "sageattention"}
