"""Baselines are opened by name."""

import pytest

from barcast.models import BASELINES, ConfigError, open_model


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_opened_by_its_name(name: str) -> None:
    """Its card bears the name and the horizons of the timeframe; daily bars have none with a season."""
    card = open_model(name, "15m", None, None).card
    assert (card.kind, card.horizons, card.sampler) == (name, (1, 4, 16), "none")
    assert card.model.startswith(f"{name}-")
    assert card.window >= card.min_window
    if name.endswith("-s"):
        with pytest.raises(ConfigError, match="hours of the week"):
            open_model(name, "session", None, None)
    else:
        assert open_model(name, "session", None, None).card.horizons == (1, 5, 20)
