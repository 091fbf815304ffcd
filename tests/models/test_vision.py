"""Series as images: what is where, and what depends on what."""

import numpy as np
import pytest
import torch
from torch import Tensor

from barcast.models.ldm4ts import vision


def waves(*periods: float, length: int = 96) -> Tensor:
    """A wave of each period, with some noise."""
    rng = np.random.default_rng(1)
    t = np.arange(length)
    return torch.from_numpy(
        np.stack([np.sin(2 * np.pi * t / p) + 0.3 * rng.normal(size=length) for p in periods])
    )


def test_an_image_reaches_from_the_first_to_the_last() -> None:
    """Of more numbers than pixels, too: the newest bar and the farthest step are shown."""
    for length, n in ((96, 64), (64, 48), (5, 64), (1, 8), (1999, 64)):
        shown = vision._spread(torch.arange(length)[None].float(), n)[0]
        assert (shown[0], shown[-1]) == (0, length - 1)
        assert (shown.diff() >= 0).all()


@pytest.mark.parametrize("of", [6, 8, 12, 24, 48])
def test_the_period_is_that_of_the_strongest_wave(of: int) -> None:
    """Of each series its own, whatever else is in the batch, to the bit."""
    together = vision.period(waves(of, 32, 6))
    assert int(together[0]) == int(vision.period(waves(of))[0]) == of
    assert together.tolist()[1:] == [32, 6]


def test_a_series_of_no_waves_has_the_longest_period() -> None:
    """As of prices that rest; it is never longer than the series."""
    assert vision.period(torch.zeros(2, 200)).tolist() == [64, 64]
    assert vision.period(torch.ones(1, 20)).tolist() == [20]


def test_segments_are_columns_of_a_period_the_newest_bar_at_the_end() -> None:
    """Each pixel is one bar: rows go through a period, columns through periods, by the period of each row."""
    history = torch.arange(12.0)[None].expand(2, -1)
    found = vision.segments(history, torch.tensor([4, 6]), 12, 12)
    for image, period in zip(found, (4, 6), strict=True):
        columns = np.arange(12.0).reshape(-1, period).T
        expected = columns.repeat(12 // period, 0).repeat(period, 1)
        np.testing.assert_array_equal(image, expected)
    short = vision.segments(history[:1, :5], torch.tensor([4]), 4, 2)[0]
    assert short.T.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4]]


def test_angles_and_distances() -> None:
    """The Gramian field is the cosine of the sum of angles, the recurrence plot 1 where values are equal."""
    x, y = torch.tensor([[-1.0, -0.3, 0.4]]), torch.tensor([[0.4, 1.0]])
    angles = torch.arccos(x)[:, :, None] + torch.arccos(y)[:, None]
    torch.testing.assert_close(vision.gramian(x, y), torch.cos(angles))
    near = vision.recurrence(x, y)[0]
    assert near[2, 0] == 1
    assert near.argmin() == 1
    assert near.min() > -1


@pytest.mark.parametrize("size", vision.SIZES)
def test_nothing_on_the_left_depends_on_what_is_to_come(size: int) -> None:
    """Nor on other rows; what is to come is on the right of every channel, and can be left out."""
    g = torch.Generator().manual_seed(3)
    history, periods = torch.randn(3, 64, generator=g).cumsum(1) / 8, torch.tensor([24, 12, 7])
    ways = [torch.randn(3, 16, generator=g) for _ in range(2)]
    a, b = (vision.images(history, periods, way, size) for way in ways)
    without = vision.images(history, periods, None, size)
    left = size - size // 4
    assert a.shape == (3, 3, size, size)
    assert torch.equal(a[..., :left], b[..., :left])
    assert torch.equal(a[..., :left], without[..., :left])
    assert without[..., left:].abs().max() == 0
    assert all((a[:, c, :, left:] != b[:, c, :, left:]).any() for c in range(3))
    assert a.abs().max() <= 1
    alone = vision.images(history[1:2], periods[1:2], ways[0][1:2], size)
    assert torch.equal(alone[0], a[1])
    steps = vision.squashed(ways[0][1])[torch.linspace(0, 15, size, dtype=torch.float64).round().long()]
    assert torch.equal(a[1, 0, :, -1], steps)
