"""What can be chosen of a training here, and what that takes."""

import msgspec

from barcast.daemon.panel import Choices, TrainingSettings
from barcast.models.choices import choices
from barcast.models.ldm4ts.attention import probe
from barcast.models.ldm4ts.memory import estimate_vram_usage


def test_choices_are_what_the_page_reads():
    """Every combination has an estimate, that of the higher peak; and the default can be trained."""
    found = msgspec.convert(choices("1h", 2 * 10**9), Choices)
    assert len(found.usages) == len(found.images) * len(found.batches) * 4
    for usage in found.usages:
        how = {"image_size": usage.image, "backend": usage.attention}
        how |= {"gradient_checkpointing": usage.checkpoint_gradients}
        unet = estimate_vram_usage(usage.batch, part="unet", **how)["total_estimated_gb"]
        own = estimate_vram_usage(usage.batch // 2, part="autoencoder", **how)["total_estimated_gb"]
        assert usage.gb == max(unet, own)
        assert usage.needs > usage.gb
    sdpa = [each for each in found.usages if each.attention == "sdpa"]
    plain = [each.savings for each in sdpa if not each.checkpoint_gradients]
    assert set(plain) == {0.0}
    assert all(each.savings > 0 for each in found.usages if each.checkpoint_gradients and each.batch == 64)
    assert [each.name for each in found.backends] == [str(each.name) for each in probe()]
    found.check(TrainingSettings(kind="ldm4ts"), [])
    assert found.memory == 2.0
    assert found.window > 1
