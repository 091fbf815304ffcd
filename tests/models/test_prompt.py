"""The statistics that are told of a history."""

import torch
from torch import Generator

from barcast.models.ldm4ts.prompt import COUNT, LAGS, autocorrelation, numbers


def test_the_strongest_lags_are_those_of_the_period() -> None:
    """Of a wave of 8 bars: 8, 16, 24, 32, as shares of half a history; strengths fall as fewer bars meet."""
    wave = torch.sin(torch.arange(128) * 2 * torch.pi / 8)[None]
    found = numbers(wave, wave, wave)[0]
    assert found[6].item() * 64 == 8
    strongest = (found[6 : 6 + LAGS] * 64).round().int().tolist()
    assert set(strongest) >= {8, 16, 24, 32}
    assert 0.9 < found[6 + LAGS] <= 1


def test_autocorrelation_is_that_of_its_definition() -> None:
    """Sums of products of what is `lag` bars apart, over those of lag 0."""
    x = torch.randn(3, 40, generator=Generator().manual_seed(1))
    y = (x - x.mean(1, keepdim=True)).double()
    by_hand = torch.stack([(y[:, k:] * y[:, :-k]).sum(1) / (y**2).sum(1) for k in range(1, 21)], 1)
    torch.testing.assert_close(autocorrelation(x), by_hand.float())


def test_a_row_is_told_by_itself() -> None:
    """To the bit; still series and short ones have finite numbers too."""
    g = Generator().manual_seed(2)
    way, moves, ranges = (torch.randn(4, 64, generator=g) for _ in range(3))
    ranges[2] = 1.5
    found = numbers(way, moves, ranges)
    assert found.shape == (4, COUNT)
    for i in range(4):
        assert torch.equal(found[i : i + 1], numbers(way[i : i + 1], moves[i : i + 1], ranges[i : i + 1]))
    short = torch.zeros(1, 6)
    assert torch.isfinite(numbers(short, short, short)).all()


def test_extremes_trend_and_turbulence() -> None:
    """In the units that were given."""
    way = torch.tensor([[-3.0, -1.0, -2.0, 0.0]])
    moves = torch.tensor([[1.0, 1.0, 1.0, 3.0]])
    found = numbers(way, moves, moves)[0]
    assert found[:4].tolist() == [-3.0, 0.0, -2.0, -3.0]
    assert found[4] == moves.std(correction=0)
    assert found[5] == 0
