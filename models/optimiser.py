"""The optimiser's loop: phases of AdamW, each ending with the weights that unseen bars like best.

The rate warms up linearly and decays by a cosine (Loshchilov and Hutter 2017). What is judged is an
exponential average of the weights (Polyak and Juditsky 1992), that of step 0 included. An epoch ends with a
look at it on what was not learnt from. Everything that the loop holds then can be written to a file, from
which an interrupted training goes on to the same bits. accelerate spreads a batch over processes and over
parts of one process.
"""

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import astuple, dataclass, field
from hashlib import sha256
from math import cos, inf, isfinite, pi
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, broadcast, broadcast_object_list
from torch import Generator, Tensor, nn

from barcast.models.errors import ConfigError, DataError
from barcast.models.trained import Candidate

EPOCHS = 12  # looks at unseen bars in each phase, after that at step 0
PATIENCE = 6  # looks without a better one after which a phase ends
DECAY, NORM = 0.05, 1.0  # of weights, and at which gradients are clipped
MEMORY = 0.998  # of the average of the weights
PRECISIONS = {"fp32": "no", "bf16": "bf16"}  # as accelerate calls them


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a batch that one call of a loss computes.

    A loss draws the whole batch from the generator and takes its own rows of what it drew: how many share a
    batch changes no number that is drawn.
    """

    index: int
    of: int
    generator: Generator

    def rows(self, x: Tensor) -> Tensor:
        """This share's rows of a tensor of the whole batch, (B, ...) -> (B / of, ...)."""
        return x.tensor_split(self.of)[self.index]


@dataclass(frozen=True, slots=True)
class Phase:
    """One part of a training.

    `modules` are what learns; `loss` is the mean over the rows of a share; `look` is the CRPS of forecasts on
    what was not learnt from, of each of `members`: with more than one, parameters have the members first, and
    each keeps the weights that were its own best. Those of step 0 give way only to a CRPS that is lower by
    the share `margin`. `prepare` runs before the first step, and again when the training goes on later: it
    draws nothing and depends on no weight of `modules`. `steps` are its own in place of the budget's.
    """

    name: str
    modules: Sequence[nn.Module]
    rate: float
    loss: Callable[[Share], Tensor]
    look: Callable[[], list[float]]
    prepare: Callable[[], None]
    members: int = 1
    margin: float = 0.0
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the training stands.

    `loss` is the fast loss, averaged over the epoch so far, None before its first step; `crps` is the score
    of forecasts in full on what was not learnt from, None where there was no look at it. `done` of `total`
    steps count all phases. `note` is a sentence for people, empty as a rule.
    """

    phase: str
    step: int
    steps: int
    loss: float | None
    crps: float | None
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Budget:
    """Steps of each phase that has none of its own, and a cap on the seconds of each by a monotonic clock."""

    steps: int
    seconds: float = inf
    clock: Callable[[], float] | None = None


@dataclass(frozen=True, slots=True)
class Fitted:
    """What came of the phases: all candidates, the steps chosen by the members, and what ended early."""

    candidates: tuple[Candidate, ...]
    chosen: dict[str, tuple[int, ...]]
    capped: bool
    stopped: tuple[str, ...]


class StateFile:
    """The file of an unfinished training: a hash, and the state it is the hash of. It is replaced as a whole.

    `key` names bars, options and program: a state of other ones is not gone on from.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def read(self) -> tuple[dict[str, Any] | None, str]:
        """The state, if there is one of the same key, and a sentence on what was found."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None, ""
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({error.strerror}); remove it") from error
        if sha256(content[32:]).digest() != content[:32]:
            return None, f"{self.path} is damaged: the training begins anew"
        state: dict[str, Any] = torch.load(io.BytesIO(content[32:]), weights_only=True)
        if state["key"] != self.key:
            return None, f"{self.path} is of other bars, options or versions: the training begins anew"
        return state, f"the training goes on from {self.path}: {state['phase']}, step {state['step']}"

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the state; raise `ConfigError` where nothing can be written."""
        buffer = io.BytesIO()
        torch.save({"key": self.key, **state}, buffer)
        content = buffer.getvalue()
        fresh = self.path.with_name(f"{self.path.name}.new")
        try:
            with fresh.open("wb") as f:
                f.write(sha256(content).digest() + content)
                f.flush()
                os.fsync(f.fileno())
            fresh.replace(self.path)
        except OSError as error:
            raise ConfigError(f"{fresh}: {error.strerror}; make room, or name another directory") from error


class StateMemory:
    """The state of an unfinished training that is held in memory: what ends with the process is not kept."""

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def read(self) -> tuple[dict[str, Any] | None, str]:
        """As `StateFile.read`."""
        state = deepcopy(self._state)
        return state, "" if state is None else f"the training goes on: {state['phase']}, step {state['step']}"

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the state by a copy."""
        self._state = deepcopy(dict(state))


def is_main() -> bool:
    """Whether this process, of those that train together, is the one that speaks and writes."""
    return bool(PartialState(cpu=True).is_main_process)


def leave() -> None:
    """End this process at once, after the last of its work, if it has trained together with others.

    torch keeps the group of a spread model, and gloo's threads with it, beyond the end of the group. Where
    they see the interpreter's end they abort the process now and then.
    """
    if PartialState(cpu=True).num_processes > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def processes(precision: str, accumulate: int, batch: int) -> Accelerator:
    """Join the processes that train together; without a launcher such as torchrun there is one.

    Raises `ConfigError` for a precision that there is not, and for a `batch` that does not divide into
    `accumulate` parts for each process.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is unknown: take one of {', '.join(PRECISIONS)}")
    AcceleratorState._reset_state()  # it would hold one process to one precision
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=PRECISIONS[precision],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate),
    )
    count = accelerator.num_processes
    if accumulate < 1 or batch % (count * accumulate):
        raise ConfigError(
            f"a batch of {batch} does not divide into {accumulate} parts for each of {count} processes: "
            "take powers of two"
        )
    return accelerator


def fit(
    net: nn.Module,
    phases: Sequence[Phase],
    budget: Budget,
    generator: Generator,
    accelerator: Accelerator,
    file: StateFile | StateMemory | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Fitted:
    """Train parts of `net`, phase after phase; each leaves the weights that its looks liked best.

    `file` is where the state is kept, and gone on from. All processes of a group come to the same weights;
    `progress` is called in the main one. Raises `ConfigError` for a cap that leaves no time for a step and
    `DataError` for a loss or score that is not finite.
    """
    loop = _Loop(net, phases, budget, generator, accelerator, file, progress)
    saved, note = loop.saved()
    if saved is not None:
        net.load_state_dict(saved["net"])
        loop.restore(saved)
    for phase in phases:
        if phase.name not in loop.chosen:
            loop.run(phase, saved, note)
            saved, note = None, ""
    return Fitted(tuple(loop.candidates), loop.chosen, loop.capped, tuple(loop.stopped))


class _Fast(nn.Module):
    """The fast loss as a module, so that accelerate can spread it and choose its precision."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.learning, self.loss = nn.ModuleList(phase.modules), phase.loss

    def forward(self, share: Share) -> Tensor:
        return self.loss(share)


@dataclass(slots=True)
class _Position:
    """Where a phase stands; all of it is saved."""

    averaged: list[Tensor]
    chosen: list[Tensor]  # the averaged weights of the best look
    step: int = 0
    looked: int = -1  # the step of the last look
    best: list[float] = field(default_factory=list)  # of each member
    best_step: list[int] = field(default_factory=list)
    stale: int = 0  # looks since the best of any
    losses: list[float] = field(default_factory=list)  # of the epoch


class _Loop:
    """The loop over all phases. The state is the candidates, the ends of phases, and a position."""

    def __init__(
        self,
        net: nn.Module,
        phases: Sequence[Phase],
        budget: Budget,
        generator: Generator,
        accelerator: Accelerator,
        file: StateFile | StateMemory | None,
        progress: Callable[[Progress], None],
    ) -> None:
        self.net, self.phases, self.budget, self.generator = net, phases, budget, generator
        self.accelerator, self.file, self.progress = accelerator, file, progress
        self.steps = {phase.name: phase.steps or budget.steps for phase in phases}
        self.candidates: list[Candidate] = []
        self.chosen: dict[str, tuple[int, ...]] = {}
        self.capped = False
        self.stopped: list[str] = []

    def saved(self) -> tuple[dict[str, Any] | None, str]:
        """What the state file says, as the main process read it."""
        if self.file is None:
            return None, ""
        found: list[Any] = [self.file.read() if self.accelerator.is_main_process else None]
        state, note = broadcast_object_list(found)[0]
        return state, note

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up what earlier phases left."""
        self.candidates = [Candidate(*values) for values in saved["candidates"]]
        self.chosen, self.capped, self.stopped = saved["ended"], saved["capped"], saved["stopped"]

    def run(self, phase: Phase, saved: Mapping[str, Any] | None, note: str) -> None:
        """One phase, from its start or from where it was saved."""
        phase.prepare()
        parameters = [p for m in phase.modules for p in m.parameters()]
        for m in phase.modules:
            m.train()
        model, optimiser = self.accelerator.prepare(
            _Fast(phase), torch.optim.AdamW(parameters, phase.rate, weight_decay=DECAY)
        )
        start = [p.detach().clone() for p in parameters]
        at = _Position(start, [p.clone() for p in start])
        used = 0.0
        if saved is not None:
            at = _Position(**saved["position"])
            optimiser.load_state_dict(saved["optimiser"])
            self.generator.set_state(saved["generator"])
            used = saved["seconds"]
        clock, steps = self.budget.clock, self.steps[phase.name]
        every = max(1, steps // EPOCHS)
        began = clock() - used if clock else 0.0

        def seconds() -> float:
            return clock() - began if clock else 0.0

        while True:
            late, due = 0 < at.step < steps and self._over(seconds), at.step % every == 0
            crps = None
            if at.step > at.looked and (due or at.step == steps or late):
                crps = self._look(phase, parameters, at)
            stale = due and at.stale == PATIENCE  # a look that the cap brought about must not end it so
            late &= not stale
            self.capped |= late
            if at.step == 0 and self._over(seconds):
                raise ConfigError(
                    f"the cap of {self.budget.seconds:g} s on the phase {phase.name} leaves no time for a "
                    "step: allow more"
                )
            self._say(phase, at, crps, note)
            if crps is not None:
                at.losses.clear()
                self._save(phase, at, optimiser, seconds)
            if at.step == steps or late or stale:
                break
            self._step(model, optimiser, parameters, phase, at)
            note = ""
        if at.step < steps and not late:
            self.stopped.append(phase.name)
        _assign(parameters, at.chosen)
        self.chosen[phase.name] = tuple(at.best_step)

    def _step(
        self, model: nn.Module, optimiser: Any, parameters: list[nn.Parameter], phase: Phase, at: _Position
    ) -> None:
        accelerator, drawn = self.accelerator, self.generator.get_state()
        parts, count = accelerator.gradient_accumulation_steps, accelerator.num_processes
        steps = self.steps[phase.name]
        warm = min(1.0, (at.step + 1) / max(1, steps // 20))
        for group in optimiser.param_groups:
            group["lr"] = phase.rate * warm * 0.5 * (1 + cos(pi * at.step / steps))
        for part in range(parts):
            self.generator.set_state(drawn)  # every share draws the same batch
            with accelerator.accumulate(model):
                loss = model(Share(part * count + accelerator.process_index, parts * count, self.generator))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, NORM)
                optimiser.step()
                optimiser.zero_grad()
            at.losses.append(float(loss.detach()))
        decay = min(MEMORY, (at.step + 1) / (at.step + 10))
        with torch.no_grad():
            for average, p in zip(at.averaged, parameters, strict=True):
                average.lerp_(p, 1 - decay)
        at.step += 1

    def _look(self, phase: Phase, parameters: list[nn.Parameter], at: _Position) -> float:
        """The end of an epoch: the score of the averaged weights, which the main process finds out."""
        found = [0.0] * phase.members
        if self.accelerator.is_main_process:
            learning = [p.detach().clone() for p in parameters]
            _assign(parameters, at.averaged)
            for m in phase.modules:
                m.eval()
            with torch.no_grad():
                found = phase.look()
            _assign(parameters, learning)
            for m in phase.modules:
                m.train()
        found = [self._agreed(crps) for crps in found]
        crps = sum(found) / len(found)
        if at.losses:
            mean = torch.tensor(_mean(at.losses), dtype=torch.float64)
            at.losses = [float(self.accelerator.reduce(mean, "mean"))]
        if not isfinite(crps) or not all(isfinite(loss) for loss in at.losses):
            other = "" if self.accelerator.mixed_precision == "no" else ", or train with fp32"
            raise DataError(
                f"the training came apart in the phase {phase.name} before step {at.step} (loss "
                f"{_mean(at.losses)}, CRPS {crps}): look for wild prices in the bars{other}"
            )
        self.candidates.append(Candidate(phase.name, at.step, crps, _mean(at.losses)))
        at.looked, at.stale = at.step, at.stale + 1
        at.best = at.best or [inf] * phase.members
        at.best_step = at.best_step or [0] * phase.members
        for i, own in enumerate(found):
            if own < at.best[i] * (1 - (phase.margin if at.best_step[i] == 0 else 0.0)):
                at.best[i], at.best_step[i], at.stale = own, at.step, 0
                for kept, average in zip(at.chosen, at.averaged, strict=True):
                    if phase.members == 1:
                        kept.copy_(average)
                    else:
                        kept[i].copy_(average[i])
        return crps

    def _save(self, phase: Phase, at: _Position, optimiser: Any, seconds: Callable[[], float]) -> None:
        if self.file is None or not self.accelerator.is_main_process:
            return
        state = {
            "phase": phase.name,
            "step": at.step,
            "position": {name: getattr(at, name) for name in _Position.__slots__},
            "net": self.net.state_dict(),
            "optimiser": optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "seconds": seconds(),
            "candidates": [astuple(c) for c in self.candidates],
            "ended": self.chosen,
            "capped": self.capped,
            "stopped": self.stopped,
        }
        self.file.write(state)

    def _say(self, phase: Phase, at: _Position, crps: float | None, note: str) -> None:
        if self.accelerator.is_main_process:
            steps, before = self.steps[phase.name], self.phases[: self.phases.index(phase)]
            done, total = sum(self.steps[p.name] for p in before) + at.step, sum(self.steps.values())
            self.progress(Progress(phase.name, at.step, steps, _mean(at.losses), crps, done, total, note))

    def _over(self, seconds: Callable[[], float]) -> bool:
        """Whether the cap is reached, by the clock of the main process."""
        return self.budget.clock is not None and self._agreed(seconds()) > self.budget.seconds

    def _agreed(self, value: float) -> float:
        """The number of the main process, in all of them."""
        return float(broadcast(torch.tensor(value, dtype=torch.float64)))


def _mean(losses: Sequence[float]) -> float | None:
    return sum(losses) / len(losses) if losses else None


def _assign(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
