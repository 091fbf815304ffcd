"""What an LDM4TS takes in memory: estimates beside measured peaks, budgets, and the way out of too much."""

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

from barcast.models import SAMPLERS, ConfigError
from barcast.models.ldm4ts import memory
from barcast.models.ldm4ts.attention import Backend, head_dims, set_gradient_checkpointing
from barcast.models.ldm4ts.memory import Plan, estimate_vram_usage, largest_batch, recommend, with_ladder
from tests.bench import gpu
from tests.bench.attention import MODELS, Live, Measured, inputs, loss
from tests.kernels import both, installed

GRID = {
    "unet": [(64, 1), (64, 16), (128, 4), (224, 2), (256, 1), (256, 16)],
    "autoencoder": [(64, 1), (128, 16), (256, 4)],
}


@pytest.fixture(scope="module")
def measured():
    """Both models, in whose steps bytes are counted."""
    return {part: Measured(part) for part in MODELS}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("part", list(GRID))
def test_estimates_are_near_measured_peaks(measured, part, checkpointing):
    """Within 15 % over image sizes, batches and checkpointing: 12 ways of the U-Net, 6 of the autoencoder."""
    off = {}
    for image, batch in GRID[part]:
        how = {"gradient_checkpointing": checkpointing, "part": part}
        said = estimate_vram_usage(batch, 16, image, **how)["total_estimated_gb"]
        peak = measured[part].peak(batch, image, 16, checkpointing=checkpointing)
        off[image, batch] = abs(said * 1e9 / peak - 1)
    assert max(off.values()) <= memory.ERROR, off


@pytest.mark.parametrize("part", list(MODELS))
def test_sampling_is_estimated_too(measured, part):
    """Calls without gradients, also with many tokens."""
    said = estimate_vram_usage(16, 100, 128, training=False, part=part)["total_estimated_gb"]
    assert said * 1e9 == pytest.approx(measured[part].peak(16, 128, 100, training=False), rel=memory.ERROR)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("part", list(MODELS))
def test_peaks_are_those_of_a_real_step(part, checkpointing):
    """Counting bytes without computing finds what a step on the CPU allocates, to the byte."""
    live = Live()
    with live:
        model = MODELS[part]()
        set_gradient_checkpointing(model, checkpointing)
        optimiser = torch.optim.AdamW(model.parameters())
        for _ in range(2):  # the first makes the moments
            live.peak = live.now
            given = inputs(part, 4, 64, 16)
            found = loss(model, given)
            found.backward()
            optimiser.step()
            optimiser.zero_grad()
    assert live.peak == Measured(part).peak(4, 64, 16, checkpointing=checkpointing)


def test_the_models_are_those_of_the_estimates():
    """Weights and heads, by which estimates are made, are the models' own."""
    for part, make in MODELS.items():
        assert sum(each.numel() for each in make().parameters()) == memory.WEIGHTS[part]
    assert set.union(*(head_dims(make()) for make in MODELS.values())) == memory.HEADS
    assert {key[0] for key in memory.FITS} == set(memory.WEIGHTS) == set(MODELS)


def test_usage_has_seven_keys_and_its_sum():
    """The keys that were promised; the parts add up."""
    found = estimate_vram_usage(4, image_size=128, backend="default", gradient_checkpointing=True)
    assert set(found) == {
        "base_model_gb",
        "activation_memory_gb",
        "total_estimated_gb",
        "backend",
        "gradient_checkpointing",
        "batch_size",
        "savings_vs_default_pct",
    }
    parts = found["base_model_gb"] + found["activation_memory_gb"]
    assert found["total_estimated_gb"] == pytest.approx(parts)
    assert (found["backend"], found["gradient_checkpointing"], found["batch_size"]) == ("sdpa", True, 4)


def test_savings_are_of_the_same_batch():
    """Half a batch is no saving; checkpointing saves what the two totals say, the packages a few percent."""
    for batch in (1, 2, 4, 16):
        plain = estimate_vram_usage(batch, image_size=256)
        assert plain["savings_vs_default_pct"] == 0
        for how in ({"gradient_checkpointing": True}, {"backend": "flash"}):
            found = estimate_vram_usage(batch, image_size=256, **how)
            saved = 100 * (1 - found["total_estimated_gb"] / plain["total_estimated_gb"])
            assert found["savings_vs_default_pct"] == pytest.approx(saved)
    assert estimate_vram_usage(16, image_size=256, gradient_checkpointing=True)["savings_vs_default_pct"] > 40
    assert 0 < estimate_vram_usage(16, image_size=256, backend="flash")["savings_vs_default_pct"] < 5


def test_the_higher_peak_counts():
    """Without a part it is that of the autoencoder or the U-Net which takes more."""
    every = estimate_vram_usage(4, image_size=256)["total_estimated_gb"]
    of = [estimate_vram_usage(4, image_size=256, part=part)["total_estimated_gb"] for part in MODELS]
    assert every == max(of) > min(of)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"batch_size": 0}, "batch_size = 0 is not positive"),
        ({"sequence_length": 0}, "sequence_length = 0 is not positive"),
        ({"image_size": 512}, "image_size = 512 is not supported: choose 64, 128, 224, 256"),
        ({"part": "text"}, "part = 'text' is unknown: choose unet, autoencoder"),
        ({"backend": "auto"}, "auto depends on the machine"),
        ({"backend": "xformers"}, "'xformers' is unknown"),
        ({"backend": "sage"}, "no backward pass"),
        ({"backend": "sage", "training": False}, r"and the model has \[4, 8, 32\]"),
        ({"gradient_checkpointing": True, "training": False}, "a call without gradients keeps nothing"),
    ],
)
def test_what_cannot_be_is_refused(how, said):
    """Field, value and what to do; a combination that would not train is no estimate."""
    with pytest.raises(ConfigError, match=said):
        estimate_vram_usage(**{"batch_size": 4, **how})


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_no_budget_is_refused(budget):
    """A budget is a positive number."""
    with pytest.raises(ConfigError, match=r"budget_gb = .* is no amount of memory"):
        largest_batch(budget)


def test_the_largest_batch_stays_below_its_budget(measured):
    """Its measured peak is below, one more is above with the error left free, and no batch may fit."""
    for image, checkpointing in ((64, True), (256, False)):
        batch = largest_batch(6, 16, image, gradient_checkpointing=checkpointing)
        peak = measured["autoencoder"].peak(batch, image, 16, checkpointing=checkpointing)
        assert 4.5e9 <= peak <= 6e9
        more = estimate_vram_usage(batch + 1, 16, image, gradient_checkpointing=checkpointing)
        assert more["total_estimated_gb"] * (1 + memory.ERROR) > 6
    assert largest_batch(0.01, image_size=256) == 0


def test_recommendations_are_below_their_budgets():
    """Each image size in each budget, plain where a batch of 32 fits, and never above the budget."""
    ways = list(recommend())
    assert {(each.budget_gb, each.image_size) for each in ways} == {
        (budget, image) for budget in (6, 8, 12, 16) for image in (64, 128, 224, 256)
    }
    for each in ways:
        assert each.total_estimated_gb * (1 + memory.ERROR) <= each.budget_gb
        plain = largest_batch(each.budget_gb, image_size=each.image_size)
        assert each.gradient_checkpointing == (plain < memory.WANTED)
    assert {each.gradient_checkpointing for each in ways} == {False, True}
    assert list(recommend((0.02,))) == [each for each in recommend((0.02,)) if each.image_size == 64]


def refusing(needed, error=torch.OutOfMemoryError):
    """Something to run that has too little memory until a plan is as it is needed."""
    seen = []

    def run(plan):
        seen.append(plan)
        if not needed(plan):
            raise error("CUDA out of memory. Tried to allocate 2 GiB\nand more lines")
        return "done"

    return run, seen


def test_the_ladder_is_climbed_in_order():
    """Checkpointing, flash, batches halved down to 1, smaller images; each step is said in one line."""
    run, seen = refusing(lambda plan: plan.image_size == 128)
    said: list[str] = []
    with both():
        found, plan = with_ladder(run, Plan(4, image_size=256), said.append)
    assert found == "done"
    assert plan == seen[-1] == Plan(1, 128, "flash", gradient_checkpointing=True)
    steps = [(p.gradient_checkpointing, str(p.backend), p.batch_size, p.image_size) for p in seen]
    assert steps == [
        (False, "sdpa", 4, 256),
        (True, "sdpa", 4, 256),
        (True, "flash", 4, 256),
        (True, "flash", 2, 256),
        (True, "flash", 1, 256),
        (True, "flash", 1, 224),
        (True, "flash", 1, 128),
    ]
    assert [line.split(": ")[-1] for line in said] == [
        "checkpointing gradients",
        "attention backend flash, which computes in 16 bits",
        "a batch of 2",
        "a batch of 1",
        "images of 224 pixels",
        "images of 128 pixels",
    ]
    assert all(line.startswith("out of memory (CUDA out of memory. Tried") for line in said)


def test_steps_that_cannot_be_are_left_out_and_said():
    """With checkpointing on, no flash and the least images the batch is left; reasons are said once."""
    run, seen = refusing(lambda plan: False, MemoryError)
    said: list[str] = []
    plan = Plan(2, image_size=64, gradient_checkpointing=True)
    with (
        installed(cuda=None),
        pytest.raises(ConfigError, match="does not suffice for a batch of 1 with ima"),
    ):
        with_ladder(run, plan, said.append)
    assert [each.batch_size for each in seen] == [2, 1]
    assert [line for line in said if "left out" in line] == [
        "checkpointing left out: it is on",
        f"attention backend flash left out: torch {torch.__version__} is built without CUDA",
        "smaller images left out: 64 pixels are the least",
    ]


def test_all_steps_used_up_is_one_error():
    """With nothing left to try, the error says what was tried last and that fewer steps would not help."""
    run, seen = refusing(lambda plan: False)
    said: list[str] = []
    done = Plan(1, 64, Backend.flash, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match=r"a batch of 1 with images of 64 pixels either: CUDA .*fewer dif"):
        with_ladder(run, done, said.append)
    assert len(seen) == 1
    assert [line.partition(" left out")[0] for line in said] == [
        "checkpointing",
        "another attention backend",
        "a smaller batch",
        "smaller images",
    ]


def test_a_retry_begins_with_what_failed_set_free():
    """Tensors of the failed attempt are gone before the next one, also those in a cycle."""
    refs = []

    def run(plan):
        if refs:
            assert refs[0]() is None
            return
        kept = torch.zeros(1000)
        refs.append(weakref.ref(kept))
        cycle = [kept]
        cycle.append(cycle)
        torch.empty(2**50)  # more than any machine has: what torch says of it is real

    gc.disable()
    try:
        _, plan = with_ladder(run, Plan(2), [].append)
    finally:
        gc.enable()
    assert plan == Plan(2, gradient_checkpointing=True)


def test_other_errors_are_not_taken_for_memory():
    """What went wrong otherwise goes on as it is, at once."""
    run, seen = refusing(lambda plan: False, RuntimeError)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        with_ladder(run, Plan(4), [].append)
    assert len(seen) == 1


def test_backends_are_listed(run):
    """`barcast backends`: torch's own is usable, the packages say why not, and that they are untested."""
    with installed(cuda=None):
        status, out, _ = run("backends", "--json")
        assert status == 0
        own, flash, sage = json.loads(out)
        status, table, _ = run("backends")
    assert (own["name"], own["usable"], own["training"], own["remedy"]) == ("sdpa", True, True, "")
    assert (flash["usable"], flash["tested"], flash["dtypes"]) == (False, False, ["float16", "bfloat16"])
    assert (sage["name"], sage["training"]) == ("sage", False)
    assert flash["line"].startswith("flash: torch ")
    assert status == 0
    assert "untested on" in table


def test_vram_is_told(run):
    """`barcast vram`: a table of the ways, the largest batch of a budget, and what is recommended."""
    status, out, _ = run("vram", "--batch", "4", "--image-size", "256", "--budget-gb", "6", "--json")
    assert status == 0
    rows = json.loads(out)
    assert [(row["backend"], row["gradient_checkpointing"]) for row in rows] == [
        ("sdpa", False),
        ("sdpa", True),
        ("flash", False),
        ("flash", True),
    ]
    assert rows[1].pop("largest_batch") == largest_batch(6, 100, 256, gradient_checkpointing=True)
    assert rows[1] == estimate_vram_usage(4, 100, 256, gradient_checkpointing=True)
    status, out, _ = run("vram", "--recommend", "--json")
    assert status == 0
    assert len(json.loads(out)) == 16
    for options in ((), ("--sampling",), ("--recommend", "--budget-gb", "8")):
        status, out, _ = run("vram", *options)
        assert (status, "sdpa" in out) == (0, True)
    status, _, err = run("vram", "--recommend", "--batch", "4")
    assert (status, "--recommend" in err) == (2, True)
    status, _, err = run("vram", "--image-size", "100")
    assert status == 78
    assert "image_size = 100 is not supported" in err


def test_without_a_gpu_the_benchmark_measures_the_processor(tmp_path, monkeypatch, capsys):
    """It says that there is none, and writes what it measured with the estimates beside."""
    for name, count in {"FULL_STEPS": 2, "STEPS": 3, "ROUNDS": 1, "WARM": 0}.items():
        monkeypatch.setattr(gpu, name, count)
    monkeypatch.setattr(gpu, "Measured", lambda part: SimpleNamespace(peak=lambda *_, **__: 20_000_000))
    with installed(cuda=None, devices=False):
        gpu.main({"cpu": gpu.Size((64,), (1,), 1)}, tmp_path)
    assert "no GPU: torch" in capsys.readouterr().out
    found = json.loads((tmp_path / gpu.JSON).read_text())
    assert set(found["not_usable"]) == {"flash", "sage"}
    assert [len(rows) for rows in found["sections"].values()] == [4, 2, len(SAMPLERS)]
    for row in found["sections"]["training"]:
        assert (row["mb"], row["estimated_mb"] > 1, row["ms"] > 0) == (20, True, True)
    table = (tmp_path / gpu.MARKDOWN).read_text().splitlines()
    assert len([line for line in table if line.startswith("|")]) == 5 + 4 + 2 + len(SAMPLERS)
