"""The network: its sizes, quantile map and noise, and that all of it can learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from barcast.models import ConfigError
from barcast.models.sssd.layers import CHOICES, PRESET, PRESETS, Architecture
from barcast.models.sssd.marginal import PROBABILITIES, QuantileMap, knot_scores, piecewise
from barcast.models.sssd.network import SSSD, sobol_normals
from barcast.models.trained import Trained

A = Architecture(features=5, channels=4, context=64, horizons=3, path=16, samples=256, members=4)
K = len(PROBABILITIES)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _map(seed: int, size: float = 0.3) -> QuantileMap:
    """A map of four members, each with weights and static knots of its own."""
    g = _generator(seed)
    quantiles = QuantileMap(A, g).eval()
    with torch.no_grad():
        for p in (quantiles.head, quantiles.enter_bias, quantiles.hidden_bias, quantiles.head_bias):
            p.normal_(0, size, generator=g)
        quantiles.static.copy_(torch.sort(torch.randn(4, 3, K, generator=g), -1).values)
    return quantiles


def test_the_map_starts_as_the_static_map() -> None:
    """Before training every member gives its static knots to any features, and the map their mean."""
    quantiles = QuantileMap(A, _generator())
    quantiles.static.copy_(torch.sort(torch.randn(4, 3, K, generator=_generator()), -1).values)
    features = torch.randn(7, 5, generator=_generator(1))
    with torch.no_grad():
        torch.testing.assert_close(quantiles.of_members(features), quantiles.static.expand(7, -1, -1, -1))
        mean = quantiles.static.double().mean(0)
        torch.testing.assert_close(quantiles.average(features), mean.expand(7, -1, -1))


def test_the_map_is_the_mean_of_its_members() -> None:
    """The members differ, and the map's knots are their mean in double precision."""
    quantiles, features = _map(1), torch.randn(7, 5, generator=_generator(2))
    with torch.no_grad():
        members = quantiles.of_members(features)
        assert members.shape == (7, 4, 3, K)
        assert (members - members.roll(1, 1)).abs().amin((0, 2, 3)).min() > 0
        assert quantiles.average(features).dtype == torch.float64
        assert torch.equal(quantiles.average(features), members.double().mean(1))


def test_a_member_is_a_function_of_its_own_features_and_weights() -> None:
    """Other features or other weights of one member change its knots and no bit of the others."""
    quantiles, features = _map(1), torch.randn(7, 4, 5, generator=_generator(2))
    other = features.clone()
    other[:, 2] += 1
    changed = _map(1)
    with torch.no_grad():
        for p in (*changed.parameters(), changed.static):
            p[2] *= 1.5
        before, fed, weighed = quantiles(features), quantiles(other), changed(features)
    for after in (fed, weighed):
        assert [torch.equal(after[:, m], before[:, m]) for m in range(4)] == [True, True, False, True]


def test_a_member_is_a_perceptron_between_its_static_knots() -> None:
    """Knots are the median moved, and spacings scaled by at most e to the 1.5, as written out for one."""
    quantiles, features = _map(3), torch.randn(1, 5, generator=_generator(2))
    with torch.no_grad():
        found = quantiles.of_members(features)[0].double()
        for m in range(4):
            w = {name: p[m].double() for name, p in quantiles.named_parameters()}
            x = features.double()
            for layer in ("enter", "hidden"):
                x = torch.nn.functional.silu(x @ w[layer] + w[f"{layer}_bias"])
            out = (x @ w["head"] + w["head_bias"]).reshape(3, K + 1)
            static = quantiles.static[m].double()
            bend = 1.5 * torch.tanh((out[:, 1:2] + out[:, 2:]) / 1.5)
            steps = torch.diff(static, dim=-1) * torch.exp(bend)
            middle = static[:, K // 2] + out[:, 0]
            expected = [
                middle + (steps[:, K // 2 : k].sum(1) if k >= K // 2 else -steps[:, k : K // 2].sum(1))
                for k in range(K)
            ]
            torch.testing.assert_close(found[m], torch.stack(expected, -1), rtol=1e-4, atol=1e-4)


@given(st.integers(0, 10_000), st.floats(0.1, 100))
@settings(max_examples=50, deadline=None)
def test_the_map_rises_whatever_its_weights(seed: int, size: float) -> None:
    """Knots rise for any weights and features, however extreme, of each member and of the map."""
    quantiles = _map(seed, size)
    features = 10 * torch.randn(5, 5, generator=_generator(seed))
    with torch.no_grad():
        for knots in (quantiles.of_members(features), quantiles.average(features)):
            assert (torch.diff(knots.double(), dim=-1) >= 0).all()


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
    """After training the knots depend on the features."""
    with torch.no_grad():
        knots = trained.net.map.average(torch.randn(2, len(trained.scaling.mean), generator=_generator()))
    assert not torch.equal(knots[0], knots[1])


SHAPE = {"features": 50, "channels": 4, "context": 64, "horizons": 3, "path": 16, "samples": 256}


def _count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_presets_are_named_sizes() -> None:
    """Each is found again by its sizes, whatever the data; the default has those of an architecture's."""
    for name in PRESETS:
        assert Architecture.of(name, **SHAPE).preset == name
        assert Architecture.of(name, **(SHAPE | {"features": 7}), members=2).preset == name
    assert Architecture.of(PRESET, **SHAPE) == Architecture(**SHAPE)
    assert Architecture(**SHAPE, width=97).preset is None
    assert Architecture(**SHAPE, head="unet1d").preset is None
    assert len({tuple(sizes) for sizes in PRESETS.values()}) == 1


def test_presets_grow() -> None:
    """A larger preset has more parameters in every part."""
    nets = [SSSD(Architecture.of(name, **SHAPE), _generator()) for name in PRESETS]
    for part in ("map", "encoder", "denoiser"):
        counts = [_count(getattr(net, part)) for net in nets]
        assert counts == sorted(set(counts)), part
    thousands = [round(_count(net) / 1000) for net in nets]
    assert thousands == [44, 210, 2162]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"width": 0}, "architecture.width is 0, not a whole number above 0"),
        ({"state": 16.0}, "architecture.state is 16.0, not a whole"),
        ({"blocks": True}, "architecture.blocks is True, not a whole"),
        ({"encoder": "lstm"}, "architecture.encoder is 'lstm', none of s4d, multiscale"),
        ({"head": 3}, "architecture.head is 3, none of mlp, unet1d"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int], said: str) -> None:
    """The field, its value and what it may be are named."""
    with pytest.raises(ConfigError, match=said):
        Architecture(**(SHAPE | sizes))
    with pytest.raises(ConfigError, match="preset 'huge' is unknown: take one of tiny, small, base"):
        Architecture.of("huge", **SHAPE)


@pytest.mark.parametrize("encoder", CHOICES["encoder"])
@pytest.mark.parametrize("head", CHOICES["head"])
def test_every_parameter_learns(encoder: str, head: str) -> None:
    """After two steps of training every parameter of encoder and head has a gradient, and has moved."""
    a = Architecture(**(SHAPE | {"features": 5}), denoiser=8, encoder=encoder, head=head)
    net = SSSD(a, _generator()).train()
    begun = {name: p.clone() for name, p in net.named_parameters()}
    optimiser = torch.optim.SGD(net.parameters(), 1e-2)
    g = _generator(1)
    features, sequence = torch.randn(8, 5, generator=g), torch.randn(8, 64, 4, generator=g)
    x, target, lam = (torch.randn(shape, generator=g) for shape in ((8, 3, 16), (8, 3, 16), (8, 3)))
    for _ in range(2):
        optimiser.zero_grad()
        c = net.encoder(features, sequence)[:, None].expand(-1, 3, -1)
        v = net.denoiser(x, net.denoiser.modulation(c, lam))
        ((v - target) ** 2).sum().backward()
        optimiser.step()
    for name, p in net.named_parameters():
        if not name.startswith("map."):
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name
            assert not torch.equal(p, begun[name]), name
