"""What reads foreign bytes, each as a function of bytes: it returns, or raises what is a fault of ours.

A decoder gives a clean result or the one exception that it documents. `TARGETS` has each with its seeds and
the way to change an input so that most of it stays sensible; the same functions are fuzzed by `make fuzz` and
replayed by the tests.
"""

import json
import random
import shutil
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec

from barcast.backtest.verify import read_capture
from barcast.daemon import config, wire
from barcast.daemon.calendar import Calendars
from barcast.daemon.config import Config
from barcast.daemon.events import Champion, Warmth, events, restore
from barcast.daemon.journal import Journal, Kind, Progress, Record, Snapshot
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import Reject
from barcast.models import Bar, CheckpointError, ConfigError, DataError
from barcast.models.catalog import JSON, header
from tests.fakes import MINUTE, START, Spread, opening, settings
from tests.fakes import bar as made

TOPICS = ("t/bars/1m/A", "t/bars/1m", "t/bars/1m/EUR", "t/adjustments/A", "t/bars/1h/A", "t/bars/1m/a")
CALENDARS = Calendars("24x7", Timeframe.parse("1m"), {"EUR": "fx"})
LATER = START + 100 * MINUTE
LONGEST = 20_000
"""Characters of a sentence: what is foreign in it is cut."""
CORPUS = Path(__file__).parent / "corpus"
"""Inputs that once were faults, in a folder for each target: they stay mended."""
ODD = [
    *(None, True, -1, 0, 1, 2, 64, 65, 2**31, 2**63, 2**64, 10**12, 10**400),
    *(-0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf")),
    *("", "1m", "a/b", "\0", "\ud7ff", "x" * 5000, "9" * 5000, "2023-11-14T22:14:00Z", "0001-01-01T00:00:00"),
    *([], [[]], [0] * 300, {}, {"a": {}}),
]
"""Values that nobody expects."""


@dataclass(frozen=True)
class Target:
    """A decoder: how to feed it, what it is fed first, how an input is changed, and its share of the time."""

    feed: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    change: Callable[[bytes, random.Random], bytes]
    share: float


def check_length(error: Exception) -> None:
    """A sentence that an operator can read."""
    assert len(str(error)) < LONGEST, len(str(error))


def bar(symbol: str, minute: int) -> Bar:
    """A bar as a feed sends it."""
    b = made(symbol, minute)
    return Bar(b.symbol, b.close_time, *map(float, b.values))


# --- bars and adjustments


def bars(data: bytes) -> None:
    """The first byte names the topic, the rest is the payload."""
    topic, payload = TOPICS[data[0] % len(TOPICS)] if data else TOPICS[0], data[1:]
    if "/adjustments/" in topic:
        found = wire.declared(topic, payload, "t")
        rejects = [found] if isinstance(found, Reject) else []
    else:
        taken, rejects = wire.decode(topic, payload, LATER, "t", CALENDARS)
        if taken:
            again, refused = wire.decode("t/bars/1m", wire.encode_bars(taken), LATER, "t", CALENDARS)
            assert not refused or len(wire.encode_bars(taken)) > wire.MOST_BYTES, refused
            assert refused or again == taken, (again, taken)
    for reject in rejects:
        assert reject.reason
        letter = wire.dead_letter([reject], topic, LATER, "t/deadletter/x")
        assert len(letter.payload) < LONGEST, len(letter.payload)


def _bar_seeds() -> list[bytes]:
    one, many = wire.encode_bars([bar("A", 1)]), wire.encode_bars([bar("A", 2), bar("B", 2), bar("EUR", 2)])
    whole = {**json.loads(one), "trades": 7, "vwap": 100.5}
    split = {"time": wire.to_text(START), "factor": 0.5, "kind": "split"}
    plain = [json.loads(one), json.loads(many), whole, [whole, {"open": 1}], []]
    found = [bytes([k]) + msgspec.json.encode(each) for k in (0, 1, 2) for each in plain]
    found += [bytes([k]) + msgspec.msgpack.encode(each) for k in (0, 1) for each in plain]
    return [*found, b"\3" + msgspec.json.encode(split), b"\3" + msgspec.msgpack.encode(split)]


def _change_message(data: bytes, dice: random.Random) -> bytes:
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        codec: Any = msgspec.msgpack if data[1:2] >= b"\x80" else msgspec.json
        with suppress(OverflowError, TypeError, UnicodeEncodeError):
            return data[:1] + bytes(codec.encode(spoilt(codec.decode(data[1:]), dice)))
    return torn(data, dice)


# --- configurations


def configuration(data: bytes) -> None:
    """A TOML file, read as each command does."""
    with _folder() as folder:
        path = folder / "barcast.toml"
        path.write_bytes(data)
        try:
            found = config.load(path)
            found.settings().encode()
            found.mqtt.address("check")
        except ConfigError as error:
            check_length(error)


_LEAST = 'instance = "x"\nstate_dir = "state"\ntimeframe = "1h"\n'


def _toml_seeds() -> list[bytes]:
    shipped = Path(__file__).parents[2] / "deploy" / "barcast.toml"
    live = shipped.read_text()
    whole = "\n".join(  # with all that it explains
        line.removeprefix("# ") if line.startswith(("# [", "# ")) and "=" in line else line
        for line in live.splitlines()
    )
    return [
        live.encode(),
        whole.encode(),
        _LEAST.encode(),
        (
            _LEAST + '[mqtt]\nport = 0xff\nusername = "u"\npassword_file = "secret"\n[http]\nport = 9\n'
        ).encode(),
        (_LEAST + '[model]\nname = "fhs"\ntouch = [[2, 1]]\n[calendars]\nfx = ["EUR"]\n').encode(),
        (_LEAST + '[[strategy]]\nkind = "quantile-band"\nparams = { band = 0.5 }\n').encode(),
        (_LEAST + '[retrain]\ncron = "0 3 * * *"\nmax_age = "7d"\n[retrain.drift]\ncrps = 0.1\n').encode(),
        (
            _LEAST + "[rehearsal]\nstart = 2012-01-03T00:00:00Z\nat = 2026-01-03T00:00:00Z\nspeed = 1\n"
        ).encode(),
    ]


def toml_words() -> list[str]:
    """Words of the language and of the settings: what a fuzzer cannot guess."""
    words = ["[", "]", "[[", "]]", "'''", '"""', "\\u0000", "0x", "0b", "1e9", "inf", "nan", "true", "a.a.a."]
    words += ["fhs", "champion", "24x7", "fx", "XNYS", "session", "1h", "2s", "366d", "2012-01-03T00:00:00Z"]
    pending: list[Any] = [Config]
    while pending:
        part = pending.pop()
        for name, field in getattr(part, "model_fields", {}).items():
            words.append(name)
            pending += [each for each in config._models(field.annotation) if hasattr(each, "model_fields")]
    return sorted(set(words))


def _change_toml(data: bytes, dice: random.Random) -> bytes:
    with suppress(ValueError, RecursionError):
        lines = _flat(spoilt(tomllib.loads(data.decode()), dice))
        return "\n".join(lines).encode("utf-8", "replace")
    return torn(data, dice)


def _flat(table: Any, prefix: str = "") -> Iterator[str]:
    """Lines of TOML, one for each value."""
    for key, value in table.items() if isinstance(table, dict) else ():
        name = f"{prefix}{json.dumps(str(key))}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield f"{name} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool) or value is None:
        return json.dumps(bool(value))
    if isinstance(value, int):
        return hex(value) if value >= 0 else str(value)
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value).replace(" ", "T")


# --- checkpoints

REPAIR = 1
"""The bit of the first byte that asks for an id that fits, so that what lies behind it is reached."""


def model(data: bytes) -> None:
    """A byte, `model.json`, a zero and the weights."""
    from barcast.models.checkpoint import identity, load

    text, _, weights = data[1:].partition(b"\0")
    if data and data[0] & REPAIR:
        with suppress(ValueError, RecursionError):
            if isinstance(body := json.loads(text), dict):
                body.pop("id", None)
                weighed = b"" if body.get("kind") == "ensemble" else weights
                text = json.dumps({**body, "id": identity(body, weighed)}).encode()
    with _folder() as folder:
        (folder / JSON).write_bytes(text)
        (folder / "weights.safetensors").write_bytes(weights)
        try:
            header(folder)
            assert load(folder).forecaster().card.horizons
        except CheckpointError as error:
            check_length(error)


@cache
def _model_seeds() -> list[bytes]:
    import numpy as np
    import torch

    from barcast.models import checkpoint
    from barcast.models.ensemble import Ensemble
    from barcast.models.paths import path_steps
    from barcast.models.scaling import CHANNELS, Scaling, feature_names, layout_of
    from barcast.models.sssd.layers import Architecture
    from barcast.models.sssd.network import SSSD
    from barcast.models.trained import Past, Record, Trained
    from tests import kinds

    horizons, levels = (1, 2), (0.1, 0.5, 0.9)
    found = []
    for timeframe, sizes in (
        ("1d", {"encoder": "s4d", "head": "mlp"}),
        ("1h", {"encoder": "multiscale", "head": "unet1d"}),
    ):
        layout, F = layout_of(timeframe), len(feature_names(timeframe, horizons))
        H = len(horizons)
        statistics = {
            "factor": np.ones((1, layout.slots)),
            "volume": np.ones((1, layout.slots)),
            "har": np.ones((H, layout.terms)),
            "gain": np.ones((1, H, layout.slots)),
            "mean": np.zeros(F),
            "std": np.ones(F),
        }
        scaling = Scaling(timeframe, horizons, "UTC", (), **statistics)
        past = Past("0" * 64, ("A",), (), 9, 9, 9, 9, 9, "x")
        record = Record(**kinds.past(past), seed=0, capped=False, init_from=None, candidates=(),
                        map_step=(0,), denoiser_step=0)  # fmt: skip
        a = Architecture(
            features=F, channels=CHANNELS, context=layout.context, horizons=H, path=len(path_steps(horizons)),
            samples=16, members=1, width=4, state=4, poles=2, code=4, denoiser=4, blocks=1, **sizes,
        )  # fmt: skip
        net = SSSD(a, torch.Generator().manual_seed(1))
        trained = Trained(net, scaling, levels, record)
        found.append(trained)
    of = found[0]
    boosted = kinds.boosted(of.scaling, of.levels, of.record)
    members = (checkpoint.open_member("hs"), checkpoint.open_member("fhs"))
    past = Past(**kinds.past(of.record))
    ensemble = Ensemble("1d", horizons, levels, members, np.full((H, 2), 0.5), past)
    return [_framed(each) for each in (*found, boosted, ensemble)]


def _framed(trained: Any) -> bytes:
    from barcast.models import checkpoint

    _, files = checkpoint._files(trained)
    return bytes([REPAIR]) + files[JSON] + b"\0" + files.get("weights.safetensors", b"")


def _change_model(data: bytes, dice: random.Random) -> bytes:
    flag, (text, _, weights) = data[:1], data[1:].partition(b"\0")
    if dice.random() < 0.6:
        with suppress(ValueError, RecursionError):
            text = json.dumps(spoilt(json.loads(text), dice)).encode()
    elif dice.random() < 0.6:
        weights = _change_safetensors(weights, dice)
    else:
        return torn(data, dice)
    return flag + text + b"\0" + weights


def _change_safetensors(weights: bytes, dice: random.Random) -> bytes:
    """Another header before the same bytes."""
    end = 8 + int.from_bytes(weights[:8], "little")
    with suppress(ValueError, RecursionError):
        changed = json.dumps(spoilt(json.loads(weights[8:end]), dice)).encode()
        return len(changed).to_bytes(8, "little") + changed + weights[end:]
    return torn(weights, dice)


def legacy(data: bytes) -> None:
    """A torch file: as it is, or, after a byte with the bit `REPAIR`, the pickle in one that is sound."""
    import torch

    from barcast.models.sssd import legacy as layouts

    wanted = {"a.weight": torch.zeros(2, 3), "b": torch.zeros(2)}
    content = data[1:]
    if data and data[0] & REPAIR:
        packed = BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, part in (("data.pkl", content), ("byteorder", b"little"), ("data/0", bytes(24)),
                               ("data/1", bytes(8)), ("version", b"3\n")):  # fmt: skip
                archive.writestr(f"archive/{name}", part)
        content = packed.getvalue()
    with _folder() as folder:
        path = folder / "model.pt"
        path.write_bytes(content)
        try:
            layouts.read(path, {"model": {"s4": {"state_dim": 4}}}, wanted)
        except CheckpointError as error:
            check_length(error)


@cache
def _legacy_seeds() -> list[bytes]:
    import torch

    weights, config = (
        {"a.weight": torch.zeros(2, 3), "b": torch.zeros(2)},
        {"model": {"s4": {"state_dim": 4}}},
    )
    bodies: list[Any] = [
        {"epoch": 1, "model_state_dict": weights, "config": config, "metrics": {"loss": 0.5}},
        {"state_dict": weights},
        weights,
        {"model": {**weights, "x.s4.Lambda": torch.zeros(3)}},
    ]
    found = []
    for body in bodies:
        packed = BytesIO()
        torch.save(body, packed)
        with zipfile.ZipFile(packed) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            found += [b"\0" + packed.getvalue(), bytes([REPAIR]) + archive.read(pickled)]
        plain = BytesIO()
        torch.save(body, plain, _use_new_zipfile_serialization=False)
        found.append(b"\0" + plain.getvalue())
    return found


# --- what we wrote ourselves, and a disk may have damaged

KINDS = (*(value for name, value in vars(Kind).items() if name.isupper()), "snapshot", "capture")


def record(data: bytes) -> None:
    """The first byte names the kind of a journal's record, or a snapshot, or a subscriber's capture."""
    kind, payload = KINDS[data[0] % len(KINDS)] if data else KINDS[0], data[1:]
    if kind == "capture":
        with _folder() as folder:
            (folder / "capture").write_bytes(payload)
            with suppress(ConfigError, DataError):
                read_capture(folder / "capture")
        return
    if kind == "snapshot":
        with suppress(ConfigError):
            restore(_Only(payload), Pipeline(lambda *_: Spread()), 1)  # type: ignore[arg-type]
        return
    topic = {"bars": "t/bars/1m/A", "adjustment": "t/adjustments/A"}.get(kind, "")
    with suppress(ConfigError):
        list(events([Record(1, LATER, kind, topic, payload)], settings()))


@dataclass
class _Only:
    """A journal of which nothing is read but a snapshot."""

    state: bytes
    place: Path = Path("journal.db")
    base: int = 1

    def snapshot(self, _upto: int) -> Snapshot:
        return Snapshot(1, self.state)


def _record_seeds() -> list[bytes]:
    path = Pipeline(lambda *_: Spread())
    for event in opening():
        list(path.take(event))
    payloads = {
        "bars": wire.encode_bars([bar("A", 1)]),
        "adjustment": msgspec.json.encode({"time": wire.to_text(START), "factor": 0.5, "kind": "split"}),
        "revision": settings().encode(),
        "warmup": Warmth("0" * 16, 8, (bar("A", 1), bar("B", 1))).encode(),
        "newcomer": Warmth("0" * 16, 8, (bar("A", 1),), "A").encode(),
        "activation": Champion("spread", "numpy", 8, "why").encode(),
        "shed": msgspec.json.encode(Progress(3, START)),
        "snapshot": path.state.encode(),
        "capture": b'["t/signals/1m/A", "{}"]\n["t/groups/1m", "{\\"id\\": \\"a\\"}"]\n',
    }
    return [bytes([KINDS.index(kind)]) + payload for kind, payload in payloads.items()]


def journal(data: bytes) -> None:
    """A file that is said to be a journal."""
    with _folder() as folder:
        path = folder / "journal.db"
        path.write_bytes(data)
        with suppress(ConfigError), closing(Journal(path, readonly=True)) as found, found.one_moment():
            restore(found, Pipeline(lambda *_: Spread()), found.base)
            list(events(found.decisions(found.base)))
            list(events(found.records(found.base)))
            (
                found.progress(),
                found.last_time(),
                found.pending(10),
                list(found.sent("t/", 10)),
                found.waiting(),
            )


@cache
def _journal_seeds() -> list[bytes]:
    with _folder() as folder:
        path = folder / "journal.db"
        made = Journal(path)
        made.append(
            [
                (START, Kind.REVISION, "", settings().encode()),
                (START, Kind.ACTIVATION, "", Champion("spread", "numpy", 8, "why").encode()),
                (START + MINUTE, Kind.BARS, "t/bars/1m/A", wire.encode_bars([bar("A", 1)])),
            ],
            [wire.Outgoing("a", "t/signals/1m/A", b"{}", True, None)],
        )
        made.settle(Progress(3, START), [])
        made.close()
        return [path.read_bytes()]


# --- how inputs are changed


def torn(data: bytes, dice: random.Random) -> bytes:
    """Bytes changed anywhere, of whatever they are."""
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at, way = dice.randrange(len(found) + 1), dice.randrange(5)
        if way == 0:
            found[at : at + 1] = dice.randbytes(1)
        elif way == 1:
            del found[at : at + dice.choice((1, 4, 64))]
        elif way == 2:
            found[at:at] = found[dice.randrange(len(found) + 1) :][: dice.choice((1, 16, 300))]
        elif way == 3:
            found[at : at + 4] = dice.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"[[[["))
        else:
            del found[at:]
    return bytes(found)


def spoilt(plain: Any, dice: random.Random) -> Any:
    """Plain data with one value, somewhere in it, that nobody expects."""
    if dice.random() < 0.1 or not isinstance(plain, list | dict) or not plain:
        return dice.choice(ODD)
    keys = list(range(len(plain))) if isinstance(plain, list) else list(plain)
    key, way = dice.choice(keys), dice.random()
    copy: Any = plain.copy()
    if way < 0.1:
        del copy[key]
    elif way < 0.2 and isinstance(copy, list):
        copy.insert(dice.randrange(len(copy) + 1), copy[key])
    elif way < 0.2:
        copy[dice.choice(("_a", "a.b", "", "__init__", "id", key + "x" if isinstance(key, str) else "x"))] = (
            dice.choice(ODD)
        )
    else:
        copy[key] = spoilt(copy[key], dice)
    return copy


def corpus(name: str) -> Iterable[Path]:
    """What once was a fault of a target."""
    return sorted((CORPUS / name).glob("*"))


class _folder:  # noqa: N801
    """A folder of its own for each input; in memory, where there is such a place."""

    def __enter__(self) -> Path:
        place = Path("/dev/shm")
        self.path = Path(tempfile.mkdtemp(prefix="barcast-fuzz-", dir=place if place.is_dir() else None))
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


TARGETS = {
    "bars": Target(bars, _bar_seeds, _change_message, 0.2),
    "configuration": Target(configuration, _toml_seeds, _change_toml, 0.2),
    "checkpoint": Target(model, _model_seeds, _change_model, 0.25),
    "torch-file": Target(legacy, _legacy_seeds, torn, 0.1),
    "record": Target(record, _record_seeds, _change_message, 0.15),
    "journal": Target(journal, _journal_seeds, torn, 0.1),
}
