"""The structured state-space layer: what it computes, at any length and after any training."""

from math import log, pi

import pytest
import torch

from barcast.models.sssd import s4d
from barcast.models.sssd.s4d import S4D


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("L", [1, 2, 64, 128, 129, 500])
def test_convolution_is_its_recurrence(L: int) -> None:
    """The convolution of a sequence equals the recurrence x' = A x + u, y = 2 Re(C x) + D u, step by step."""
    layer = S4D(6, 4, _generator()).eval()
    u = torch.randn(2, 6, L, generator=_generator(1))
    with torch.no_grad():
        A, C = layer.discretise()
        x = torch.zeros(2, 6, 4, dtype=torch.complex128)
        y, stepped, state = [], [], None
        for k in range(L):
            x = A * x + u[..., k, None]
            y.append(2 * (C * x).sum(-1).real + layer.D * u[..., k])
            out, state = layer.step(u[..., k], state)
            stepped.append(out)
        expected = torch.stack(y, -1)
        tolerance = 1e-5 * expected.abs().max()
        assert (layer(u) - expected).abs().max() < tolerance
        assert (layer.newest(u) - expected[..., -1]).abs().max() < tolerance
        assert (torch.stack(stepped, -1) - expected).abs().max() < tolerance


def test_the_transform_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above and below the length where the way changes both ways give the same, gradients included."""
    layer = S4D(6, 4, _generator())
    u = torch.randn(2, 6, 300, generator=_generator(1), requires_grad=True)
    found = []
    for direct in (0, 1000):
        monkeypatch.setattr(s4d, "DIRECT", direct)
        y = layer(u)
        gradients = torch.autograd.grad((y * torch.sin(y)).sum(), [u, *layer.parameters()])
        found.append([y.detach(), *gradients])
    for transform, product in zip(*found, strict=True):
        assert (transform - product).abs().max() < 1e-5 * product.abs().max()


@pytest.mark.parametrize("L", [64, 300])
def test_it_is_causal(L: int) -> None:
    """Later inputs do not change earlier outputs; by the transform, by no more than rounding."""
    layer = S4D(6, 4, _generator()).eval()
    u = torch.randn(1, 6, L, generator=_generator(1))
    later = u.clone()
    later[..., 40:] += 1
    with torch.no_grad():
        change = (layer(u) - layer(later)).abs()
    assert change[..., :40].max() < (1e-5 if s4d.DIRECT < L else 1e-30)
    assert change[..., 40:].amin((0, 1)).max() > 0.1


def test_it_begins_as_s4d_lin() -> None:
    """A_n = -1/2 + i pi n (Gu et al. 2022, eq. 9), and dt is between 0.005 and 0.3."""
    layer = S4D(5, 7, _generator())
    expected = torch.complex(torch.full((7,), -0.5), pi * torch.arange(7)).to(torch.complex128)
    torch.testing.assert_close(layer.poles(), expected.expand(5, -1), rtol=1e-6, atol=1e-6)
    assert (log(0.005) <= layer.log_dt).all()
    assert (layer.log_dt <= log(0.3)).all()


@pytest.mark.parametrize("rate", [1.0, 1e3])
@pytest.mark.parametrize("L", [64, 300])
def test_its_poles_stay_left_of_zero(rate: float, L: int) -> None:
    """After steps at a rate far too large it is still stable: Re A < 0, |exp(dt A)| < 1, a finite kernel."""
    layer = S4D(6, 4, _generator())
    u = torch.randn(4, 6, L, generator=_generator(1))
    optimiser = torch.optim.SGD(layer.parameters(), rate)
    for direction in (1, -1, -1):
        optimiser.zero_grad()
        (direction * torch.tanh(layer(u)).sum()).backward()
        optimiser.step()
        assert (layer.poles().real < 0).all()
        assert (layer.discretise()[0].abs() < 1).all()
        assert torch.isfinite(layer.kernel(L)).all()
    with torch.no_grad():
        for extreme in (-1e30, 1e30):
            layer.log_A_real.fill_(extreme)
            for dt in (-1e30, 1e30):
                layer.log_dt.fill_(dt)
                assert (layer.poles().real < 0).all()
                assert (layer.discretise()[0].abs() < 1).all()
                assert torch.isfinite(layer.kernel(L)).all()


def test_its_kernel_is_kept_while_nothing_is_learnt() -> None:
    """A kernel is computed once in eval mode, and anew after the weights may have changed."""
    layer = S4D(6, 4, _generator()).eval()
    with torch.inference_mode():
        before = layer.kernel(64)
        assert layer.kernel(64) is before
        assert layer.kernel(65) is not before
    layer.train()
    with torch.no_grad():
        layer.C.mul_(2)
    layer.eval()
    torch.testing.assert_close(layer.kernel(64), 2 * before)


def test_what_is_made_of_a_kernel_is_forgotten_with_it() -> None:
    """In eval mode a layer says what its weights of now say: of two lengths in turn, and after a change."""
    layer, u = S4D(6, 4, _generator()).eval(), torch.randn(1, 6, 64, generator=_generator(1))
    for _ in range(2):
        expected = [(layer(v).detach(), layer.newest(v).detach()) for v in (u, u[..., 9:])]  # nothing is kept
        with torch.inference_mode():
            for v, (whole, newest) in (*zip((u, u[..., 9:]), expected, strict=True), ((u, expected[0]))):
                assert torch.equal(layer(v), whole)
                assert torch.equal(layer.newest(v), newest)
        layer.train()
        with torch.no_grad():
            layer.C.mul_(2)
            layer.D.add_(1)
        layer.eval()


@pytest.mark.parametrize("training", [True, False])
def test_each_step_of_a_training_has_a_kernel_of_its_own(training: bool) -> None:
    """Two steps one after another run, in eval mode too, and after a forecast."""
    layer = S4D(6, 4, _generator()).train(training)
    u = torch.randn(2, 6, 64, generator=_generator(1))
    with torch.inference_mode():
        layer(u)
    losses = []
    for _ in range(2):
        loss = (layer(u) ** 2).mean()
        layer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in layer.parameters():
                p -= 0.01 * p.grad  # type: ignore[operator]
        losses.append(loss.item())
    assert losses[1] < losses[0]
