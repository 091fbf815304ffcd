"""Training an `SSSDModel`: by the product's loop, and by a loop of one's own with the aids of diffusers."""

from math import cos, pi

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor

from barcast.models import ConfigError, DataError, optimiser
from barcast.models.optimiser import Fitted, Progress
from barcast.models.sssd import SSSDConfig, SSSDModel, fit
from tests.models import seeds

ROWS, SHORT = 900, 12


def _config(**training: object) -> SSSDConfig:
    return SSSDConfig.from_dict(seeds.TABLES | {"training": seeds.TABLES["training"] | training})


@pytest.fixture(scope="module")
def trained() -> tuple[SSSDModel, Fitted]:
    model, x = SSSDModel(seeds.config()), seeds.features(ROWS)
    return model, fit(model, x, seeds.targets(x))


def test_it_learns_what_the_features_tell(trained: tuple[SSSDModel, Fitted]) -> None:
    """On rows never seen the means follow what is known, and intervals of 90 % hold about as much."""
    model, fitted = trained
    assert fitted.candidates[0].crps > fitted.candidates[-1].crps
    assert not model.training
    n = 600
    x = seeds.features(n, seed=8)
    y = seeds.targets(x, seed=9)
    found = model.inference_forward(x, [0, 1, 2], num_samples=100, num_steps=20, sampler="dpmpp")
    known = 1e-3 * (1 - seeds.NOISE**2) ** 0.5
    for h, best in ((0, x["5m"][:, -1, 0]), (1, x["1h"][:, -1, 1])):
        error = ((found[h]["mean"] - known * best) ** 2).mean()
        assert error < 0.25 * known**2  # 1 is that of a model that knows nothing
    assert found[2]["mean"].std() < 0.2e-3
    for h in range(3):
        inside = (found[h]["q05"] <= y[:, h]) & (y[:, h] <= found[h]["q95"])
        assert 0.84 < float(inside.float().mean()) < 0.95


@pytest.fixture(scope="module")
def short() -> SSSDModel:
    model, x = SSSDModel(_config(steps=SHORT)), seeds.features(ROWS)
    fitted = fit(model, x, seeds.targets(x))
    assert fitted.chosen["denoiser"][0] > 0  # it is not the model that nothing has taught
    return model


def test_training_is_a_function_of_rows_settings_and_seed(short: SSSDModel) -> None:
    """Trained again, whatever other numbers were drawn before, all weights have the same bits."""
    model, x = SSSDModel(_config(steps=SHORT)), seeds.features(ROWS)
    torch.manual_seed(77)
    fit(model, x, seeds.targets(x))
    mine, theirs = model.state_dict(), short.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_newest_rows_only_choose(trained: tuple[SSSDModel, Fitted]) -> None:
    """Centre and spread, and every step, come from the older five sixths alone."""
    x = seeds.features(ROWS)
    y = seeds.targets(x)
    older = ROWS - ROWS // 6
    torch.testing.assert_close(trained[0].centre, y[:older].mean(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(trained[0].spread, y[:older].std(0, correction=0), rtol=0, atol=1e-9)
    losses: list[list[float | None]] = [[], []]
    for seen, factor in zip(losses, (1, 5), strict=True):
        model = SSSDModel(_config(steps=5))
        other = torch.cat([y[:older], factor * y[older:]])

        def note(p: Progress, seen: list[float | None] = seen) -> None:
            seen.append(p.loss)

        fit(model, x, other, note)
    assert losses[0] == losses[1]


def test_the_weights_are_averaged_as_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """What forecasts is a_k = d a_{k-1} + (1 - d) p_k of the weights p_k after k steps, d = k / (k + 9)."""
    monkeypatch.setattr(optimiser, "PATIENCE", 99)
    model, x = SSSDModel(_config(steps=10)), seeds.features(60)
    passed: list[Tensor] = []
    raw = SSSDModel.loss

    def loss(self: SSSDModel, *batch: Tensor) -> Tensor:
        passed.append(self.leave.weight.detach().clone())
        return raw(self, *batch)

    monkeypatch.setattr(SSSDModel, "loss", loss)
    judged: list[Tensor] = []
    context = SSSDModel.context

    def look(self: SSSDModel, features: dict[str, Tensor]) -> Tensor:
        if not self.training:
            judged.append(self.leave.weight.detach().clone())
        return context(self, features)

    monkeypatch.setattr(SSSDModel, "context", look)
    fit(model, x, seeds.targets(x))
    average = passed[0].clone()
    for k in range(1, 10):  # after k steps; `passed` holds the weights before each
        average = k / (k + 9) * average + (1 - k / (k + 9)) * passed[k]
        torch.testing.assert_close(judged[k], average, rtol=0, atol=1e-7)
    assert not torch.equal(judged[9], passed[9])


def test_a_loop_of_ones_own_with_the_aids_of_diffusers() -> None:
    """AdamW, a warm-up of 500 of 10,000 steps and averaged weights: rates and average are those by hand."""
    model = seeds.model()
    x = seeds.features(16)
    y = seeds.targets(x)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimiser, num_warmup_steps=500, num_training_steps=10_000)
    averaged = EMAModel(model.parameters(), decay=0.9)
    average = model.leave.bias.detach().clone()
    for step in range(1, 6):
        model.training_step((x, y))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        averaged.step(model.parameters())
        decay = 0.0 if step == 1 else min(0.9, step / (step + 9))
        average = decay * average + (1 - decay) * model.leave.bias.detach()
    shadow = dict(zip((n for n, _ in model.named_parameters()), averaged.shadow_params, strict=True))
    torch.testing.assert_close(shadow["leave.bias"], average, rtol=0, atol=1e-7)

    [rate] = schedule.lr_lambdas
    for step in (0, 1, 250, 499, 500, 501, 5_000, 9_999, 10_000):
        warm = step / 500
        expected = warm if step < 500 else 0.5 * (1 + cos(pi * (step - 500) / 9_500))
        assert rate(step) == pytest.approx(expected, abs=1e-12)
    averaged.copy_to(model.parameters())
    assert torch.equal(model.leave.bias, shadow["leave.bias"])


def test_half_precision_changes_the_loss_by_less_than_a_hundredth() -> None:
    """Under bf16 autocast on the CPU the loss stays within 1 %."""
    model, x = seeds.model(), seeds.features(64)
    y = seeds.targets(x)
    t, eps = torch.arange(64) * 15, torch.randn(64, 3, generator=seeds.generator())
    full = float(model.loss(x, y, t, eps).detach())
    with torch.autocast("cpu", torch.bfloat16):
        half = float(model.loss(x, y, t, eps).detach())
    assert half != full
    assert half == pytest.approx(full, rel=0.01)


def test_parts_of_a_batch_have_its_gradient() -> None:
    """Four parts of eight rows, a quarter of each loss, give the gradient of the batch of 32."""
    model, x = seeds.model(), seeds.features(32)
    y = seeds.targets(x)
    t, eps = torch.arange(32) * 31, torch.randn(32, 3, generator=seeds.generator())
    model.loss(x, y, t, eps).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for k in range(4):
        at = slice(8 * k, 8 * k + 8)
        (model.loss({name: v[at] for name, v in x.items()}, y[at], t[at], eps[at]) / 4).backward()
    assert whole
    for name, p in model.named_parameters():
        if name in whole:
            assert p.grad is not None
            assert (p.grad - whole[name]).abs().max() < 1e-5 * max(1.0, float(whole[name].abs().max()))


def test_accumulation_and_precision_are_settings(short: SSSDModel) -> None:
    """A training in four parts ends with the same weights but for rounding, one in bf16 near them."""
    x = seeds.features(ROWS)
    apart = {}
    for name, value in (("gradient_accumulation_steps", 4), ("precision", "bf16")):
        model = SSSDModel(_config(steps=SHORT, **{name: value}))
        fit(model, x, seeds.targets(x))
        assert model.leave.weight.dtype is torch.float32
        gaps = zip(model.parameters(), short.parameters(), strict=True)
        apart[name] = max(float((a - b).detach().abs().max()) for a, b in gaps)
    assert 0 < apart["gradient_accumulation_steps"] < 1e-4 < apart["precision"] < 0.05


def test_rows_that_cannot_be_learnt_from_are_named() -> None:
    """Targets of another shape, too few, not finite or that never move; a batch that does not divide."""
    model, x = SSSDModel(seeds.config()), seeds.features(40)
    y = seeds.targets(x)
    with pytest.raises(ConfigError, match="the spread of outcomes is not known: call `standardise`"):
        model.training_step((x, y))
    with pytest.raises(
        DataError, match=r"targets of the shape \(34, 2\) cannot be learnt: give finite ones, \(34, 3\)"
    ):
        fit(model, x, y[:, :2])
    with pytest.raises(DataError, match=r"targets of the shape \(34, 3\) cannot be learnt"):
        fit(model, x, y.masked_fill(y == y[3, 1], torch.nan))
    with pytest.raises(DataError, match="the targets of the horizon 15 minutes never move"):
        fit(model, x, y * torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ConfigError, match="a batch of 64 does not divide into 3 parts"):
        fit(SSSDModel(_config(gradient_accumulation_steps=3)), x, y)
    with pytest.raises(DataError, match="40 of 5m, 40 of 1h and 39 rows of targets cannot be learnt"):
        fit(model, x, y[:39])
    few = {name: value[:5] for name, value in x.items()}
    with pytest.raises(DataError, match=r"5 of 5m, 5 of 1h and 5 rows of targets cannot .* at least 6"):
        fit(model, few, y[:5])
    model.standardise(y)
    with pytest.raises(DataError, match=r"targets of the shape \(1, 3\) cannot be learnt: give finite ones"):
        model.training_step((x, y[:1]))
