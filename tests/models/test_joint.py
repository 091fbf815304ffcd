"""What paths say, against closed forms of Brownian motion and against simulation in small steps."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from barcast.models import ConfigError
from barcast.models.forecast import Forecast, Paths
from barcast.models.joint import (
    check_pairs,
    drawdown,
    first_passage,
    outlook,
    path_quantiles,
    touch,
)

N = NormalDist()
SIGMA = 0.01
PAIRS = np.array([(1, 1), (2, 1), (0.5, 0.5), (0.1, 2), (3, 0.2)]) * SIGMA


def brownian(steps: int, samples: int, seed: int = 0, sd: float = SIGMA) -> Paths:
    """Paths of a Brownian motion whose standard deviation at the last step is `sd`."""
    bridge = np.full(steps, sd / np.sqrt(steps))
    moves = bridge * np.random.default_rng(seed).standard_normal((samples, steps))
    return Paths(tuple(range(1, steps + 1)), moves.cumsum(1), bridge)


def simulated(start: float, end: float, s: float, up: float, down: float, seed: int) -> tuple[float, float]:
    """Which barrier a bridge touches first, by simulation: 40,000 bridges of 512 steps.

    Between its steps each crossing of a single barrier is drawn, so that nothing is missed.
    """
    rng, n = np.random.default_rng(seed), 40_000
    price, alive = np.full(n, start), np.ones(n, bool)
    hits = [0, 0]
    left = 512
    dt = s * s / left
    for k in range(left, 0, -1):
        mean = price + (end - price) / k
        after = mean + np.sqrt(dt * (k - 1) / k) * rng.standard_normal(n)
        over = (after >= up) | (rng.random(n) < np.exp(-2 * np.maximum(up - price, 0) * (up - after) / dt))
        under = (after <= -down) | (
            rng.random(n) < np.exp(-2 * np.maximum(price + down, 0) * (after + down) / dt)
        )
        hits[0] += int((alive & over & ~(under & (after < 0))).sum())
        hits[1] += int((alive & under & ~(over & (after >= 0))).sum())
        alive &= ~(over | under)
        price = after
    return hits[0] / n, hits[1] / n


def one(start: float, end: float, s: float) -> Paths:
    """A path that is at `start` for sure, and then bridges to `end`."""
    return Paths((1, 2), np.array([[start, end]]), np.array([0.0, s]))


@pytest.mark.parametrize(
    ("start", "end", "s", "up", "down"),
    [
        (0.0, 0.0, 1.0, 0.5, 0.5),
        (0.2, -0.3, 1.0, 0.6, 0.5),
        (0.0, 0.9, 1.0, 0.5, 0.4),
        (0.0, -0.7, 1.0, 1.5, 0.5),
        (0.1, 0.2, 2.0, 0.5, 0.5),
        (-0.2, 0.1, 0.3, 0.3, 0.4),
    ],
)
def test_bridge_between_two_barriers_is_that_of_a_simulation(start, end, s, up, down):
    """Also where it ends beyond a barrier and where both compete: within four errors of 40,000 bridges."""
    found = touch(one(start, end, s), up, down)
    for seen, said in zip(simulated(start, end, s, up, down, seed=3), found, strict=True):
        assert abs(seen - said.item()) < 4 * np.sqrt(said.item() * (1 - said.item()) / 40_000) + 1e-3


def test_one_barrier_is_the_closed_form():
    """A bridge from a to b exceeds u with exp(-2 (u - a)(u - b) / s^2) where the other barrier is far."""
    found = touch(one(0.1, -0.2, 1.0), [0.4, 0.9], [50.0, 50.0])
    np.testing.assert_allclose(found.up, np.exp(-2 * np.array([0.3 * 0.6, 0.8 * 1.1])), rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_paths_of_brownian_motion_have_its_first_passages(steps):
    """However fine the steps: mixed over the closes, the bridges are the motion itself."""
    up, down = PAIRS.T
    found, exact = touch(brownian(steps, 40_000), up, down), first_passage(up, down, SIGMA)
    np.testing.assert_allclose(found.up, exact.up, atol=0.008)
    np.testing.assert_allclose(found.down, exact.down, atol=0.008)


def test_first_passage_of_brownian_motion():
    """One barrier is the reflection principle, far time the gambler's ruin; both together are known."""
    one_sided = first_passage([0.5, 1.0, 2.0], 60.0, 1.0)
    np.testing.assert_allclose(one_sided.up, [2 * N.cdf(-x) for x in (0.5, 1.0, 2.0)], rtol=1e-12)
    ruin = first_passage(1.0, 3.0, 40.0)
    assert (ruin.up.item(), ruin.down.item()) == (pytest.approx(0.75), pytest.approx(0.25))
    # staying within -1 to 1 for the time 1: (4/pi) sum (-1)^k / (2k+1) exp(-(2k+1)^2 pi^2 / 8)
    k = np.arange(8)
    stay = (4 / np.pi * (-1.0) ** k / (2 * k + 1) * np.exp(-((2 * k + 1) ** 2) * np.pi**2 / 8)).sum()
    both = first_passage(1.0, 1.0, 1.0)
    assert 1 - both.up - both.down == pytest.approx(stay, rel=1e-10)


def test_probabilities_move_smoothly():
    """A barrier a little further is touched a little less: no path of the 256 is counted in or out."""
    distances = np.linspace(1.0, 1.01, 60) * SIGMA
    steps = -np.diff(touch(brownian(16, 256), distances, SIGMA).up)
    assert (steps > 0).all()
    assert steps.max() < 0.1 / 256


def test_wide_intervals_need_more_terms():
    """One interval ten times as wide as the barriers are apart: the gambler's ruin, to many digits."""
    found = touch(one(0.0, 0.0, 10.0), 0.25, 0.75)
    assert found.up.item() == pytest.approx(0.75, abs=2e-3)
    assert found.up.item() + found.down.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("wide", [30.0, 100.0, 1e3, 1e9])
def test_the_widest_intervals_touch_one_of_both(wide):
    """However wide, up and down are certain together, and narrow barriers beside are what they are alone."""
    paths = one(0.0, 0.2, wide)
    found = touch(paths, [0.25, 2.0], [0.75, 900.0])
    assert found.up[0] == pytest.approx(0.75, abs=1e-3)
    np.testing.assert_allclose(found.up[0] + found.down[0], 1, atol=1e-9)
    alone = touch(paths, 2.0, 900.0)
    np.testing.assert_allclose([found.up[1], found.down[1]], [alone.up[0], alone.down[0]], atol=1e-12)
    assert found.up[1] + found.down[1] <= 1 + 1e-9


def test_nothing_between_the_steps():
    """Without bridges only closes touch, and the first of them decides; at the barrier is touched."""
    paths = Paths((1, 2, 3), np.array([[0.5, -3, 3], [-1, 2, 0], [0.5, 0.6, 0.7], [1, 0, 0]]), np.zeros(3))
    found = touch(paths, [1.0, 0.65], [1.0, 3.5])
    np.testing.assert_allclose(found.up, [0.25, 1.0])
    np.testing.assert_allclose(found.down, [0.5, 0.0])


def test_barriers_without_width_are_touched_at_once():
    """A quiet forecast has barriers at the price itself; both at once count half each."""
    up, down = [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]
    for found in (touch(brownian(4, 8), up, down), first_passage(up, down, 1.0), first_passage(up, down, 0)):
        np.testing.assert_array_equal(found.up, [0.5, 1, 0])
        np.testing.assert_array_equal(found.down, [0.5, 0, 1])
    still = Paths((1, 2), np.zeros((3, 2)), np.zeros(2))
    assert [x.item() for x in touch(still, 1e-9, 1e-9)] == [0, 0]
    assert first_passage(1.0, 1.0, 0.0) == (0, 0)


@st.composite
def some(draw):
    """Paths of any shape, and a pair of barriers."""
    seed, steps, samples = draw(st.tuples(st.integers(0, 999), st.integers(1, 6), st.integers(1, 9)))
    rng = np.random.default_rng(seed)
    scale = draw(st.sampled_from([1e-5, 0.01, 3.0]))
    bridge = scale * rng.exponential(size=steps) * draw(st.sampled_from([0.0, 0.1, 1.0]))
    paths = Paths(tuple(range(1, steps + 1)), scale * rng.standard_normal((samples, steps)).cumsum(1), bridge)
    return paths, scale * draw(st.floats(0.2, 6)), scale * draw(st.floats(0.2, 6))


@given(some(), st.floats(1.0, 3.0))
def test_touching_is_a_probability_and_falls_with_distance(case, further):
    """Up and down are at most 1 together; a barrier that is further is touched less, the other one more."""
    paths, up, down = case
    near, far = touch(paths, up, down), touch(paths, further * up, down)
    for found in (near, far):
        assert min(found.up.item(), found.down.item()) >= 0
        assert found.up.item() + found.down.item() <= 1 + 1e-9
    assert far.up.item() <= near.up.item() + 1e-9
    assert far.down.item() >= near.down.item() - 1e-9


@given(some())
def test_mirror(case):
    """Paths upside down touch what they touched, the other way round, in any company."""
    paths, up, down = case
    other = Paths(paths.steps, -paths.returns, paths.bridge)
    found, mirrored = touch(paths, [up, 2 * up], [down, down]), touch(other, down, up)
    assert mirrored.up.item() == pytest.approx(found.down[0], abs=1e-12)
    assert mirrored.down.item() == pytest.approx(found.up[0], abs=1e-12)


def test_drawdown_of_known_paths():
    """From the highest close so far, the reference among them, on average over the paths."""
    returns = np.array([[0.1, 0.3, 0.2], [-0.2, -0.1, -0.4], [0.1, 0.2, 0.3]])
    assert drawdown(Paths((1, 2, 3), returns, np.ones(3))) == pytest.approx((0.1 + 0.4 + 0) / 3)


def test_drawdown_of_brownian_motion():
    """In many steps it is that of Brownian motion, sqrt(pi / 2) times its deviation."""
    found = drawdown(brownian(2000, 4000, sd=1.0))
    assert found == pytest.approx(np.sqrt(np.pi / 2), abs=0.04)  # less 0.58 / sqrt(2000) for each extreme


def test_path_quantiles_read_back_what_was_put_in():
    """S rising values put at the levels (k - 1/2) / S are found there again, in any order of the paths."""
    levels = (np.arange(8) + 0.5) / 8
    rising = np.stack([levels, levels**2, np.exp(levels)], 1)
    shuffled = np.random.default_rng(0).permuted(rising, axis=0)
    paths = Paths((1, 2, 4), shuffled, np.zeros(3))
    np.testing.assert_allclose(path_quantiles(paths, levels.tolist()), rising.T, rtol=1e-14)
    assert path_quantiles(paths, (0.05, 0.5, 0.95)).shape == (3, 3)


def forecast(paths):
    sd = np.array([0.5, 1.0]) * SIGMA
    q = np.outer(sd, [-1.6, 0, 1.6])
    return Forecast("A", 1, 100.0, (2, 4), (0.05, 0.5, 0.95), q, 0 * sd, sd, 0 * sd + 0.5, False, paths=paths)


def test_outlook_counts_in_deviations_of_the_longest_horizon():
    """A pair of 2 and 1 is twice and once the last standard deviation away."""
    paths = brownian(4, 64)
    found = outlook(forecast(paths), ((2.0, 1.0), (1.0, 1.0)))
    said = touch(paths, [2 * SIGMA, SIGMA], [SIGMA, SIGMA])
    assert (found.pairs, found.std, found.drawdown) == (((2.0, 1.0), (1.0, 1.0)), SIGMA, drawdown(paths))
    np.testing.assert_array_equal(found.touch, said)
    with pytest.raises(ValueError, match="no paths"):
        outlook(forecast(None), ((1.0, 1.0),))


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([(1.0, 1.0)] * 2, "repeats"),
        ([(1.0 + k, 1.0) for k in range(9)], "more than 8"),
        ([(0.0, 1.0)], "each from 0.1 to 10"),
        ([(1.0, float("nan"))], "1, nan cannot be"),
        ([(float("inf"), 1.0)], "each from 0.1 to 10"),
    ],
)
def test_pairs_that_cannot_be(pairs, said):
    """What is no barrier is named, with what would be one."""
    with pytest.raises(ConfigError, match=said):
        check_pairs(pairs)
