"""What training yields: an LDM4TS, and the record of how it came about."""

from dataclasses import dataclass

from barcast.models.calibration import Calibrated
from barcast.models.ldm4ts.forecaster import SAMPLER, STEPS, LatentForecaster
from barcast.models.ldm4ts.network import LDM4TS
from barcast.models.scaling import Scaling
from barcast.models.trained import Record

OUTCOMES, JUDGED = 250, 100
"""Outcomes that a forecast is corrected by, and that the coverage is counted over: each is sampled anew."""


@dataclass(frozen=True, slots=True)
class LatentRecord(Record):
    """How an LDM4TS came about: what `Record` says, and by which plan its last phase was trained.

    `accumulate` are the parts of that plan.
    """

    attention: str = "sdpa"
    checkpointed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class LatentTrained:
    """A network, the scaling of its inputs and outputs, the levels it was judged by, and its history."""

    net: LDM4TS
    scaling: Scaling
    levels: tuple[float, ...]
    record: LatentRecord

    def forecaster(
        self, model: str, sampler: str | None = None, steps: int | None = None, paths: bool = False
    ) -> Calibrated:
        """A calibrated forecaster, see `raw` and `Model.forecaster`."""
        raw = self.raw(model, sampler, steps)
        return Calibrated(raw, OUTCOMES, JUDGED, couple=raw if paths else None)

    def raw(self, model: str, sampler: str | None = None, steps: int | None = None) -> LatentForecaster:
        """A forecaster that is not calibrated; default sampler and steps where None is given."""
        return LatentForecaster(
            self.net, self.scaling, self.levels, model, sampler or SAMPLER, STEPS if steps is None else steps
        )
