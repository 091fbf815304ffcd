"""The challenger: what it takes over from the champion."""

import pytest

from barcast.daemon.challenger import train_challenger
from barcast.models import LEVELS, open_model, training
from barcast.models.checkpoint import preset_of, save
from tests.garch import windows


@pytest.mark.usefixtures("few_looks")
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_a_challenger_is_as_large_as_the_champion(tmp_path, preset):
    """It has the champion's horizons, levels and preset; against a baseline it has the default one."""
    histories = windows(1, 2200, seed=7, season=True)
    champion = "fhs"
    if preset == "tiny":
        outputs = {"timeframe": "1h", "horizons": (1, 3), "levels": LEVELS[1:-1]}
        champion = str(tmp_path / "champion")
        save(training.train(histories, **outputs, steps=1, preset=preset), tmp_path / "champion")
    card = open_model(champion, "1h", None, None).card
    bars = {w.symbol: w for w in histories}
    train_challenger(bars, tmp_path / "new", "1h", card, champion, 1, lambda _: None)
    found = open_model(str(tmp_path / "new"), "1h", None, None).card
    assert preset_of(str(tmp_path / "new")) == preset
    assert (found.horizons, found.levels) == (card.horizons, card.levels)
