"""The heads of the denoiser, and the embedding of horizons."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barcast.models import ConfigError
from barcast.models.sssd.head import Denoiser, HorizonEmbedding, build_head
from barcast.models.sssd.layers import CHOICES, Architecture

HEADS = CHOICES["head"]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _head(name: str, steps: int, learnt: bool = True, **sizes: int) -> Denoiser:
    """A head for paths of some steps; what it has learnt is random."""
    given = {"features": 5, "channels": 4, "context": 64, "horizons": 1, "path": steps, "samples": 256}
    head = build_head(Architecture(**given, **sizes, head=name), _generator()).eval()
    if learnt:
        with torch.no_grad():
            head.leave.weight.normal_(0, 0.1, generator=_generator(1))
    return head


def _v(head: Denoiser, x: torch.Tensor, code: float = 1.0, lam: float = 0.0) -> torch.Tensor:
    with torch.no_grad():
        c = torch.linspace(-code, code, 48).expand(*x.shape[:-1], -1)
        return head(x, head.modulation(c, torch.full(x.shape[:-1], lam)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", HEADS)
def test_a_head_begins_with_zero(name: str) -> None:
    """Until it has learnt the velocity is zero for every x, context and noise level."""
    head = _head(name, 16, learnt=False)
    assert not _v(head, 10 * torch.randn(7, 16, generator=_generator()), 5.0, -3.0).any()


@pytest.mark.parametrize("name", HEADS)
@given(steps=st.integers(1, 33))
def test_any_number_of_steps_will_do(name: str, steps: int) -> None:
    """Paths of any length from one step on: the velocity has their shape and depends on every step."""
    head = _head(name, steps, denoiser=8)
    x = torch.randn(steps, generator=_generator(steps)).expand(steps + 1, -1)
    moved = x + torch.cat([torch.zeros(1, steps), torch.eye(steps)])  # the first as it was
    v = _v(head, moved)
    assert v.shape == (steps + 1, steps)
    assert torch.isfinite(v).all()
    change = (v[1:] - v[0]).abs()
    assert (change.amax(1) > 0).all()
    assert (change.diagonal() > 0).all()


@pytest.mark.parametrize("name", HEADS)
def test_a_head_listens_to_context_and_noise_level(name: str) -> None:
    """Another context and another noise level give another velocity at every step."""
    head = _head(name, 16)
    x = torch.randn(1, 16, generator=_generator())
    v = _v(head, x)
    assert (_v(head, x, 2.0) - v).abs().min() > 0
    assert (_v(head, x, lam=2.0) - v).abs().min() > 0


@pytest.mark.parametrize("name", HEADS)
def test_one_modulation_serves_all_samples(name: str) -> None:
    """A modulation of each window is broadcast over its samples, as if it had been given for each."""
    head = _head(name, 16)
    g = _generator(2)
    x, c, lam = (torch.randn(shape, generator=g) for shape in ((2, 5, 16), (2, 48), (2,)))
    with torch.no_grad():
        film = head.modulation(c, lam)[:, None]
        every = head.modulation(c[:, None].expand(-1, 5, -1), lam[:, None].expand(-1, 5))
        torch.testing.assert_close(head(x, film), head(x, every), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(head(x, film)[1, 3:4], head(x[1, 3:4], film[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("windows", [1, 3])
def test_a_velocity_has_the_bits_of_its_head(name: str, windows: int) -> None:
    """What a sampler asks is the head under the modulation of each noise level, to the bit."""
    head = _head(name, 16)
    g = _generator(2)
    x, c, lam = (torch.randn(shape, generator=g) for shape in ((windows, 32, 16), (windows, 48), (5,)))
    with torch.inference_mode():
        velocity = head.at(lam)(c)
        film = head.modulation(c.expand(5, -1, -1), lam[:, None].expand(-1, windows))[:, :, None]
        expected = [head(x, each) for each in film]
        assert all(torch.equal(velocity(x, i), v) for i, v in enumerate(expected))
        assert not torch.equal(expected[0], expected[1])


def test_the_unet_knows_where_on_the_path_it_is() -> None:
    """A path of equal steps has unequal velocities far from its ends, too, and only by the embedding."""
    head = _head("unet1d", 64)
    found = _v(head, torch.zeros(1, 64))[0, 24:40]
    with torch.no_grad():
        head.step.zero_()
    assert _v(head, torch.zeros(1, 64))[0, 24:40].std() < 0.1 * found.std()


@pytest.mark.parametrize("steps", [3, 16, 32])
def test_sizes_of_the_heads(steps: int) -> None:
    """At its standard sizes the U-Net has one to five million parameters, the perceptron far fewer."""
    counts = {name: sum(p.numel() for p in _head(name, steps).parameters()) for name in HEADS}
    assert 1_500_000 < counts["unet1d"] < 2_000_000
    assert 25_000 < counts["mlp"] < 50_000
    one = sum(p.numel() for p in _head("unet1d", steps, blocks=1).parameters())
    assert 1_000_000 < one < counts["unet1d"]


def test_horizons_are_told_apart_by_their_length() -> None:
    """Horizons in another order give their rows in that order, to the bit; close ones are close."""
    embedding = HorizonEmbedding((5, 15, 60, 240), 32, _generator())
    with torch.no_grad():
        rows = embedding((5, 15, 60, 240))
        assert rows.shape == (4, 32)
        assert torch.equal(embedding((240, 5, 60, 15)), rows[[3, 0, 2, 1]])
        assert torch.equal(embedding((60,)), rows[2:3])
        assert torch.pdist(rows).min() > 0.1
        near = HorizonEmbedding((5, 60, 61), 32, _generator())((5, 60, 61))
    assert (near[1] - near[2]).norm() < 0.2 * (near[0] - near[1]).norm()


def test_horizons_that_are_not_known_are_refused() -> None:
    """By name, with those that are known; nor can horizons be known twice, or be none."""
    embedding = HorizonEmbedding((5, 15, 60), 8, _generator())
    with pytest.raises(ConfigError, match="horizon 7 is unknown: take from 5, 15, 60, or train another"):
        embedding((5, 7))
    for horizons in ((), (5, 5), (0, 5)):
        with pytest.raises(ConfigError, match="cannot be used: give different lengths above 0"):
            HorizonEmbedding(horizons, 8, _generator())


def test_the_embedding_of_horizons_learns() -> None:
    """Two steps run, and what is stored of it are the weights alone."""
    embedding = HorizonEmbedding((5, 15, 60), 8, _generator())
    for _ in range(2):
        embedding.zero_grad()
        (embedding((15, 60)) ** 2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in embedding.parameters())
    assert set(embedding.state_dict()) == {"layer.weight", "layer.bias"}
