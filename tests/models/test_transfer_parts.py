"""Regime transfer, part by part: the rule, the latent, the references, the energies, the ways."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from barcast.models import ConfigError, DataError, Window
from barcast.models.optimiser import NORM
from barcast.models.transfer import (
    REGIMES,
    References,
    RegimeLatentDataset,
    RegimeRule,
    StressScenarioGenerator,
    TransferConfig,
    build_style_indices_cache,
    collected,
)
from barcast.models.transfer.baselines import bootstrapped, rescaled
from barcast.models.transfer.latent import CHANNELS, HEIGHT, WIDTH, LatentScale
from barcast.models.transfer.losses import directions, divergence, self_similarity, texture_distance
from barcast.models.transfer.network import NULL, TransferArchitecture, VelocityNetwork, guided, travel
from barcast.models.transfer.regimes import BARS, LEAST, Measures, first_end, measured
from barcast.models.transfer.statistics import (
    rank_correlation,
    realised_volatility,
    square_correlations,
    tail_ratio,
)
from barcast.models.transfer.trained import PROBABILITIES
from barcast.models.transfer.training import dropped
from tests.garch import simulate

HISTORY = simulate("SYM", 4000, seed=3, levels=(0.0015, 0.005), switch=0.002).window


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def latents(rows: int, seed: int = 0, side: int = 16, **spread: float) -> Tensor:
    """Latents that are noise, wider in a channel of its own where `spread` says so."""
    x = torch.randn(rows, 4, side, side, generator=generator(seed))
    x[:, 3] *= spread.get("volatility", 1.0)
    return x


@pytest.fixture(scope="module")
def dataset() -> RegimeLatentDataset:
    windows = collected([simulate(f"SYM{i}", 4000, seed=i).window for i in range(3)])
    return RegimeLatentDataset.of(windows, RegimeRule.fit([windows.measures]))


def test_windows_are_bounded() -> None:
    """However many bars there are, about so many windows are held, spread over all of them."""
    some = collected([HISTORY, HISTORY], most=20)
    assert 10 <= len(some) <= 22
    assert some.end.max() - some.end.min() > 0.8 * (len(HISTORY) - first_end())


def test_a_label_depends_on_no_later_bar() -> None:
    """Whatever stands after a bar, measures and regime of the window that ends there keep their bits."""
    ends = np.arange(first_end(), len(HISTORY), 7)
    rule = RegimeRule.fit([measured(HISTORY, ends)])
    for at in (first_end() + 70, 3100):
        poisoned = HISTORY.values.copy()
        poisoned[at + 1 :, :4] *= np.linspace(2, 9, len(poisoned) - at - 1)[:, None]
        before = ends[ends <= at]
        clean, dirty = (
            measured(Window("SYM", HISTORY.close_times, values), before)
            for values in (HISTORY.values, poisoned)
        )
        for name in ("usual", "level", "way", "fall"):
            assert getattr(clean, name).tobytes() == getattr(dirty, name).tobytes()
        assert (rule.labels(clean) == rule.labels(dirty)).all()


def test_the_rule_tells_what_was_simulated() -> None:
    """Windows of the busy regime are volatile or crises, those of the quiet one hardly ever."""
    s = simulate("SYM", 20_000, seed=5, levels=(0.0015, 0.006), switch=0.001)
    ends = np.arange(first_end(), len(s.window), 16)
    rule = RegimeRule.fit([measured(s.window, ends)])
    share = np.array([s.regime[k - BARS + 1 : k + 1].mean() for k in ends])
    found = rule.labels(measured(s.window, ends))
    assert np.isin(found, [2, 3])[share == 1].mean() > 2 * np.isin(found, [2, 3])[share == 0].mean() + 0.2
    fell = measured(s.window, ends).fall
    assert fell[found == REGIMES.index("crisis")].min() >= rule.fallen
    assert set(found) == {0, 1, 2, 3}


def test_measures_of_a_window_are_what_they_say() -> None:
    """Level, way and fall of one window by hand."""
    k = 2000
    r = np.diff(np.log(HISTORY.values[:, 3]))
    own = r[k - BARS : k]
    before = [np.sqrt((r[j - BARS : j] ** 2).mean()) for j in range(k - BARS, k - 2048 - 1, -16) if j >= BARS]
    m = measured(HISTORY, np.array([k]))
    way = np.concatenate([[0], own.cumsum()])
    walk = np.sqrt((own**2).mean() * BARS)
    np.testing.assert_allclose(m.usual, np.median(before), rtol=1e-9)
    np.testing.assert_allclose(m.level, np.log(np.sqrt((own**2).mean()) / np.median(before)), rtol=1e-7)
    np.testing.assert_allclose(m.way, abs(way[-1]) / walk, rtol=1e-9)
    np.testing.assert_allclose(m.fall, (way.max() - way[-1]) / walk, rtol=1e-9)


def test_too_short_or_still_histories_are_refused() -> None:
    """One sentence says how many bars are needed."""
    with pytest.raises(DataError, match=f"no window of {BARS} bars that move has {LEAST} bars before it"):
        collected([HISTORY.part(0, first_end())])
    still = np.ones((3000, 5))
    with pytest.raises(DataError, match="give longer histories"):
        collected([Window("SYM", HISTORY.close_times[:3000], still)])
    with pytest.raises(ConfigError, match="rule"):
        RegimeRule(float("nan"), 1.0, 1.0, 1.0)
    assert len(measured(HISTORY, np.zeros(0, np.int64))) == 0


def test_returns_are_read_from_a_latent_again() -> None:
    """Encoding is invertible; a row of the image is WIDTH bars that follow each other."""
    windows = collected([HISTORY])
    r = torch.from_numpy(windows.returns)
    scale = LatentScale.measure(r)
    x = scale.encode(r)
    assert x.shape == (len(r), len(CHANNELS), HEIGHT, WIDTH)
    torch.testing.assert_close(scale.decode(x).float(), r, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(scale.consistent(x), x, rtol=1e-3, atol=1e-4)
    moved = r[:1].clone()
    moved[0, 5 * WIDTH + 3] = 0.0
    changed = (scale.encode(moved) - x[:1]).abs()[0, 0]
    assert int(changed.argmax()) == 5 * WIDTH + 3


def test_references_are_of_their_regime_and_never_share_a_bar_with_the_source(
    dataset: RegimeLatentDataset,
) -> None:
    """All ids are right, a seed says the draw, and no reference overlaps the window it is for."""
    references = References(dataset)
    sources = torch.arange(len(dataset)).repeat(4)
    wanted = torch.randint(len(REGIMES), (len(sources),), generator=generator())
    drawn = references.draw(wanted, generator(1), sources)
    assert (dataset.regimes[drawn] == wanted).all()
    same = dataset.symbols[drawn] == dataset.symbols[sources]
    apart = (dataset.ends[drawn] - dataset.ends[sources]).abs()
    assert int(apart[same].min()) >= BARS
    batch = references.sample_style_batch(wanted, generator(1), sources)
    assert batch.shape == (len(sources), len(CHANNELS), HEIGHT, WIDTH)
    assert (batch == dataset.latents[drawn]).all()
    everyone = references.draw(torch.zeros(20_000, dtype=torch.int64), generator(2))
    assert set(everyone.tolist()) == set(references.indices[0].tolist())


def test_a_draw_looks_nothing_up(dataset: RegimeLatentDataset) -> None:
    """The windows of each regime are found once; drawing reads neither regimes nor places of the windows."""
    references = References(dataset)
    found = build_style_indices_cache(dataset)
    assert sorted(torch.cat(list(found.values())).tolist()) == list(range(len(dataset)))
    before = references.draw(torch.tensor([0, 3]), generator(), torch.tensor([1, 2]))
    nothing = torch.zeros(0, dtype=torch.int64)
    references.dataset = RegimeLatentDataset(dataset.latents, nothing, nothing, nothing, dataset.scale)
    after = references.draw(torch.tensor([0, 3]), generator(), torch.tensor([1, 2]))
    assert (before == after).all()


def test_a_regime_without_windows_is_named(dataset: RegimeLatentDataset) -> None:
    """Nothing is drawn in its place."""
    some = dataset.regimes != REGIMES.index("crisis")
    few = RegimeLatentDataset(
        dataset.latents[some], dataset.regimes[some], dataset.symbols[some], dataset.ends[some], dataset.scale
    )
    with pytest.raises(DataError, match="crisis"):
        References(few).draw(torch.tensor([0, 3]), generator())


def test_texture_is_compared_regime_by_regime() -> None:
    """Two regimes in each other's place are far apart, though the batch as a whole holds the same patches."""
    x, y = latents(8, 1), latents(8, 2)
    x[:4], y[4:] = 3 * x[:4], 3 * y[4:]
    regimes = torch.tensor([0] * 4 + [1] * 4)
    swapped = texture_distance(x, y, regimes, generator())
    right = texture_distance(x, y.flip(0), regimes, generator())
    pooled = texture_distance(x, y, torch.zeros(8, dtype=torch.int64), generator())
    assert swapped > 10 * right
    assert pooled < 0.2 * swapped
    assert texture_distance(x, x, regimes, generator(), max_samples=10**6) == 0
    with pytest.raises(ValueError, match="do not go together"):
        texture_distance(x, y[:3], regimes, generator())


def test_tails_do_not_drown_the_distance() -> None:
    """One wild number in ten thousand moves it by less than a tenth of a doubled volatility."""
    x, y, zero = latents(16, 1), latents(16, 2), torch.zeros(16, dtype=torch.int64)
    plain = texture_distance(x, y, zero, generator())
    wide = texture_distance(latents(16, 1, volatility=2.0), y, zero, generator())
    x[0, 0, 5, 5] = 1e6
    wild = texture_distance(x, y, zero, generator())
    assert abs(wild - plain) < 0.1 * (wide - plain)


def test_twice_the_patches_halve_the_variance() -> None:
    """Over 50 draws of the patches, in the same directions, of a batch of 48."""
    x, y, zero = latents(48, 1), latents(48, 2, volatility=1.5), torch.zeros(48, dtype=torch.int64)
    variance = {}
    for most in (4096, 8192):
        found = []
        for seed in range(50):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("barcast.models.transfer.losses.directions", lambda n, k, _: FIXED[:n, :k])
                found.append(float(texture_distance(x, y, zero, generator(seed), most, 4)))
        variance[most] = np.var(found)
    assert variance[8192] <= 0.5 * variance[4096]


FIXED = directions(36, 64, generator(9))


def test_directions_are_of_length_one() -> None:
    """And at right angles within a group."""
    torch.testing.assert_close(FIXED.norm(dim=0), torch.ones(64))
    torch.testing.assert_close(FIXED[:, :36].T @ FIXED[:, :36], torch.eye(36), atol=1e-5, rtol=0)


def test_self_similarity_knows_structure_and_not_texture() -> None:
    """0 for itself at any level and spread, also where some positions are looked at; chance for others."""
    x, other = latents(6, 1, side=32), latents(6, 2, side=32)
    assert self_similarity(x, x, generator()) == 0
    assert self_similarity(3 * x + torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None], x, generator()) < 1e-9
    assert self_similarity(other, x, generator()) > 0.3
    shuffled = x.flatten(2)[..., torch.randperm(1024, generator=generator())].reshape(x.shape)
    assert self_similarity(shuffled, x, generator()) > 0.3


class Largest(TorchDispatchMode):
    """Keeps the bytes of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.size = max(self.size, made.numel() * made.element_size())
        return made


def test_self_similarity_of_a_batch_takes_12_mib() -> None:
    """At 48 images of 32 x 32: all pairs of positions would take 16 times as much."""
    x, y = latents(48, 1, side=32), latents(48, 2, side=32)
    with Largest() as seen:
        self_similarity(x, y, generator())
    assert seen.size == 12 * 2**20


def test_energies_are_in_float32_under_autocast() -> None:
    """bf16 around them changes no bit."""
    x, y, zero = latents(4, 1), latents(4, 2), torch.zeros(4, dtype=torch.int64)
    plain = texture_distance(x, y, zero, generator()), self_similarity(x, y, generator())
    with torch.amp.autocast("cpu", dtype=torch.bfloat16):
        cast = texture_distance(x, y, zero, generator()), self_similarity(x, y, generator())
    assert [a.dtype for a in cast] == [torch.float32] * 2
    assert plain == cast


def test_energies_reach_the_latents() -> None:
    """Each has a gradient that is finite and not zero."""
    y, zero = latents(4, 2, volatility=2.0), torch.zeros(4, dtype=torch.int64)
    for energy in (
        lambda x: texture_distance(x, y, zero, generator()),
        lambda x: self_similarity(x, y, generator()),
        lambda x: divergence(lambda z, _: z**2, x, torch.zeros(4), generator()),
    ):
        x = latents(4, 1).requires_grad_()
        energy(x).backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.abs().sum() > 0


def test_divergence_of_a_linear_field_is_its_slope() -> None:
    """A velocity of a x has the divergence a in each direction."""
    x = latents(32, 1)
    found = divergence(lambda z, _: 0.7 * z, x, torch.zeros(32), generator())
    assert abs(float(found) - 0.49) < 0.02


def network(seed: int = 1) -> VelocityNetwork:
    """A small network whose last layer says something."""
    net = VelocityNetwork(TransferArchitecture(8, 8), generator(seed))
    with torch.no_grad():
        net.leave.weight.normal_(0, 0.1, generator=generator(2))
    return net.eval()


def test_guidance_is_between_no_regime_and_the_regime() -> None:
    """0 asks for none in particular, 3 for the regime as learnt, less lies between them and more beyond."""
    net, x, t = network(), latents(3), torch.full((3,), 0.5)
    regime = torch.tensor([0, 2, 3])
    with torch.no_grad():
        free, told = net(x, t, torch.full_like(regime, NULL)), net(x, t, regime)
        assert (guided(net, regime, 0)(x, t) == free).all()
        assert (guided(net, regime, 3)(x, t) == told).all()
        for scale, part in ((1.0, 19 / 27), (2.0, 26 / 27), (4.5, 1.5)):
            v = guided(net, regime, scale)(x, t)
            torch.testing.assert_close(v, free + part * (told - free))
    assert not torch.equal(free, told)


def test_labels_are_dropped_row_by_row() -> None:
    """.15 of the rows, not of the batches."""
    regimes = torch.zeros(48, dtype=torch.int64)
    g = generator()
    shares = [float((dropped(regimes, 0.15, g) == NULL).float().mean()) for _ in range(800)]
    assert abs(np.mean(shares) - 0.15) < 0.01
    assert np.std(shares) < 0.1


def test_solvers_follow_a_known_field() -> None:
    """dx / dt = x makes e of 1: Heun's error falls with the square of the steps, Euler's with the steps."""
    one = torch.ones(1, 4, 2, 2, dtype=torch.float64)
    errors = {
        (solver, n): abs(float(travel(lambda x, _: x, one, 0, 1, n, solver).mean()) - np.e)
        for solver in ("euler", "heun")
        for n in (10, 20)
    }
    assert 1.8 < errors["euler", 10] / errors["euler", 20] < 2.2
    assert 3.6 < errors["heun", 10] / errors["heun", 20] < 4.4
    back = travel(lambda x, _: x, travel(lambda x, _: x, one, 0, 1, 40, "heun"), 1, 0, 40, "heun")
    torch.testing.assert_close(back, one, rtol=1e-3, atol=0)


def saved_bytes(net: VelocityNetwork, steps: int, keep: bool) -> tuple[int, Tensor]:
    """Bytes that a way keeps for its gradient, and the gradient of the first layer."""
    kept = 0

    def keeps(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel() * x.element_size()
        return x

    net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keeps, lambda x: x):
        found = travel(guided(net, torch.tensor([1, 2]), 3), latents(2), 0, 1, steps, "heun", keep)
    found.square().mean().backward()
    assert net.enter.weight.grad is not None
    return kept, net.enter.weight.grad.clone()


def test_checkpointing_keeps_gradients_and_memory() -> None:
    """Gradients are those without it; each further step keeps hardly more than its latents."""
    net = network()
    _, plain = saved_bytes(net, 3, True)
    three, again = saved_bytes(net, 3, False)
    six, _ = saved_bytes(net, 6, False)
    whole, _ = saved_bytes(net, 6, True)
    torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-9)
    assert six - three <= 3 * 2 * latents(2).numel() * 4
    assert six < 0.05 * whole


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("stepz = 3", "stepz: unknown key; did you mean 'steps'?"),
        ("batch = 0", "batch = 0 cannot be: take 1 to 4096"),
        ("batch = 4.5", "batch = 4.5 is no whole number"),
        ("rate = -1.0", "rate = -1.0 cannot be"),
        ('solver = "rk4"', "solver = 'rk4' is unknown: choose one of euler, heun"),
        ("label_drop_prob = 1.0", "leaves no label"),
        ("width = 12", "take multiples of 8"),
        ("use_velocity_reg = 1", "is no true or false"),
        ("steps =", "not valid TOML"),
        (f"rate = 1{400 * '0'}", f"rate = 1{59 * '0'} cannot be: take a number from 0 on"),
        ("rate = inf", "rate = inf cannot be: take a number from 0 on"),
        ("rate = nan", "rate = nan cannot be: take a number from 0 on"),
    ],
)
def test_a_wrong_setting_is_one_sentence(tmp_path: Path, given: str, said: str) -> None:
    """It names file, key and remedy."""
    path = tmp_path / "stress.toml"
    path.write_text(given)
    with pytest.raises(ConfigError, match=f"^{path}: ") as raised:
        TransferConfig.load(path)
    assert said in str(raised.value)


def test_defaults_are_those_that_were_promised() -> None:
    """And an integer does for a number."""
    c = TransferConfig.of({"cfg_scale": 2}, "here")
    assert (c.batch, c.cfg_scale, NORM, c.label_drop_prob) == (48, 2, 1.0, 0.15)
    assert (c.max_samples, c.max_spatial_samples, c.use_gradient_checkpointing) == (8192, 256, True)


def test_statistics_of_normal_returns_are_known() -> None:
    """Volatility 1, a tail ratio of 2.91, no clustering; a way goes with itself, and against its mirror."""
    r = np.random.default_rng(0).standard_normal((400, BARS))
    assert abs(np.median(realised_volatility(r)) - 1) < 0.02
    assert abs(np.median(tail_ratio(2 * r)) - 2.91) < 0.1
    assert abs(square_correlations(r).mean()) < 0.01
    busy = np.repeat(np.random.default_rng(1).choice([1.0, 4.0], (400, BARS // 32)), 32, 1)
    assert square_correlations(busy * r).mean() > 0.1
    assert rank_correlation(r, r) == pytest.approx(1)
    assert rank_correlation(r, -r) == pytest.approx(-1)


def test_baselines_keep_one_side_each() -> None:
    """One keeps the way and takes the volatility, the other takes blocks of the target."""
    rng = np.random.default_rng(0)
    r, target = rng.standard_normal((20, BARS)), 3 * rng.standard_normal((30, BARS))
    scaled, drawn = rescaled(r, target, rng), bootstrapped(r, target, rng)
    assert rank_correlation(r, scaled) == pytest.approx(1)
    assert set(realised_volatility(scaled).round(9)) <= set(realised_volatility(target).round(9))
    assert np.isin(drawn, target).all()
    assert abs(np.median(rank_correlation(r, drawn))) < 0.4


def test_only_some_measures_are_taken() -> None:
    """A mask is taken through all of them."""
    m = Measures(*(np.arange(4.0) for _ in range(4)))
    assert m.only(np.array([True, False, False, True])).fall.tolist() == [0, 3]


def test_levels_are_those_of_real_windows() -> None:
    """At the quantile of the score among the middle nine in ten; in part below 3, beyond above it."""
    levels = np.tile(np.linspace(0.5, 1.4, len(PROBABILITIES)), (4, 1))
    parts: Any = SimpleNamespace(levels=levels, net=torch.nn.Identity())
    generator, own = StressScenarioGenerator(parts, "x"), np.array([-1.0, 0.0, 0.2])
    z = torch.tensor([-9.0, 0.0, 9.0])

    def wanted(cfg_scale: float) -> list[float]:
        return generator._wanted(own, np.array([3, 3, 3]), z, cfg_scale).tolist()

    assert wanted(3.0) == pytest.approx([0.5, 0.95, 1.4])
    assert wanted(2.0) == pytest.approx(own + 26 / 27 * (np.array(wanted(3.0)) - own))
    assert wanted(0.0) == pytest.approx(own.tolist())
    assert wanted(6.0) == pytest.approx([2.0, 1.9, 2.6])
