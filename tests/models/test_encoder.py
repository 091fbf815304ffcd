"""The encoders: what they see, and that they see nothing later."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from barcast.models.scaling import CHANNELS, Scaling
from barcast.models.sssd.encoder import BLOCKS, Encoder, MultiScaleS4D, blocks
from barcast.models.sssd.layers import CHOICES, Architecture
from barcast.models.window import Window


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _encoder(name: str) -> Encoder:
    sizes = {"features": 5, "channels": CHANNELS, "context": 64, "horizons": 3, "path": 16, "samples": 256}
    return Encoder(Architecture(**sizes, encoder=name), _generator()).eval()


@pytest.mark.parametrize("name", CHOICES["encoder"])
def test_the_encoder_sees_features_and_the_whole_sequence(name: str) -> None:
    """The context depends on every feature, and on every channel of the oldest as of the newest step."""
    encoder = _encoder(name)
    x, s = torch.randn(1, 5, generator=_generator(1)), torch.randn(1, 64, 4, generator=_generator(2))
    with torch.no_grad():
        c = encoder(x, s)
        for k in (0, 63):
            for channel in range(4):
                other = s.clone()
                other[:, k, channel] += 1
                assert not torch.equal(encoder(x, other), c)
        for f in range(5):
            other = x.clone()
            other[:, f] += 1
            assert not torch.equal(encoder(other, s), c)


@pytest.mark.parametrize("name", CHOICES["encoder"])
def test_later_bars_change_no_bit_of_a_context(name: str, scaled: tuple[Scaling, Window]) -> None:
    """The context of a bar is the same whatever the bars after it: through scale, sequence and blocks."""
    scaling, window = scaled
    encoder, at = _encoder(name), len(window) - 50
    values = window.values.copy()
    values[at:] *= np.linspace(1.5, 3, 50)[:, None]
    poisoned = Window(window.symbol, window.close_times, values)
    contexts = []
    for w in (window, poisoned):
        frame = scaling.frame(w.symbol, w.close_times, w.values, at - 20)
        rows = torch.from_numpy(frame.channels).float()
        ends = range(at - 20, len(w))  # the sequence of bar k is rows k - 64 to k - 1
        sequences = torch.stack([rows[k - 64 : k] for k in ends])
        with torch.no_grad():
            each = [encoder(torch.zeros(1, 5), sequence[None]) for sequence in sequences]
        contexts.append(torch.cat(each))
    before, after = contexts
    assert torch.equal(before[:20], after[:20])
    assert (before[20:] - after[20:]).abs().amax(1).min() > 0


@pytest.fixture(scope="module")
def scaled(trained, histories) -> tuple[Scaling, Window]:
    """A scaling and bars of its kind."""
    return trained.scaling, histories[0]


@given(st.integers(1, 70), st.integers(1, 20))
def test_the_newest_block_ends_with_the_newest_bar(L: int, size: int) -> None:
    """Whatever the length, blocks are counted from the end; too few bars for an oldest block are left out."""
    bars = torch.arange(1, L + 1).float()[None, :, None].expand(-1, -1, CHANNELS)
    found = blocks(bars, size)
    assert found.shape == (1, L // size, CHANNELS)
    if size <= L:
        assert found[0, -1, 2] == L
        assert torch.equal(found[0, :, 2].diff(), torch.full((L // size - 1,), float(size)))
        means = found[0, :, 1]
        torch.testing.assert_close(means[-1], bars[0, -size:, 0].mean())
        assert means[0] - (size - 1) / 2 == pytest.approx(1 + L % size)


def test_a_block_is_a_bar_of_a_higher_timeframe() -> None:
    """Returns add up, as large as one bar's; the last close's place counts; range and volume are means."""
    bars = torch.randn(3, 50, CHANNELS, generator=_generator())
    found = blocks(bars, 16)
    assert found.shape == (3, 3, CHANNELS)
    last = bars[:, 34:50]
    expected = [last[..., 0].sum(1) / 4, last[..., 1].mean(1), last[:, -1, 2], last[..., 3].mean(1)]
    torch.testing.assert_close(found[:, -1], torch.stack(expected, -1))
    many = torch.randn(1, 16 * 4000, CHANNELS, generator=_generator(1))
    assert blocks(many, 16)[..., 0].std().item() == pytest.approx(1, abs=0.05)


def _sequences(*lengths: int, channels: int = 4) -> list[Tensor]:
    return [torch.randn(2, L, channels, generator=_generator(L)) for L in lengths]


def test_every_timeframe_reaches_what_is_fused() -> None:
    """Its bars changed, oldest or newest, and its bars dropped, the state is another."""
    frames = MultiScaleS4D([4, 4, 4], 16, 4, 2, _generator()).eval()
    sequences = _sequences(64, 16, 4)
    with torch.no_grad():
        state, importance = frames(sequences)
        for t in range(3):
            for at in (0, -1):
                other = [s.clone() for s in sequences]
                other[t][:, at] += 1
                assert (frames(other).state - state).abs().amax(1).min() > 1e-5
            other[t] = torch.zeros_like(other[t])
            assert (frames(other).state - state).abs().amax(1).min() > 1e-3
    assert state.shape == (2, 16)
    assert importance.shape == (2, 3)
    assert importance.min() > 0
    torch.testing.assert_close(importance.sum(1), torch.ones(2))


def test_timeframes_may_differ_in_length_and_channels() -> None:
    """Any number of steps and inputs of each, and a batch of one gives what it gives among others."""
    frames = MultiScaleS4D([9, 9, 3, 1], 32, 8, 4, _generator()).eval()
    sequences = [
        torch.randn(5, L, n, generator=_generator(L)) for L, n in ((500, 9), (166, 9), (41, 3), (1, 1))
    ]
    with torch.no_grad():
        whole = frames(sequences)
        alone = frames([s[2:3] for s in sequences])
    assert whole.state.shape == (5, 32)
    torch.testing.assert_close(alone.state, whole.state[2:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.importance, whole.importance[2:3], rtol=1e-4, atol=1e-5)


def test_every_parameter_of_the_fusion_learns() -> None:
    """Query, keys, values, where a state comes from, and all layers of all timeframes have a gradient."""
    frames = MultiScaleS4D([4, 4, 4], 16, 4, 3, _generator()).train()
    for _ in range(2):
        frames.zero_grad()
        (frames(_sequences(64, 16, 4)).state ** 2).sum().backward()
    for name, p in frames.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_one_timeframe_is_all_there_is() -> None:
    """Alone it has all the importance."""
    frames = MultiScaleS4D([4], 16, 4, 1, _generator()).eval()
    assert torch.equal(frames(_sequences(64)).importance, torch.ones(2, 1))


def test_sequences_that_do_not_fit_are_refused() -> None:
    """A sequence too few, one without a step, and sizes that no attention can have."""
    frames = MultiScaleS4D([4, 4], 16, 4, 1, _generator())
    with pytest.raises(ValueError, match="1 sequences, not one for each of 2 timeframes"):
        frames(_sequences(64))
    with pytest.raises(ValueError, match="the sequence of timeframe 1 has no step: give more bars"):
        frames([*_sequences(64), torch.zeros(2, 0, 4)])
    for inputs, width, layers in (([], 16, 1), ([4], 18, 1), ([4], 16, 0)):
        with pytest.raises(ValueError, match="cannot be used"):
            MultiScaleS4D(inputs, width, 4, layers, _generator())


def test_the_higher_timeframes_are_blocks_of_the_same_bars() -> None:
    """The multiscale encoder reads the bars and their blocks, and nothing else of the sequence."""
    encoder = _encoder("multiscale")
    s = torch.randn(2, 64, 4, generator=_generator(2))
    assert encoder.frames is not None
    with torch.no_grad():
        expected = encoder.frames([s, *(blocks(s, size) for size in BLOCKS)]).state
        seen = []
        encoder.hidden.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, -16:]))
        encoder(torch.zeros(2, 5), s)
    torch.testing.assert_close(seen[0], expected)
