"""The network's parts: state-space layer, quantile map, noise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from barcast.models.sssd import (
    PROBABILITIES,
    S4D,
    Architecture,
    QuantileMap,
    knot_scores,
    piecewise,
    sobol_normals,
)
from barcast.models.trained import Trained

A = Architecture(features=5, channels=4, context=64, horizons=3, samples=256)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("L", [1, 2, 64, 300])
def test_s4d_convolution_is_its_recurrence(L: int) -> None:
    """The convolution of a sequence equals the recurrence x' = A x + u, y = 2 Re(C x) + D u, step by step."""
    layer = S4D(6, 4, _generator()).eval()
    u = torch.randn(2, 6, L, generator=_generator(1))
    with torch.no_grad():
        A, C = layer.discretise()
        x = torch.zeros(2, 6, 4, dtype=torch.complex128)
        y = []
        for k in range(L):
            x = A * x + u[..., k, None]
            y.append(2 * (C * x).sum(-1).real + layer.D * u[..., k])
        expected = torch.stack(y, -1)
        assert (layer(u) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_s4d_is_causal() -> None:
    """Later inputs do not change earlier outputs."""
    layer = S4D(6, 4, _generator()).eval()
    u = torch.randn(1, 6, 64, generator=_generator(1))
    later = u.clone()
    later[..., 40:] = 100.0
    with torch.no_grad():
        assert (layer(u) - layer(later))[..., :40].abs().max() < 1e-3


def test_s4d_keeps_its_kernel_in_eval_mode_only() -> None:
    """A kernel is computed once in eval mode, and anew after the weights may have changed."""
    layer = S4D(6, 4, _generator()).eval()
    before = layer.kernel(64)
    assert layer.kernel(64) is before
    layer.train()
    with torch.no_grad():
        layer.C.mul_(2)
    layer.eval()
    torch.testing.assert_close(layer.kernel(64), 2 * before)


def test_the_map_starts_as_the_static_map() -> None:
    """Before training every context gets the static knots."""
    quantiles = QuantileMap(A)
    quantiles.static.copy_(torch.sort(torch.randn(3, len(PROBABILITIES), generator=_generator()), -1).values)
    c = torch.randn(7, A.code, generator=_generator(1))
    with torch.no_grad():
        torch.testing.assert_close(quantiles(c), quantiles.static.expand(7, -1, -1))


@given(st.integers(0, 10_000), st.floats(0.1, 100))
@settings(max_examples=50, deadline=None)
def test_the_map_rises_whatever_its_weights(seed: int, size: float) -> None:
    """Knots rise for any weights and contexts, however extreme."""
    g = _generator(seed)
    quantiles = QuantileMap(A)
    with torch.no_grad():
        quantiles.head.weight.normal_(0, size, generator=g)
        knots = quantiles(10 * torch.randn(5, A.code, generator=g)).double()
    assert (torch.diff(knots, dim=-1) >= 0).all()


def test_piecewise_is_linear_between_and_beyond_its_knots() -> None:
    """Between knots the map interpolates like numpy; beyond them it goes on with the last slope."""
    xs = torch.tensor([[0.0, 1.0, 3.0], [-1.0, 0.0, 0.5]], dtype=torch.float64)
    ys = torch.tensor([[0.0, 2.0, 3.0], [5.0, 6.0, 9.0]], dtype=torch.float64)
    inside = torch.tensor([[0.0, 0.4, 1.0, 2.9, 3.0], [-1.0, -0.2, 0.0, 0.1, 0.5]], dtype=torch.float64)
    expected = [np.interp(inside[i], xs[i], ys[i]) for i in range(2)]
    np.testing.assert_allclose(piecewise(inside, xs, ys), expected)
    beyond = torch.tensor([[-1.0, 5.0], [-2.0, 1.5]], dtype=torch.float64)
    np.testing.assert_allclose(piecewise(beyond, xs, ys), [[-2.0, 4.0], [4.0, 15.0]])


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_the_map_can_be_turned_round(seed: int) -> None:
    """The map from scores to outcomes and back gives the scores."""
    g = _generator(seed)
    knots = torch.cumsum(0.01 + torch.rand(4, 3, len(PROBABILITIES), generator=g, dtype=torch.float64), -1)
    u = 3 * torch.randn(4, 3, 20, generator=g, dtype=torch.float64)
    scores = knot_scores().expand(knots.shape)
    torch.testing.assert_close(piecewise(piecewise(u, scores, knots), knots, scores), u)


def test_knot_scores_are_normal_quantiles() -> None:
    """Knots sit at the normal scores of their probabilities, symmetric around the median."""
    np.testing.assert_allclose(knot_scores(), norm.ppf(PROBABILITIES), atol=1e-12)
    np.testing.assert_allclose(knot_scores() + knot_scores().flip(0), 0, atol=1e-12)


def test_the_noise_is_normal_and_belongs_to_its_seed() -> None:
    """Fixed noise has the quantiles of a normal, far closer than random draws, and follows its seed alone."""
    noise = sobol_normals(256, 3, 5)
    torch.testing.assert_close(noise, sobol_normals(256, 3, 5), rtol=0, atol=0)
    assert not torch.equal(noise, sobol_normals(256, 3, 6))
    expected = norm.ppf((np.arange(256) + 0.5) / 256)
    for column in noise.T:
        assert np.abs(np.sort(column.numpy()) - expected)[2:-2].max() < 0.15
        assert np.abs(np.sort(column.numpy()) - expected).mean() < 0.01


def test_training_moves_the_map(trained: Trained) -> None:
    """After training the knots depend on the context."""
    generator = _generator()
    with torch.no_grad():
        knots = trained.net.map(torch.randn(2, trained.net.architecture.code, generator=generator))
    assert not torch.equal(knots[0], knots[1])
