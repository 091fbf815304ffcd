"""The optimiser's loop: what it keeps, when it ends, and that nothing but the options changes its bits."""

from collections.abc import Callable
from math import nan
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from barcast.models import ConfigError, DataError
from barcast.models.optimiser import (
    PATIENCE,
    Budget,
    Fitted,
    Phase,
    Progress,
    Share,
    StateFile,
    fit,
    processes,
)

BATCH, STEPS = 8, 24


class Lines(nn.Module):
    """Three lines to be fitted to points that a generator draws, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.utils.skip_init(nn.Linear, 3, 1) for _ in range(3))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(0.25)


def _phases(net: Lines, look: Callable[[nn.Module], float] | None = None) -> list[Phase]:
    x = torch.arange(30.0).reshape(10, 3) / 10

    def phase(n: int) -> Phase:
        part = net.parts[n]

        def loss(share: Share) -> Tensor:
            x = share.rows(torch.randn(BATCH, 3, generator=share.generator))
            mean: Tensor = ((part(x)[:, 0] - x.sum(1) * (n + 1)) ** 2).mean()
            return mean

        def score() -> list[float]:
            if look is not None:
                return [look(part)]
            return [float(((part(x)[:, 0] - x.sum(1) * (n + 1)) ** 2).mean())]

        return Phase(f"line {n}", [part], 0.05, loss, score, lambda: None)

    return [phase(n) for n in range(3)]


def _fit(
    net: Lines,
    *,
    accumulate: int = 1,
    precision: str = "fp32",
    look: Callable[[nn.Module], float] | None = None,
    file: StateFile | None = None,
    budget: Budget = Budget(STEPS),  # noqa: B008
    progress: Callable[[Progress], None] = lambda _: None,
) -> Fitted:
    accelerator = processes(precision, accumulate, BATCH)
    generator = Generator().manual_seed(3)
    return fit(net, _phases(net, look), budget, generator, accelerator, file, progress)


def _bits(net: nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in net.parameters())


@pytest.fixture(scope="module")
def whole() -> tuple[Lines, Fitted]:
    net = Lines()
    return net, _fit(net)


def test_every_phase_learns_and_keeps_what_validation_likes_best(whole: tuple[Lines, Fitted]) -> None:
    """Each phase ends with the candidate of the least score, and step 0 is one of them."""
    _, fitted = whole
    for name, chosen in fitted.chosen.items():
        scores = {c.step: c.crps for c in fitted.candidates if c.phase == name}
        assert list(scores)[::12] == [0, STEPS]
        [best] = chosen
        assert scores[best] == min(scores.values()) < 0.7 * scores[0]
    assert list(fitted.chosen) == ["line 0", "line 1", "line 2"]
    assert not fitted.capped
    assert fitted.stopped == ()


def test_each_epoch_has_both_losses(whole: tuple[Lines, Fitted]) -> None:
    """A candidate holds the fast loss averaged over its epoch, and progress counts steps of all phases."""
    seen: list[Progress] = []
    fitted = _fit(Lines(), progress=seen.append)
    assert fitted == whole[1]
    ends = {(p.phase, p.step): (p.crps, p.loss) for p in seen if p.crps is not None}
    assert ends == {(c.phase, c.step): (c.crps, c.loss) for c in fitted.candidates}
    assert [c.loss is None for c in fitted.candidates] == [c.step == 0 for c in fitted.candidates]
    assert [p.done for p in seen if p.step] == list(range(1, 3 * STEPS + 1))
    assert {p.total for p in seen} == {3 * STEPS}


def test_a_phase_ends_when_validation_no_longer_improves() -> None:
    """After some looks without a better one a phase ends with the weights of the best, and says so."""
    net = Lines()
    fitted = _fit(net, look=lambda part: 1.0)
    assert fitted.chosen == {"line 0": (0,), "line 1": (0,), "line 2": (0,)}
    assert fitted.stopped == ("line 0", "line 1", "line 2")
    assert len(fitted.candidates) == 3 * (1 + PATIENCE)
    assert _bits(net) == _bits(Lines())


class Members(nn.Module):
    """Two numbers, of which each rises with every step."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(2, 1))
        self.rate = nn.Parameter(torch.ones(2))


def _fit_members(
    look: Callable[[Tensor], list[float]], file: StateFile | None = None
) -> tuple[Members, Fitted]:
    net = Members()

    def loss(share: Share) -> Tensor:
        total: Tensor = -(net.value[:, 0] * net.rate).mean()
        return total

    phase = Phase("both", [net], 0.05, loss, lambda: look(net.value[:, 0]), lambda: None, members=2)
    accelerator = processes("fp32", 1, BATCH)
    return net, fit(net, [phase], Budget(STEPS), Generator().manual_seed(3), accelerator, file)


def test_each_member_keeps_the_weights_that_were_its_own_best() -> None:
    """Members that are best at different looks end with the weights of different steps; scores are means."""
    seen: list[list[float]] = []

    def look(value: Tensor) -> list[float]:
        seen.append(value.tolist())
        return [abs(float(value[0]) - 0.1), abs(float(value[1]) - 0.3)]

    net, fitted = _fit_members(look)
    first, second = fitted.chosen["both"]
    assert 0 < first < second < STEPS
    steps = [c.step for c in fitted.candidates]
    for m, (chosen, best) in enumerate(((first, 0.1), (second, 0.3))):
        own = [abs(value[m] - best) for value in seen]
        assert steps[own.index(min(own))] == chosen
        assert float(net.value[m, 0].detach()) == seen[own.index(min(own))][m]
    for value, c in zip(seen, fitted.candidates, strict=True):
        assert c.crps == pytest.approx((abs(value[0] - 0.1) + abs(value[1] - 0.3)) / 2)


def test_a_phase_goes_on_as_long_as_one_member_improves() -> None:
    """One member that improves is enough; when none does any more, the phase ends."""
    _, fitted = _fit_members(lambda value: [1.0, -float(value[1])])
    assert fitted.stopped == ()
    assert fitted.chosen == {"both": (0, STEPS)}
    _, fitted = _fit_members(lambda value: [1.0, 1.0])
    assert fitted.stopped == ("both",)
    assert fitted.chosen == {"both": (0, 0)}


def test_weights_of_the_start_give_way_only_to_a_margin() -> None:
    """A gain below the margin leaves step 0 chosen; once it is beaten, any better look counts."""

    def chosen(scores: list[float]) -> tuple[int, ...]:
        left = iter(scores)
        net = Members()
        phase = Phase(
            "both",
            [net],
            0.05,
            lambda share: -net.value.mean(),
            lambda: [next(left)],
            lambda: None,
            margin=0.1,
        )
        generator, accelerator = Generator().manual_seed(3), processes("fp32", 1, BATCH)
        return fit(net, [phase], Budget(5), generator, accelerator).chosen["both"]

    assert chosen([1.0, 0.95, 0.91, 0.905, 0.93, 0.95]) == (0,)
    assert chosen([1.0, 0.95, 0.89, 0.885, 0.93, 0.95]) == (3,)


def test_one_member_without_a_number_is_a_fault() -> None:
    """A score that is not a number ends the training, whatever the others say."""
    with pytest.raises(DataError, match="came apart in the phase both"):
        _fit_members(lambda value: [1.0, nan])


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_parts_of_a_batch_are_the_same_optimisation(whole: tuple[Lines, Fitted], accumulate: int) -> None:
    """However many parts a batch has, the numbers drawn are the same: only sums are rounded otherwise."""
    net = Lines()
    fitted = _fit(net, accumulate=accumulate)
    assert fitted.chosen == whole[1].chosen
    for p, q in zip(net.parameters(), whole[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_half_precision_is_of_the_losses_only(whole: tuple[Lines, Fitted]) -> None:
    """With bf16 the weights stay float32, differ from those of fp32, and learn the same."""
    net = Lines()
    _fit(net, precision="bf16")
    for p, q in zip(net.parameters(), whole[0].parameters(), strict=True):
        assert p.dtype == torch.float32
        assert not torch.equal(p, q)
        torch.testing.assert_close(p, q, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("at", [0, 1, 2, 7, 24, 25, 31, 50, 73])
def test_an_interrupted_training_ends_with_the_same_bits(
    whole: tuple[Lines, Fitted], tmp_path: Path, at: int
) -> None:
    """Interrupted anywhere and started again, weights, candidates and choices are those of one run."""
    calls = 0

    def interrupt(p: Progress) -> None:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise KeyboardInterrupt

    file, notes = StateFile(tmp_path / "state", "key"), []
    with pytest.raises(KeyboardInterrupt):
        _fit(Lines(), file=file, progress=interrupt)
    net = Lines()
    fitted = _fit(net, file=file, progress=lambda p: notes.append(p.note))
    assert fitted == whole[1]
    assert _bits(net) == _bits(whole[0])
    assert [note for note in notes if note] == ([notes[0]] if at else [])
    assert ("goes on" in notes[0]) == (at > 0)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_state_of_something_else_is_not_gone_on_from(whole: tuple[Lines, Fitted], tmp_path: Path) -> None:
    """Other bars or options, and a damaged file: the training begins anew, and says so."""
    path, notes = tmp_path / "state", []
    _fit(Lines(), file=StateFile(path, "other"))
    for damage, words in ((0, "of other bars, options or versions"), (200, "is damaged")):
        content = bytearray(path.read_bytes())
        content[200] ^= damage
        path.write_bytes(content)
        net = Lines()
        fitted = _fit(net, file=StateFile(path, "key"), progress=lambda p: notes.append(p.note))
        assert fitted == whole[1]
        assert _bits(net) == _bits(whole[0])
        assert words in notes.pop(0)
        notes.clear()


def test_a_state_that_cannot_be_kept_is_a_fault(tmp_path: Path) -> None:
    """A folder that is not there ends in a sentence that names the file."""
    with pytest.raises(ConfigError, match=r"nowhere/state\.new: No such file"):
        _fit(Lines(), file=StateFile(tmp_path / "nowhere" / "state", "key"))


def test_a_cap_ends_a_phase_or_is_too_small_for_a_step() -> None:
    """A cap is kept by every phase; one that leaves no time for a single step is refused."""
    ticks = iter(range(10_000))
    fitted = _fit(Lines(), budget=Budget(STEPS, 5.0, lambda: float(next(ticks))))
    assert fitted.capped
    assert max(c.step for c in fitted.candidates) == 5
    assert fitted.stopped == ()
    with pytest.raises(ConfigError, match="cap of 0 s on the phase line 0 leaves no time for a step"):
        _fit(Lines(), budget=Budget(STEPS, 0.0, lambda: float(next(ticks))))


def test_a_training_that_comes_apart_is_a_fault() -> None:
    """A score that is not a number ends with phase, step and remedy; fp32 is none where it is used."""
    with pytest.raises(DataError, match=r"came apart in the phase line 0 before step 0 .* in the bars$"):
        _fit(Lines(), look=lambda _: nan)
    with pytest.raises(DataError, match=r"in the bars, or train with fp32$"):
        _fit(Lines(), look=lambda _: nan, precision="bf16")


@pytest.mark.parametrize(
    ("precision", "accumulate", "words"), [("fp8", 1, "precision 'fp8'"), ("fp32", 3, "3 parts")]
)
def test_impossible_ways_to_compute_are_refused(precision: str, accumulate: int, words: str) -> None:
    """A precision that there is not, and a batch that does not divide, raise ConfigError with the value."""
    with pytest.raises(ConfigError, match=words):
        processes(precision, accumulate, BATCH)


@pytest.mark.parametrize("look", [None, lambda part: 1.0])
def test_a_cap_that_cuts_nothing_short_is_not_recorded(look: Callable[[nn.Module], float] | None) -> None:
    """Time that runs out with the last step, or where a phase ends by itself, changes nothing."""
    net, other = Lines(), Lines()
    whole = _fit(net, look=look)
    last = STEPS if look is None else PATIENCE * (STEPS // 12)
    now = 0.0

    def count(p: Progress) -> None:
        nonlocal now
        now += p.step == last - 1  # the cap is over at the last step of every phase

    assert _fit(other, look=look, budget=Budget(STEPS, 0.5, lambda: now), progress=count) == whole
    assert not whole.capped
    assert _bits(net) == _bits(other)
