"""Bad configurations, models, bar files and journals: one sentence with file, field, value and remedy.

`pytest -v tests/test_bad_files.py` lists what is caught. Each entry is run through the command line, which
ends with status 78 and nothing written. What must be said is `file | field | value | remedy`, without what
the entry does not have.
"""

import datetime as dt
import fcntl
import json
import shutil
import sqlite3
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.daemon import gate
from barcast.daemon.journal import Journal, Kind
from barcast.models import CheckpointError, checkpoint
from tests import kinds
from tests.fakes import START, settings

Build = Callable[[Path], list[str]]
"""Writes a fault into a folder and gives the command that meets it there."""

Damage = Callable[[Path], object]
"""Makes a fault of a good folder or file."""

CASES: dict[str, tuple[Build, str]] = {}


# --- configurations

LEAST = 'instance = "x"\nstate_dir = "state"\ntimeframe = "1h"\nlog_level = "error"\n'
SERVED = "[mqtt]\nport = 1\n"  # nobody listens there: a daemon that came so far would wait until the timeout


def config(text: str | bytes, command: str = "check", **beside: str) -> Build:
    """A configuration, and files beside it."""

    def build(folder: Path) -> list[str]:
        content = text if isinstance(text, bytes) else text.encode()
        (folder / "barcast.toml").write_bytes(content)
        for name, other in beside.items():
            (folder / name).write_text(other)
        return [command, "barcast.toml"]

    return build


LOCKS: list[Any] = []


def held(folder: Path) -> list[str]:
    """A state directory that another instance holds."""
    (folder / "state").mkdir()
    LOCKS.append((folder / "state" / "lock").open("w"))
    fcntl.flock(LOCKS[-1], fcntl.LOCK_EX)
    return config(LEAST, "run")(folder)


def with_folder(text: str) -> Build:
    """A daemon's configuration beside a folder `mine` that is empty."""
    return lambda folder: [(folder / "mine").mkdir(), config(LEAST + SERVED + text, "run")(folder)][1]


TABLE: dict[str, tuple[str | bytes, str]] = {
    "not TOML": (b"instance = desk\n", "not valid TOML | Invalid value | line 1"),
    "not UTF-8": (b'instance = "d\xff"\n', "not valid TOML | 0xff"),
    "a key misspelt": (LEAST + "[mqtt]\nprt = 1\n", "mqtt.prt | unknown key | did you mean 'port'?"),
    "a key nobody knows": (LEAST + "colour = 1\n", "colour | unknown key | known here: version, instance"),
    "a key missing": (LEAST.replace("timeframe", "#"), "timeframe | missing | it has no default"),
    "a text for a number": (LEAST + '[mqtt]\nport = "many"\n', "mqtt.port | 'many' | a valid integer"),
    "a number for a list": (LEAST + "symbols = 1\n", "symbols | 1 | a valid list"),
    "a port out of range": (LEAST + "[mqtt]\nport = 70000\n", "mqtt.port | 70000 | less than 65536"),
    "a wildcard in the root": (LEAST + '[mqtt]\nroot = "b/#"\n', "mqtt.root | 'b/#' | without wildcards"),
    "a duration without a unit": (LEAST + "max_wait = 2\n", "max_wait | given: 2 | such as 500ms, 2s"),
    "a timeframe of 7m": (LEAST.replace("1h", "7m"), "timeframe | '7m' | take one such as 15m"),
    "an instance with a slash": (LEAST.replace('"x"', '"a/b"'), "instance | 'a/b' | use letters, digits"),
    "a symbol in small letters": (LEAST + 'symbols = ["A", "btc"]\n', "symbols.1 | 'btc' | a symbol is A-Z"),
    "a symbol that repeats": (LEAST + 'symbols = ["A", "A"]\n', "symbols | ['A', 'A'] | name each once"),
    "an unknown calendar": (LEAST + 'calendar = "XNYZ"\n', "calendar | 'XNYZ' | did you mean"),
    "an unknown log level": (LEAST.replace("error", "loud"), "log_level | 'loud' | 'warning' or 'error'"),
    "an unknown strategy": (
        LEAST + '[[strategy]]\nkind = "drift"\n',
        "strategy.0 | 'drift' | take one of quantile-band, median-drift",
    ),
    "an unknown parameter of a strategy": (
        LEAST + '[[strategy]]\nkind = "quantile-band"\nparams = { width = 2 }\n',
        "strategy.0 | 'width' | take one of band",
    ),
    "a strategy's parameter out of range": (
        LEAST + '[[strategy]]\nkind = "quantile-band"\nparams = { band = 2 }\n',
        "strategy.0 | parameter band is 2 | not a number from 0 to 1",
    ),
    "four cron fields": (
        LEAST + '[retrain]\ncron = "0 3 * *"\n',
        "retrain.cron | '0 3 * *' | write five, or six",
    ),
    "the 25th hour": (LEAST + '[retrain]\ncron = "0 25 * * *"\n', "retrain.cron | (25) | write one such as"),
    "a numbered weekday": (
        LEAST + '[retrain]\ncron = "0 3 * * 1"\n',
        "retrain.cron | * 1' | write mon to sun",
    ),
    "a retraining of a pinned model": (
        LEAST + '[model]\nname = "fhs"\n[retrain]\ncron = "0 3 * * *"\n',
        "retrain | model.name = 'fhs' | take name = \"champion\"",
    ),
    "a rehearsal without a zone": (
        LEAST + "[rehearsal]\nstart = 2012-01-03T00:00:00\nat = 2026-01-03T00:00:00Z\nspeed = 1\n",
        "rehearsal.start | 2012 | write the time zone",
    ),
    "a rehearsal that stands still": (
        LEAST + "[rehearsal]\nstart = 2012-01-03T00:00:00Z\nat = 2026-01-03T00:00:00Z\nspeed = 0\n",
        "rehearsal.speed | given: 0 | greater than 0",
    ),
    "a later version": (LEAST + "version = 2\n", "version | given: 2 | should be 1"),
    "lists nested too deep": (LEAST + "a = " + "[" * 5000, "not valid TOML | recursion | correct what"),
    "a number of 5000 digits": (LEAST + "a = " + "9" * 5000, "not valid TOML | 5000 digits | correct what"),
    "a duration without an end": (LEAST + 'max_wait = "999999999d"\n', "max_wait | '999999999d' | 366d"),
    "a rehearsal at infinite speed": (
        LEAST + "[rehearsal]\nstart = 2012-01-03T00:00:00Z\nat = 2026-01-03T00:00:00Z\nspeed = inf\n",
        "rehearsal.speed | given: inf | a finite number",
    ),
    "neither a model id nor a folder": (
        LEAST + '[model]\nname = "best"\n',
        "model.name | 'best' | name one of",
    ),
}
for what, (text, said) in TABLE.items():
    CASES[f"config: {what}"] = config(text), f"barcast.toml | {said}"

SECRET, AUTHORITY = (
    f'{LEAST}[mqtt]\nusername = "u"\n{key} = "mine"\n' for key in ("password_file", "ca_file")
)
CASES |= {
    "config: no file": (lambda _: ["check", "absent.toml"], "absent.toml | no such file | name the TOML"),
    "config: a folder": (lambda _: ["run", "."], ". | no such file | name the TOML file of an instance"),
    "config: no password file": (config(SECRET), "mine | mqtt.password_file | does not exist | create it"),
    "config: no CA file": (config(AUTHORITY), "mine | mqtt.ca_file | does not exist | create it"),
    "config: a CA file without a certificate": (
        config(AUTHORITY, mine="x\n"),
        "mine | mqtt.ca_file | NO_CERTIFICATE_OR_CRL_FOUND | holds no certificate",
    ),
    "config: an empty password file": (
        config(SECRET, mine="\n"),
        "mine | mqtt.password_file | is empty | write the password into it",
    ),
    "config: a password that is not UTF-8": (
        lambda f: [(f / "mine").write_bytes(b"\xff"), config(SECRET)(f)][1],
        "mine | mqtt.password_file | UnicodeDecodeError | write the password as UTF-8 text",
    ),
    "config: a CA file cut off": (
        config(AUTHORITY, mine="-----BEGIN CERTIFICATE-----\nMIIB\n"),
        "mine | mqtt.ca_file | holds no certificate | write one in PEM",
    ),
    "config: a state directory with a zero byte": (
        config(LEAST.replace('"state"', '"st\\u0000ate"'), "run"),
        "state_dir | null byte | name a directory that this user may write",
    ),
    "config: a lock that cannot be taken": (
        lambda f: [(f / "state" / "lock").mkdir(parents=True), config(LEAST + SERVED, "run")(f)][1],
        "state/lock | state_dir | Is a directory | name a directory that this user may write",
    ),
    "config: a model id that is not in the store": (
        with_folder('[model]\nname = "0123456789abcdef"\n'),
        "state/models | model.name | '0123456789abcdef' | train one with `barcast train`",
    ),
    "config: a model folder that is empty": (
        with_folder('[model]\nfirst = "mine"\n'),
        "mine/model.json | No such file | check the path of the model",
    ),
    "config: a state directory that is a file": (
        config(LEAST, "run", state="x"),
        "state | state_dir | File exists | name a directory that this user may write",
    ),
    "config: a state directory that cannot be made": (
        config(LEAST.replace('"state"', '"/proc/1/state"'), "run"),
        "/proc/1/state | state_dir | No such file | name a directory that this user may write",
    ),
    "config: a state directory of two instances": (
        held,
        "state | state_dir | in use by another | stop it or name",
    ),
}


# --- models

SAMPLE = ["--stamp", "close", "--timeframe", "session", "--calendar", "XNYS", "--symbol", "IBM"]
ID, WEIGHTS, JSON = "2c404eb755b950ed", "weights.safetensors", "model.json"


def model(damage: Damage, *command: str) -> Build:
    """The shipped model with a fault, and a forecast by it or another command."""

    def build(folder: Path) -> list[str]:
        shutil.copytree(sample_checkpoint(), folder / "model")
        damage(folder / "model")
        return list(command) or ["forecast", str(sample_bars()), *SAMPLE, "--model", "model"]

    return build


def body(directory: Path) -> dict[str, Any]:
    """What model.json holds."""
    content: dict[str, Any] = json.loads((directory / JSON).read_text())
    return content


def sign(directory: Path, content: dict[str, Any]) -> None:
    """Write model.json with a right id, as a foreign program or another version would."""
    content = {k: v for k, v in content.items() if k != "id"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    weights = (directory / WEIGHTS).read_bytes() if (directory / WEIGHTS).exists() else b""
    digest = sha256(canonical + b"\0" + weights).hexdigest()[:16]
    (directory / JSON).write_text(json.dumps({"id": digest, **content}))


def field(path: str, value: object = None) -> Damage:
    """A signed model.json in which a field, such as `record.seed`, is another or, with None, missing."""

    def damage(directory: Path) -> None:
        content = inner = body(directory)
        *outer, last = path.split(".")
        for name in outer:
            inner = inner[name]
        inner[last] = value
        if value is None:
            del inner[last]
        sign(directory, content)

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Signed weights that are others."""

    def damage(directory: Path) -> None:
        found = load_file(directory / WEIGHTS)
        change(found)
        save_file(found, directory / WEIGHTS)
        sign(directory, body(directory))

    return damage


def content(name: str, change: Callable[[bytes], bytes], signed: bool = False) -> Damage:
    """A file whose bytes are others, under the old id or a right one."""

    def damage(directory: Path) -> None:
        (directory / name).write_bytes(change((directory / name).read_bytes()))
        if signed:
            sign(directory, body(directory))

    return damage


def flip_a_digit(content: bytes) -> bytes:
    """One bit of a number, which stays a number."""
    at = content.index(b"0.", len(content) // 2) + 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def flip(content: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def a_file(directory: Path) -> None:
    """A file in the place of the folder."""
    shutil.rmtree(directory)
    directory.write_text("x")


def emptied(directory: Path) -> None:
    """A folder without its files."""
    for path in directory.iterdir():
        path.unlink()


DAMAGED = f"{WEIGHTS} | id | '{ID}' | copy the directory again"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "model 'model' | no such folder | name a checkpoint"),
    "an empty folder": (emptied, f"{JSON} | No such file | check the path of the model"),
    "a file for a folder": (a_file, f"{JSON} | Not a directory | check the path of the model"),
    "no weights": (
        lambda d: (d / WEIGHTS).unlink(),
        f"{WEIGHTS} | No such file | check the path of the model",
    ),
    "weights cut off": (content(WEIGHTS, lambda b: b[:1000]), DAMAGED),
    "weights with one flipped bit": (content(WEIGHTS, flip), DAMAGED),
    "empty weights": (content(WEIGHTS, lambda _: b""), DAMAGED),
    "one flipped bit in model.json": (content(JSON, flip_a_digit), DAMAGED),
    "model.json edited by hand": (content(JSON, lambda b: b.replace(b'"session"', b'"1h"')), DAMAGED),
    "model.json cut off": (content(JSON, lambda b: b[:100]), f"{JSON} | not JSON | copy the directory again"),
    "model.json nested too deep": (
        content(JSON, lambda _: b"[" * 99_999),
        f"{JSON} | not JSON | copy the dir",
    ),
    "model.json that is a list": (content(JSON, lambda _: b"[1]"), f"{JSON} | holds a list | copy the dir"),
    "another format": (
        field("format", 4),
        f"{JSON} | format | is 4 | use the version of barcast that wrote it",
    ),
    "a format of the past": (
        field("format", 1),
        f"{JSON} | format | is 1 | use the version of barcast that wrote it, or train again",
    ),
    "another kind": (field("kind", "ldm"), f"{JSON} | kind | 'ldm' | that `barcast train` wrote"),
    "another noise schedule": (
        field("schedule", ["linear", 1000]),
        f"{JSON} | schedule | 'linear' | train again",
    ),
    "another prediction type": (
        field("prediction", "epsilon"),
        f"{JSON} | prediction | 'epsilon' | train again",
    ),
    "other features": (field("features", ["a"]), f"{JSON} | features | ['a'] | train again"),
    "another window": (field("window", 10), f"{JSON} | window | is 10 | train again"),
    "a timeframe that there is not": (field("timeframe", "1w"), f"{JSON} | timeframe | '1w' | train again"),
    "horizons that fall": (
        field("horizons", [5, 1, 20]),
        f"{JSON} | horizons | (5, 1, 20) | give rising counts",
    ),
    "horizons of text": (field("horizons", ["1"]), f"{JSON} | got `str` | train again"),
    "levels that are no probabilities": (
        field("levels", [5, 50]),
        f"{JSON} | levels | (5.0, 50.0) | between 0 and",
    ),
    "more horizons than the network": (
        field("horizons", [1, 5, 40]),
        f"{JSON} | window | 1270 | train again",
    ),
    "a text for a time": (
        field("record.validation_end", "x"),
        f"{JSON} | validation_end | got `str` | train again",
    ),
    "an unknown size": (field("architecture.heads", 4), f"{JSON} | Architecture | 'heads' | train again"),
    "an encoder that there is not": (
        field("architecture.encoder", "lstm"),
        f"{JSON} | architecture.encoder | 'lstm' | s4d, multiscale | train again",
    ),
    "a negative size": (field("architecture.width", -1), f"{JSON} | architecture.width | -1 | train again"),
    "weights of another size": (field("architecture.width", 48), f"{WEIGHTS} | map. | 96 | train again"),
    "members of another number": (
        field("architecture.members", 4),
        f"{WEIGHTS} | map. | (8, | not (4, | train again",
    ),
    "a time zone that there is not": (
        field("scaling.zone", "Mars"),
        f"{JSON} | scaling.zone | 'Mars' | UTC, America/New_York | train again",
    ),
    "a symbol without a season": (
        field("scaling.symbols", ["IBM"]),
        f"{JSON} | scaling.factor | (1, 7), not (2, 7) | train again",
    ),
    "statistics not finite": (
        field("scaling.factor", [[float("nan")] * 7]),
        f"{JSON} | scaling.factor | a number that is not finite | train again",
    ),
    "statistics of zero": (
        lambda d: field("scaling.std", [0.0] * len(body(d)["features"]))(d),
        f"{JSON} | scaling.std | 0.0, not above 0 | train",
    ),
    "too few statistics": (field("scaling.mean", [0.0]), f"{JSON} | scaling.mean | (1,) | train again"),
    "no safetensors": (
        content(WEIGHTS, lambda _: b"x" * 99, signed=True),
        f"{WEIGHTS} | not a safetensors file | copy the directory again",
    ),
    "a tensor missing": (
        tensors(lambda t: t.pop("whiten")),
        f"{WEIGHTS} | tensor whiten | missing | train again",
    ),
    "a tensor too many": (
        tensors(lambda t: t.update(more=torch.ones(1))),
        f"{WEIGHTS} | tensor more | unknown | train again",
    ),
    "a tensor of another shape": (
        tensors(lambda t: t.update(whiten=torch.eye(4))),
        f"{WEIGHTS} | whiten | (4, 4) | train again",
    ),
    "a tensor of another precision": (
        tensors(lambda t: t.update(whiten=torch.eye(3).double())),
        f"{WEIGHTS} | whiten | torch.float64 | train again",
    ),
    "a weight that is not a number": (
        tensors(lambda t: t["map.static"].fill_(float("nan"))),
        f"{WEIGHTS} | map.static | a number that is not finite | train again",
    ),
}
for name in (
    "timeframe",
    "horizons",
    "levels",
    "architecture",
    "scaling",
    "scaling.gain",
    "scaling.zone",
    "scaling.symbols",
    "record",
    "record.seed",
):
    DAMAGES[f"no {name}"] = field(name), f"{JSON} | {name.split('.')[-1]} | missing | train again"
for name in ("format", "kind", "schedule", "prediction", "window", "features"):
    DAMAGES[f"no {name}"] = field(name), f"{JSON} | {name} | None"
for what, (damage, said) in DAMAGES.items():
    CASES[f"model: {what}"] = model(damage), f"model | {said}"


def stored(name: str, damage: Damage, *command: str) -> Build:
    """The shipped model under a name in the store of an instance that has bars, and a command."""

    def build(folder: Path) -> list[str]:
        state = folder / "state"
        shutil.copytree(sample_checkpoint(), state / "models" / name)
        damage(state / "models" / name)
        (state / "history").mkdir()
        pl.read_parquet(sample_bars()).filter(symbol="IBM").write_parquet(state / "history" / "bars.parquet")
        daily = LEAST.replace("1h", "session") + 'calendar = "XNYS"\n'
        config(f'{daily}{SERVED}[model]\nname = "{name}"\n')(folder)
        return [command[0], "barcast.toml", *command[1:]]

    return build


def sound(_: Path) -> None:
    """No damage."""


def other(kind: str, damage: Damage) -> Build:
    """Trees or an ensemble made out of the shipped model, with a fault, and a forecast by it."""

    def build(folder: Path) -> list[str]:
        shipped = checkpoint.load(sample_checkpoint()).trained
        if kind == "lgbm":
            made = kinds.boosted(shipped.scaling, shipped.levels, shipped.record)
        else:
            made = kinds.ensemble(folder / "parts", shipped)
        checkpoint.save(made, folder / "model")
        shutil.rmtree(folder / "parts", ignore_errors=True)
        damage(folder / "model")
        return ["forecast", str(sample_bars()), *SAMPLE, "--model", "model"]

    return build


def unsigned(name: str) -> Damage:
    """A member's file, by a pattern, that is gone."""
    return lambda d: next(d.glob(name)).unlink()


CASES |= {
    "trees: of another format": (
        other("lgbm", field("format", 4)),
        f"{JSON} | format | is 4 | use the version",
    ),
    "trees: cut off": (
        other("lgbm", content(WEIGHTS, lambda b: b[:1000])),
        f"model/{JSON} | id | {WEIGHTS} | copy the directory again",
    ),
    "trees: cut off and signed": (
        other("lgbm", tensors(lambda t: t.update(feature=t["feature"][:9].clone()))),
        f"model/{WEIGHTS} | threshold is (63,) float64 | (9,) | train again",
    ),
    "trees: that run in a circle": (
        other("lgbm", tensors(lambda t: t["children"].fill_(0))),
        f"model/{WEIGHTS} | children of node | behind it | train again",
    ),
    "trees: of features that there are not": (
        other("lgbm", tensors(lambda t: t["feature"].add_(1000))),
        f"model/{WEIGHTS} | feature reaches from 1000 | train again",
    ),
    "ensemble: without a member": (
        other("ensemble", lambda d: shutil.rmtree(next((d / "members").iterdir()))),
        f"model/members/ | {JSON} | No such file | check the path of the model",
    ),
    "ensemble: a member without weights": (
        other("ensemble", unsigned(f"members/*/{WEIGHTS}")),
        f"model/members/ | {WEIGHTS} | No such file | check the path of the model",
    ),
    "ensemble: a member of another's name": (
        other("ensemble", field("members", [{"name": "0" * 16, "model": "x"}] * 3)),
        f"model/members/{'0' * 16}/{JSON} | No such file | check the path of the model",
    ),
    "ensemble: an unknown baseline": (
        other("ensemble", field("members", [{"name": "nobody", "model": "x"}] * 3)),
        f"model/{JSON} | 'nobody' | neither a baseline (hs, | train again",
    ),
    "ensemble: weights that are no numbers": (
        other("ensemble", field("weights", [[float("nan")] * 3] * 3)),
        f"model/{JSON} | weights of horizon 1 | nan | train again",
    ),
    "ensemble: weights without a sum of 1": (
        other("ensemble", field("weights", [[1, 1, 1]] * 3)),
        f"model/{JSON} | weights of horizon 1 | sum of 1 | train again",
    ),
    "ensemble: of another format": (
        other("ensemble", field("format", 4)),
        f"{JSON} | format | is 4 | use the version of barcast that wrote it",
    ),
}
HOURLY = ["--stamp", "close", "--timeframe", "1h"]
CHAMPION = ["--champion", ID]
CASES |= {
    "model: of another timeframe": (
        model(sound, "backtest", str(sample_bars()), *HOURLY, "--model", "model"),
        "model | 'session' | '1h' | name another model or train one",
    ),
    "model: damaged, to begin a training from": (
        model(
            content(WEIGHTS, flip),
            "train",
            str(sample_bars()),
            *SAMPLE,
            "--out",
            "new",
            "--init-from",
            "model",
        ),
        DAMAGED,
    ),
    "model: damaged, in the store": (stored(ID, content(WEIGHTS, flip), "run"), DAMAGED),
    "model: under the id of another": (
        stored("0123456789abcdef", sound, "run"),
        f"models/0123456789abcdef | holds the model {ID} | copy 0123456789abcdef back",
    ),
    "model: a damaged champion, for the trainer": (
        stored(ID, tensors(lambda t: t.pop("noise")), "train-challenger", "--out", "new", *CHAMPION),
        f"models/{ID}/{WEIGHTS} | tensor noise | missing | train again",
    ),
    "model: a damaged champion, for the gate": (
        stored(ID, content(WEIGHTS, flip), "gate", str(sample_checkpoint()), *CHAMPION),
        f"models/{ID} | {DAMAGED}",
    ),
    "model: a damaged challenger": (
        lambda folder: [
            model(content(WEIGHTS, flip))(folder),
            stored(ID, sound, "gate", str(folder / "model"), *CHAMPION)(folder),
        ][1],
        f"model/{JSON} | {DAMAGED}",
    ),
}


# --- bar files

NINE = dt.datetime(2026, 3, 2, 9, tzinfo=dt.UTC)
N = 12


def table(count: int = N, **changes: Any) -> pl.DataFrame:
    """Hourly bars of one symbol; a change is a whole column, None for none, or {row: value}."""
    columns: dict[str, Any] = {
        "symbol": ["BTC"] * count,
        "close_time": [NINE + dt.timedelta(hours=k) for k in range(count)],
        "open": [10.0] * count,
        "high": [12.0] * count,
        "low": [9.0] * count,
        "close": [11.0] * count,
        "volume": [1.0] * count,
    }
    for name, change in changes.items():
        known = columns.get(name)
        columns[name] = (
            [change.get(k, v) for k, v in enumerate(known)] if isinstance(change, dict) else change
        )
    return pl.DataFrame(
        {name: values for name, values in columns.items() if values is not None}, strict=False
    )


OPTIONS = {"train": ["--out", "new"], "forecast": ["--model", "fhs"], "publish": ["--port", "1"]}


def read(name: str, content: bytes, *options: str, by: str = "backtest") -> Build:
    """A file of these bytes, and a command that reads it."""
    return lambda f: [(f / name).write_bytes(content), [by, name, *HOURLY, *OPTIONS.get(by, ()), *options]][1]


def bars(*options: str, by: str = "backtest", frame: pl.DataFrame | None = None, **changes: Any) -> Build:
    """A Parquet file of `table(**changes)` or another frame, and a command that reads it."""

    def build(folder: Path) -> list[str]:
        found = table(**changes) if frame is None else frame
        found.write_parquet(folder / "bars.parquet")
        return read("bars.parquet", (folder / "bars.parquet").read_bytes(), *options, by=by)(folder)

    return build


def csv(*options: str, **changes: Any) -> Build:
    """A CSV of `table(**changes)` with ISO 8601 times, and a backtest of it."""
    frame = table(**changes).with_columns(pl.col(pl.Datetime).dt.to_string("iso:strict"))
    return read("bars.csv", frame.write_csv().encode(), *options)


def cut(folder: Path) -> list[str]:
    """A Parquet file without its second half."""
    command, path = bars()(folder), folder / "bars.parquet"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return command


def history(folder: Path) -> list[str]:
    """A daemon with a bad bar in its history."""
    (folder / "state" / "history").mkdir(parents=True)
    table(low={7: -9.0}).write_parquet(folder / "state" / "history" / "bars.parquet")
    return config(LEAST + SERVED, "run")(folder)


def since_1970(unit: int) -> list[int]:
    """The times as numbers of this many in a second."""
    return [int(hour.timestamp()) * unit for hour in table()["close_time"]]


NAIVE = [hour.replace(tzinfo=None) for hour in table()["close_time"]]
DAYS = [hour.date() for hour in NAIVE]
FAR = pl.Series([1_500_000_000_000_000_000] * N).cast(pl.Datetime("us", "UTC"))
TWICE, MORE_TWICE = (pl.concat([table(), table(high=change)]) for change in ({3: 13.0}, {3: 13.0, 5: 14.0}))
STILL = table(2000, **dict.fromkeys(("open", "high", "low", "close"), [1.0] * 2000))
HEADER = b"symbol,close_time,open,high,low,close,volume\n"
UTF8 = HEADER + b"\xff,2026-03-02T09:00:00Z,1,1,1,1,1\n"
RAGGED = HEADER + b"A,2026-03-02T09:00:00Z,1,1,1,1,1,9,9\n"
ZONE = "dt.replace_time_zone('UTC')"
PARQUET: dict[str, tuple[Build, str]] = {
    "no file": (lambda _: ["backtest", "bars.parquet", *HOURLY], "does not exist | correct the path"),
    "an empty file": (read("bars.parquet", b""), "cannot be read as parquet | write it anew"),
    "a CSV called Parquet": (read("bars.parquet", HEADER), "cannot be read as parquet | write it anew"),
    "a file cut off": (cut, "cannot be read as parquet | write it anew"),
    "no rows": (bars(frame=table().clear()), "no bar; | name files with bars"),
    "a column missing": (bars(volume=None), "has no column | 'volume' | add or rename it"),
    "two columns missing": (
        bars(volume=None, high=None),
        "no column 'high' and no 'volume' | add or rename it",
    ),
    "a column twice, in capitals": (bars(Open=[1.0] * N), "'open' and 'Open' | keep one of them"),
    "no time": (bars(close_time=None), "has no time column | have one, named close_time"),
    "two times": (bars(ts=NAIVE), "close_time, ts | have one, named close_time"),
    "times without a zone": (bars(close_time=NAIVE), f"'close_time' | without a time zone | {ZONE}"),
    "seconds": (bars(close_time=since_1970(1)), f"'close_time' | 1772442000 looks like s since | {ZONE}"),
    "milliseconds": (
        bars(close_time=since_1970(10**3), by="train"),
        f"'close_time' | 1772442000000 looks like ms since 1970 | pl.from_epoch( | {ZONE}",
    ),
    "microseconds": (
        bars(close_time=since_1970(10**6), by="forecast"),
        f"'close_time' | looks like us since 1970 | pl.from_epoch( | {ZONE}",
    ),
    "nanoseconds": (
        bars(close_time=since_1970(10**9), by="publish"),
        f"'close_time' | looks like ns since 1970 | pl.from_epoch( | {ZONE}",
    ),
    "fractions of seconds": (
        bars(close_time=[t + 0.5 for t in since_1970(1)]),
        f"'close_time' | 1772442000.5 looks like s since 1970 | pl.from_epoch( | {ZONE}",
    ),
    "small numbers for times": (
        bars(close_time=[1] * N),
        "'close_time' | holds Int64 | write datetimes with",
    ),
    "dates of hourly bars": (
        bars(close_time=DAYS),
        "'close_time' | the timeframe is 1h | write date and time",
    ),
    "a time off the grid": (
        bars(close_time={4: NINE + dt.timedelta(minutes=7)}),
        "row 5 | 2026-03-02 09:07 | no 1h bar of the calendar 24x7 closes | correct the time",
    ),
    "a time before 1970": (
        bars(close_time={0: dt.datetime(1969, 12, 31, 23, tzinfo=dt.UTC)}),
        "row 1 | 1969-12-31 23:00 | write a date and time from 1970 on",
    ),
    "a time in the year 49503": (bars(close_time=FAR), "row 1 | 1500000000000000000 | write a date and time"),
    "a time when an exchange is shut": (bars("--calendar", "XNYS"), "row 1 | 09:00 | take the calendar ("),
    "a time beyond an exchange's sessions": (
        bars("--calendar", "XNYS", close_time={2: dt.datetime(2250, 1, 3, 15, tzinfo=dt.UTC)}),
        "'close_time' | 2250-01-03 | it reaches from 1970 to 2199",
    ),
    "an empty time": (bars(close_time={1: None}), "row 2 | the time is empty | write a date and time"),
    "a negative price": (
        bars(low={7: -9.0}),
        "row 8, BTC at 2026-03-02 16:00 | 'low' is '-9.0' | correct or remove",
    ),
    "a price of zero": (bars(low={7: 0.0}, by="forecast"), "row 8 | 'low' is '0.0' | prices are positive"),
    "a price of NaN": (
        bars(close={2: float("nan")}, by="train"),
        "row 3 | 'close' is 'NaN' | correct or remove",
    ),
    "an infinite price": (bars(high={2: float("inf")}, by="publish"), "row 3 | 'high' is 'inf' | correct or"),
    "a price that no market has": (
        bars(high={2: 1e30}),
        "row 3 | 'high' is '1e+30' | that a market can have",
    ),
    "an empty price": (bars(open={2: None}), "row 3 | column 'open' is empty | correct or remove the row"),
    "a price with a comma": (bars(open=["1,5"] * N), "row 1 | 'open' is '1,5' | prices are positive numbers"),
    "true and false for prices": (bars(open=[True] * N), "'open' | holds Boolean | write numbers"),
    "lists for prices": (bars(open=[[1.0]] * N), "'open' | holds List(Float64) | write numbers"),
    "a high below the low": (
        bars(high={0: 8.0}),
        "row 1 | 'low' is '9.0' beside open 10.0, high 8.0 | correct or",
    ),
    "a high below the close": (
        bars(high={0: 10.5}),
        "row 1 | 'high' is '10.5' beside open 10.0 | correct or",
    ),
    "a negative volume": (bars(volume={3: -1.0}), "row 4 | 'volume' is '-1.0' | write 0 where it is unknown"),
    "a bad symbol": (bars(symbol={3: "btc"}), "row 4 | 'symbol' is 'btc' | spell it in A-Z"),
    "an empty symbol": (bars(symbol={3: None}), "row 4 | column 'symbol' is empty | spell it in A-Z"),
    "bytes for symbols": (bars(symbol=[b"BTC"] * N), "'symbol' | holds Binary | write texts"),
    "a symbol asked for that is not there": (
        bars("--symbol", "DOGE"),
        "No bar of DOGE | correct the symbols",
    ),
    "no bars since then": (bars("--since", "2027-01-01"), "2027-01-01 | give an earlier one"),
    "no bars until then": (
        bars("--until", "2020-01-01", by="train"),
        "before 2020-01-01T00:00:00Z | widen",
    ),
    "a bar twice that differs": (
        bars(frame=TWICE),
        "column 'high' is 1 | BTC closing at 2026-03-02T12:00:00Z | keep the right one",
    ),
    "bars twice that differ": (
        bars(frame=MORE_TWICE),
        "column 'high' | In all 2 bars are there twice | keep the",
    ),
    "many faults": (
        bars(low={1: -1.0, 2: -1.0, 3: -1.0}, symbol={7: "x"}, close_time={9: None}),
        "row 2 | 'low' is '-1.0' | correct or remove | In all 5 rows cannot be used: column 'low' in 3, ",
    ),
    "a daemon's history": (
        history,
        "state/history | row 8 | column 'low' is '-9.0' | correct or remove the row",
    ),
}
CSV: dict[str, tuple[Build, str]] = {
    "an empty file": (read("bars.csv", b""), "cannot be read as csv | write it anew"),
    "a header alone": (read("bars.csv", HEADER), "no bar; | name files with bars"),
    "rows longer than the header": (read("bars.csv", RAGGED), "cannot be read as csv | write it anew"),
    "not UTF-8": (read("bars.csv", UTF8), "cannot be read as csv | invalid utf-8 | write it anew"),
    "semicolons": (
        read("bars.csv", HEADER.replace(b",", b";")),
        "symbol;close_time;open | by commas, not semicolons",
    ),
    "a column twice": (
        read("bars.csv", HEADER.replace(b"vol", b"open,vol")),
        "two columns 'open' | keep one of",
    ),
    "times without a zone": (
        csv(close_time=[hour.isoformat() for hour in NAIVE]),
        "row 1 | '2026-03-02T09:00:00' | write the time zone",
    ),
    "seconds": (csv(close_time=since_1970(1)), f"'close_time' | 1772442000 looks like s since | {ZONE}"),
    "milliseconds": (csv(close_time=since_1970(1000)), f"'close_time' | looks like ms since 1970 | {ZONE}"),
    "dates of days that end nowhere": (
        csv("--timeframe", "1d", close_time=DAYS),
        "'close_time' | holds dates | write date and time, or stamp by the open",
    ),
    "a word for a time": (csv(close_time=["soon"] * N), "row 1 | 'soon' | write a date and time"),
    "a word for a price": (
        csv(open=["n/a"] * N),
        "row 1 | column 'open' is 'n/a' | correct or remove the row",
    ),
    "an empty volume": (
        csv(volume={3: None}),
        "row 4 | column 'volume' is empty | write 0 where it is unknown",
    ),
}
for suffix, entries in (("parquet", PARQUET), ("csv", CSV)):
    for what, (build, said) in entries.items():
        CASES[f"{suffix}: {what}"] = build, f"bars.{suffix} | {said}"
CASES |= {
    "bars: a text file": (read("bars.txt", b"x"), "bars.txt | neither .parquet nor .csv | convert it"),
    "bars: a folder without files": (
        lambda _: ["backtest", ".", *HOURLY],
        ". | holds no .parquet or .csv | put one",
    ),
    "bars: too few to learn from": (bars(by="train"), "BTC has 12 bars to learn from | give at least"),
    "bars: all stand still": (bars(by="train", frame=STILL), "BTC | unchanged in 100% | leave it out"),
}


# --- journals


def recorded(folder: Path) -> Path:
    """A journal with its opening and some hundred bars."""
    (folder / "state").mkdir()
    path = folder / "state" / "journal.db"
    journal = Journal(path)
    bar = b'{"close_time":"2026-03-02T09:00:00Z","open":1,"high":1,"low":1,"close":1,"volume":1}'
    activation = b'{"model":"fhs","fingerprint":"f","window":649,"reason":"test"}'
    opening = [(Kind.REVISION, settings().encode()), (Kind.ACTIVATION, activation)]
    journal.append([(START, kind, "", payload) for kind, payload in opening])
    journal.append([(START + k, Kind.BARS, "t/bars/1m/A", bar) for k in range(400)])
    journal.close()
    return path


def journal(damage: Damage, command: str = "verify", timeframe: str = "1m") -> Build:
    """A journal with a fault, and a replay of it or the daemon on it."""

    def build(folder: Path) -> list[str]:
        damage(recorded(folder))
        daemon = config(LEAST.replace("1h", timeframe) + SERVED, "run")(folder)
        return daemon if command == "run" else ["verify", "state/journal.db"]

    return build


def sql(statement: str) -> Damage:
    """The journal after a statement."""

    def damage(path: Path) -> None:
        db = sqlite3.connect(path)
        db.execute(statement)
        db.commit()
        db.close()

    return damage


def foreign(path: Path) -> None:
    """Another program's database in the place of the journal."""
    path.unlink()
    sql("CREATE TABLE mine (n)")(path)


def captured(content: bytes, name: str = "seen.txt") -> Build:
    """A capture beside a journal."""

    def build(folder: Path) -> list[str]:
        (folder / "seen.txt").write_bytes(content)
        recorded(folder)
        return ["verify", "state/journal.db", "--capture", name]

    return build


GOSSIP = "UPDATE record SET kind = 'gossip' WHERE seq = 2"
BROKEN = "UPDATE record SET payload = X'7B7D' WHERE seq = 1"
FUTURE = "UPDATE record SET time = 4000000000000000000 WHERE seq = 402"
GONE = "UPDATE record SET payload = replace(payload, 'fhs', '0123456789abcdef') WHERE seq = 2"
JOURNALS: dict[str, tuple[Damage, str]] = {
    "text": (lambda p: p.write_text("x" * 999), "not a database | restore a copy"),
    "a later version": (sql("PRAGMA user_version = 7"), "journal version | 7 | use the version of barcast"),
    "cut off": (
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        "malformed | restore a copy",
    ),
    "another program's": (foreign, "another program's database | move it away"),
    "a record of unknown kind": (sql(GOSSIP), "record 2 | 'gossip' | use the version of barcast"),
    "damaged settings": (sql(BROKEN), "record 1 | missing required field `root` | restore a copy"),
}
for what, (damage, said) in JOURNALS.items():
    for command in ("verify", "run"):
        CASES[f"journal: {what}, for {command}"] = journal(damage, command), f"journal.db | {said}"
CASES |= {
    "journal: no file": (
        lambda _: ["verify", "journal.db"],
        "journal.db | no journal there | give the journal.db of",
    ),
    "journal: empty": (journal(lambda p: p.write_bytes(b"")), "journal.db | it is empty | restore a copy"),
    "journal: no records": (
        journal(sql("DELETE FROM record")),
        "journal.db | nothing was recorded | run the daemon",
    ),
    "journal: of another timeframe": (
        journal(sound, "run", timeframe="1h"),
        "state | timeframe | 1m bars on 24x7, not 1h | name another state_dir",
    ),
    "journal: from the future": (
        journal(sql(FUTURE), "run"),
        "journal.db | newest record | 2096-10-02 | set the clock right",
    ),
    "journal: of a model that is gone": (
        journal(sql(GONE), "run"),
        "models/0123456789abcdef/model.json | No such file | check the path of the model",
    ),
    "capture: no file": (captured(b"", "absent.txt"), "absent.txt | no such file | name the lines"),
    "capture: a line that is no message": (
        captured(b't/groups/1m {}\n["t/groups/1m"]\n'),
        'seen.txt | line 2 | ["t/groups/1m"] | write topic, blank and payload',
    ),
}


# --- what must come of them


@pytest.fixture
def barcast(run, tmp_path, monkeypatch):
    """Run the command line in the folder; give exit status, output and error output."""
    monkeypatch.chdir(tmp_path)
    yield lambda arguments: run(*arguments)
    LOCKS.clear()


def files(folder):
    """Every file and folder, but for what a daemon opens before it decides."""
    opened = (
        "state",
        *(f"state/{name}" for name in ("lock", "journal.db", "journal.db-wal", "journal.db-shm")),
    )
    found = {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}
    return {name: content for name, content in found.items() if name not in opened}


def rows(folder):
    """What the journal holds, none if there is no journal that can be read."""
    try:
        db = sqlite3.connect(f"file:{folder / 'state' / 'journal.db'}?mode=ro", uri=True)
        return [*db.execute("SELECT * FROM record"), *db.execute("SELECT * FROM outbox")]
    except sqlite3.DatabaseError:
        return []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", CASES)
def test_fault_ends_in_one_sentence(tmp_path, barcast, what):
    """One line with file, field, value and remedy, and status 78; nothing is said beside it or written."""
    build, said = CASES[what]
    arguments = build(tmp_path)
    before = files(tmp_path), rows(tmp_path)
    status, out, err = barcast(arguments)
    assert (status, out) == (78, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in said.split(" | "):
        assert part in err
    assert (files(tmp_path), rows(tmp_path)) == before


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_model_is_never_opened(tmp_path, what):
    """No damage gives a model with other weights, random ones least of all."""
    model(DAMAGES[what][0])(tmp_path)
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "model")


def test_every_fault_of_a_configuration_is_in_one_message(tmp_path, barcast):
    """Several faults are one message of a line each, so that one run names them all."""
    faults = 'max_wait = 2\n[mqtt]\nprt = 1\nport = 0\n[[strategy]]\nkind = "x"\n'
    status, out, err = barcast(config(LEAST + faults)(tmp_path))
    assert (status, out) == (78, "")
    keys = [line.split(": ")[1] for line in err.removeprefix("error: ").splitlines()]
    assert keys == ["max_wait", "mqtt.port", "mqtt.prt", "strategy.0"]


GOOD = {
    "configuration": config(LEAST),
    "model": model(sound),
    "trees": other("lgbm", sound),
    "ensemble": other("ensemble", sound),
    "model in a store": stored(ID, sound, "gate", str(sample_checkpoint()), "--champion", "fhs"),
    "parquet": bars(count=300, by="forecast"),
    "csv": csv(count=400),
    "journal": journal(sql("DELETE FROM record WHERE kind = 'activation'")),
}


@pytest.mark.parametrize("what", GOOD)
def test_what_the_faults_were_made_from_works(tmp_path, barcast, monkeypatch, what):
    """The control: without its fault, each kind of input is accepted."""
    monkeypatch.setattr(gate, "MAX_ORIGINS", 60)
    status, out, err = barcast(GOOD[what](tmp_path))
    assert (status, bool(out)) == (0, True), err
