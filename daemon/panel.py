"""What may be set of a training that an operator asks for, what it takes in memory, and how it stands.

Whoever trains tells what can be chosen where it trains, as this process has no torch: see
`barcast.models.choices`.
"""

from collections import deque
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from barcast.daemon.wire import UNDECODABLE
from barcast.models import ConfigError

LINES = 100
"""Last lines of a training that are shown."""


class TrainingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a challenger is trained; what is None follows from the bars or the kind.

    `symbols` are those whose bars are learnt from, all with none named. `steps` are of each phase, `rate` is
    the highest of the phase of the diffusion, and `batch` are the images that are computed at once: the
    gradient is that of a whole batch of 64. `image` are pixels of a side. From `batch` on it is for ldm4ts.
    """

    kind: Literal["sssd", "ldm4ts"] = "sssd"
    preset: Literal["tiny", "small", "base"] = "small"
    symbols: tuple[str, ...] = ()
    steps: Annotated[int, Meta(ge=1, le=20_000)] | None = None
    rate: Annotated[float, Meta(ge=1e-5, le=1e-2)] | None = None
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    batch: Annotated[int, Meta(ge=1, le=64)] | None = None
    image: Annotated[int, Meta(ge=64, le=256)] | None = None
    attention: str | None = None
    checkpoint_gradients: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for what would be ignored."""
        if self.kind != "ldm4ts":
            for name in ("batch", "image", "attention", "checkpoint_gradients"):
                if getattr(self, name) not in (None, False):
                    raise ValueError(f"`{name}` goes with the kind ldm4ts, not {self.kind}; leave it out")

    def encode(self) -> str:
        """As JSON."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> "TrainingSettings":
        """Read what `encode` wrote. Raise ConfigError for what is none."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ConfigError(
                f"settings of a training: {error}; see the fields and ranges on the page"
            ) from error


class Backend(msgspec.Struct, frozen=True):
    """What may compute attention where the training runs, and why it cannot where it cannot."""

    name: str
    usable: bool
    training: bool
    why: str
    remedy: str


class Usage(msgspec.Struct, frozen=True):
    """What a step of an ldm4ts of the preset small takes at its peak, in units of 10^9 bytes.

    `savings` is in percent of the same by sdpa without checkpointing; `needs` has room for the estimate's
    error.
    """

    batch: int
    image: int
    attention: str
    checkpoint_gradients: bool
    gb: float
    savings: float
    needs: float


class Choices(msgspec.Struct, frozen=True):
    """What can be chosen where the training runs: see `barcast.models.choices.choices`."""

    images: list[int]
    batches: list[int]
    backends: list[Backend]
    usages: list[Usage]
    memory: float
    window: int

    def check(self, settings: TrainingSettings, known: Collection[str]) -> None:
        """Raise ConfigError for what cannot be trained here, with the reason."""
        if strange := sorted(set(settings.symbols) - set(known)):
            raise ConfigError(f"symbols: {strange[0]!r} has no bars here; choose of those that have")
        for name, value, choices in (
            ("batch", settings.batch, self.batches),
            ("image", settings.image, self.images),
            ("attention", settings.attention, [each.name for each in self.backends]),
        ):
            if value is not None and value not in choices:
                raise ConfigError(f"{name} = {value} is none of {', '.join(map(str, choices))}; choose one")
        backend = next((each for each in self.backends if each.name == settings.attention), None)
        if backend is not None and not backend.usable:
            raise ConfigError(
                f"attention {backend.name} cannot be used here: {backend.why}; {backend.remedy}"
            )
        if backend is not None and not backend.training:
            raise ConfigError(
                f"attention {backend.name} passes no gradient back: it cannot train; choose sdpa"
            )
        if settings.kind == "ldm4ts" and settings.preset == "small":
            usage = next(each for each in self.usages if _is_of(each, settings))
            if usage.needs > self.memory:
                raise ConfigError(
                    f"a step would take about {usage.gb:.2f} GB and there are {self.memory:.2f} GB; choose a "
                    "smaller batch or image, or checkpoint gradients"
                )


def _is_of(usage: Usage, s: TrainingSettings) -> bool:
    mine = (s.batch or 64, s.image or 64, s.attention or "sdpa", s.checkpoint_gradients)
    return (usage.batch, usage.image, usage.attention, usage.checkpoint_gradients) == mine


class _Epoch(msgspec.Struct, frozen=True, tag_field="event", tag="epoch"):
    phase: str
    step: int
    steps: int
    done: int
    total: int
    loss: float | None
    crps: float | None


class _Note(msgspec.Struct, frozen=True, tag_field="event", tag="training"):
    note: str


_told = msgspec.json.Decoder(_Epoch | _Note)
"""Lines of a training, see `backtest.cli.training.epochs`; what else it says is for people."""


class Board:
    """How the training stands, for who looks; `news` is called whenever that has changed.

    The state is whether one is under way, why and by which settings, what it does, when it began and ended
    (nanoseconds of the instance's clock), the epochs of the try under way with their times, the last lines,
    and how it ended.
    """

    def __init__(self, now: Callable[[], int], news: Callable[[], None]) -> None:
        self._now, self._news = now, news
        self._about: dict[str, Any] | None = None
        self._epochs: list[dict[str, Any]] = []
        self._lines = deque[str](maxlen=LINES)

    def begin(self, reasons: Collection[str], settings: TrainingSettings | None) -> None:
        """A training begins."""
        told = None if settings is None else msgspec.to_builtins(settings)
        self._about = {"running": True, "reasons": list(reasons), "settings": told, "began": self._now()}
        self._epochs.clear()
        self._lines.clear()
        self._news()

    def does(self, what: str) -> None:
        """It begins to `train`, to judge (`gate`), or to wait until it is tried again (`waits`)."""
        self._about = (self._about or {}) | {"does": what}
        if what == "train":
            self._epochs.clear()
        self._news()

    def hear(self, line: str) -> None:
        """A line of it."""
        try:
            told = _told.decode(line)
        except UNDECODABLE:
            self._lines.append(line)
        else:
            if isinstance(told, _Epoch):
                self._epochs.append(msgspec.structs.asdict(told) | {"at": self._now()})
            else:
                self._lines.append(told.note)
        self._news()

    def end(self, result: str) -> None:
        """It ended."""
        self._about = (self._about or {}) | {"running": False, "ended": self._now(), "result": result}
        self._news()

    def encode(self) -> bytes:
        """All of it, as JSON; null before the first."""
        if self._about is None:
            return b"null"
        return msgspec.json.encode({**self._about, "epochs": self._epochs, "lines": list(self._lines)})
