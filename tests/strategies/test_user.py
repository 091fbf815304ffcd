"""Strategies that a user brings: a file, a package; whatever is wrong with them is one clear sentence."""

import gc
import hashlib
import importlib.metadata
import pickle
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import numpy as np
import pytest

from barcast.models import ConfigError, Forecast
from barcast.strategies import build, identify, kinds, user

MINE = """\
from __future__ import annotations
from dataclasses import dataclass
from typing import Annotated
from msgspec import Meta
from barcast.models import Forecast

@dataclass(frozen=True, slots=True)
class Half:
    name: str
    size: Annotated[float, Meta(ge=0, le=1)] = 0.5

    def on_forecasts(self, close_time: int, forecasts: dict[str, Forecast]) -> dict[str, float]:
        return {symbol: self.size for symbol in forecasts}
"""
OTHER = "\n@dataclass(frozen=True)\nclass Other(Half):\n    pass\n"
ONE = np.zeros((1, 1))
IBM = {"IBM": Forecast("IBM", 0, 1.0, (1,), (0.5,), ONE, ONE[0], ONE[0], ONE[0], False)}


def put(folder: Path, source: str | bytes) -> str:
    """Write a file; return its path."""
    path = folder / "mine.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    return str(path)


@pytest.mark.parametrize("named", ["", ":Half"])
def test_class_of_a_file(tmp_path: Path, named: str) -> None:
    """A file and its class make a strategy, with the parameters that its fields say; one class is found."""
    kind = put(tmp_path, MINE) + named
    assert build(kind, "h", {"size": 1}).on_forecasts(0, IBM) == {"IBM": 1.0}
    assert build(kind, "h", {}).on_forecasts(0, IBM) == {"IBM": 0.5}
    assert identify(kind) == ("Half", hashlib.sha256(MINE.encode()).hexdigest()[:16])
    with pytest.raises(ConfigError, match="'h': parameter size is 2, not a number from 0 to 1"):
        build(kind, "h", {"size": 2})
    with pytest.raises(ConfigError, match="'h' has no parameter 'sizes': did you mean size"):
        build(kind, "h", {"sizes": 1})


def test_one_of_several_classes(tmp_path: Path) -> None:
    """Of several strategies in a file one must be named; classes that it imports are not its own."""
    path = put(tmp_path, MINE + OTHER)
    assert type(build(f"{path}:Other", "o", {})).__name__ == "Other"
    with pytest.raises(ConfigError, match=rf"which class\? Write {path}:Half or {path}:Other"):
        identify(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ndef f(:\n", r"mine\.py, line 2: SyntaxError: invalid syntax"),
        ("import nowhere_at_all\n", r"mine\.py, line 1: ModuleNotFoundError: No module named 'nowhere"),
        ("def f():\n    return 1 / 0\nf()\n", r"mine\.py, line 2: ZeroDivisionError: division by zero"),
        ("raise ValueError('two\\nlines')\n", r"mine\.py, line 1: ValueError: two lines; correct it there"),
        ("\n\nraise SystemExit(3)\n", r"mine\.py, line 3: SystemExit: 3"),
        (b"x = '\xff'\n", r"mine\.py, line 1: SyntaxError"),
        ("", r"mine\.py: no class in it has a method on_forecasts; write one"),
        (MINE.replace("on_forecasts", "on_forecast"), "no class in it has a method on_forecasts"),
        (MINE.replace("@dataclass(frozen=True, slots=True)", ""), "Half is no dataclass; write @dataclass"),
        (MINE.replace("name: str", "names: str"), "Half does not begin with the field `name`"),
        (MINE.replace("self, close_time: int, ", "self, "), "Half cannot be asked; write on_forecasts"),
        (MINE.replace("Annotated[float", "Annotated[floating"), "Half has a field of an unknown type .*floa"),
    ],
)
def test_file_that_is_no_strategy(tmp_path: Path, source: str | bytes, message: str) -> None:
    """What is wrong with a file is said with file, line and remedy, and the cause is kept."""
    kind = put(tmp_path, source)
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=message) as caught:
        identify(kind)
    assert "\n" not in str(caught.value)
    if "Error:" in message or "SystemExit" in message:
        assert caught.value.__cause__ is not None
        assert set(sys.modules) <= before


def test_class_that_is_not_there(tmp_path: Path) -> None:
    """A misspelt class is named beside those that there are, and so is what is no class."""
    path = put(tmp_path, MINE + "LIMIT = 3\n")
    with pytest.raises(ConfigError, match="no class Halve in it: did you mean Half"):
        identify(f"{path}:Halve")
    with pytest.raises(ConfigError, match="3 is no class; name the class of a strategy"):
        identify(f"{path}:LIMIT")


def test_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file and a folder are named."""
    with pytest.raises(ConfigError, match=r"absent\.py: No such file or directory; name a Python file"):
        identify(str(tmp_path / "absent.py"))
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.py: Is a directory"):
        identify(str(tmp_path / "folder.py"))


def test_own_checks_of_a_class(tmp_path: Path) -> None:
    """What a class says of its parameters when it is made is said with the strategy's name."""
    check = "    def __post_init__(self):\n        if self.size > 0.9: raise ValueError('too much')\n"
    kind = put(tmp_path, MINE + check)
    with pytest.raises(ConfigError, match="strategy 'h': too much"):
        build(kind, "h", {"size": 1})


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero; correct it there"),
        ("open('nowhere.csv')", "FileNotFoundError: .*'nowhere.csv'; correct it there"),
        ("self.other", "AttributeError: .*no attribute 'other'; correct it there"),
        ("raise SystemExit(1)", "SystemExit: 1; correct it there"),
    ],
)
def test_class_that_raises_when_it_is_made(tmp_path: Path, does: str, message: str) -> None:
    """Whatever a constructor raises is said with the strategy's name, the file and the line in it."""
    kind = put(tmp_path, f"{MINE}\n    def __post_init__(self):\n        {does}\n")
    line = len(MINE.splitlines()) + 3
    with pytest.raises(ConfigError, match=rf"strategy 'h' of .*mine\.py, line {line}: {message}") as caught:
        build(kind, "h", {})
    assert caught.value.__cause__ is not None


def test_changed_file_is_refused(tmp_path: Path) -> None:
    """A file with another digest than the recorded one is refused; without one it is taken as it is."""
    kind = put(tmp_path, MINE)
    other = hashlib.sha256(MINE.replace("0.5", "0.4").encode()).hexdigest()[:16]
    _, digest = identify(kind)
    with pytest.raises(ConfigError, match=rf"changed since it was recorded .*{digest}, not {other}\); put"):
        build(kind, "h", {}, other)
    put(tmp_path, MINE.replace("0.5", "0.4"))
    assert build(kind, "h", {}, other).on_forecasts(0, IBM) == {"IBM": 0.4}
    assert build(kind, "h", {}).on_forecasts(0, IBM) == {"IBM": 0.4}
    # What this process has loaded it can go on with, as a daemon does whose file is being edited.
    assert build(kind, "h", {}, digest).on_forecasts(0, IBM) == {"IBM": 0.5}
    Path(kind).unlink()
    assert build(kind, "h", {}, digest).on_forecasts(0, IBM) == {"IBM": 0.5}


def test_same_size_and_second_is_another_version(tmp_path: Path) -> None:
    """A change that no time stamp shows is seen: what Python caches of a file is not used."""
    kind = put(tmp_path, MINE)
    for size in ("0.5", "0.6", "0.7"):
        put(tmp_path, MINE.replace("0.5", size))
        assert build(kind, "h", {}).on_forecasts(0, IBM) == {"IBM": float(size)}
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


COUNTS = """
COUNT = 0

@dataclass(frozen=True)
class Counts:
    name: str

    def on_forecasts(self, close_time, forecasts):
        global COUNT
        COUNT += 1
        return dict.fromkeys(forecasts, COUNT / 100)
"""


def test_every_build_has_a_module_of_its_own(tmp_path: Path) -> None:
    """What a module keeps is one strategy's alone, also where the file is gone meanwhile."""
    kind = put(tmp_path, MINE + COUNTS) + ":Counts"
    one = build(kind, "one", {})
    assert [one.on_forecasts(0, IBM)["IBM"] for _ in range(3)] == [0.01, 0.02, 0.03]
    digest = identify(kind)[1]
    Path(kind.removesuffix(":Counts")).unlink()
    assert build(kind, "two", {}, digest).on_forecasts(0, IBM) == {"IBM": 0.01}
    assert one.on_forecasts(0, IBM) == {"IBM": 0.04}


SETS = """
import sys
SIZE, ONCE = 0.5, 1

@dataclass(frozen=True)
class Sets:
    name: str

    def on_forecasts(self, close_time, forecasts):
        setattr(sys.modules[__name__], "SIZE", SIZE / 2)
        if "ONCE" in globals():
            del sys.modules[__name__].ONCE
        return dict.fromkeys(forecasts, SIZE)
"""


def test_module_can_be_changed_by_its_name(tmp_path: Path) -> None:
    """What is set or deleted in what stands under the module's name is changed in the module."""
    one = build(put(tmp_path, MINE + SETS) + ":Sets", "one", {})
    assert [one.on_forecasts(0, IBM)["IBM"] for _ in range(2)] == [0.25, 0.125]
    place = sys.modules[type(one).__module__]
    assert not hasattr(place, "ONCE")
    del one
    gc.collect()
    place.SIZE = 1
    assert place.SIZE == 1
    del place.SIZE
    assert not hasattr(place, "SIZE")


def test_module_is_there_as_long_as_its_strategy(tmp_path: Path) -> None:
    """A strategy can be pickled and its hints be looked up while it is in use; then nothing is left of it."""
    gc.collect()
    before = set(sys.modules)
    kind = put(tmp_path, MINE + OTHER) + ":Half"
    made = [build(kind, f"h{n}", {"size": 0.25}) for n in range(20)]
    gc.collect()
    assert len({type(one) for one in made}) == 20
    for one in made:
        assert pickle.loads(pickle.dumps(one)) == one
        assert get_type_hints(type(one))["size"] is float
    assert len({*sys.modules.values()}) > 20  # others look through them, too
    del made, one
    gc.collect()
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("name", "called"), [("_Half", "Half"), ("Größe", "Gre"), ("H" * 40, "H" * 32), ("A_b", "A_b")]
)
def test_name_of_a_class_is_a_segment(tmp_path: Path, name: str, called: str) -> None:
    """Without a name a strategy is called after its class, in what a topic allows."""
    assert identify(put(tmp_path, MINE.replace("Half", name)))[0] == called


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed package that offers strategies; the name of its module."""
    path, name = Path(put(tmp_path, MINE)), "a_package_with_strategies"
    module = ModuleType(name)
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(MINE, path, "exec"), module.__dict__)
    points = [
        EntryPoint("half", f"{name}:Half", user.GROUP),
        EntryPoint("broken", f"{name}:Nothing", user.GROUP),
        EntryPoint("function", f"{name}:dataclass", user.GROUP),
        EntryPoint("rank", f"{name}:Half", user.GROUP),
        EntryPoint("twice", f"{name}:Half", user.GROUP),
        EntryPoint("twice", f"{name}:Other", user.GROUP),
    ]

    def found(**wanted: Any) -> importlib.metadata.EntryPoints:
        return importlib.metadata.EntryPoints(points).select(**wanted)

    monkeypatch.setattr(user, "entry_points", found)
    user.from_package.cache_clear()
    yield name
    user.from_package.cache_clear()


def test_entry_point_of_a_package(package: str) -> None:
    """What a package offers is named like what is built in, which comes first."""
    assert build("half", "h", {"size": 1}).on_forecasts(0, IBM) == {"IBM": 1.0}
    name, digest = identify("half")
    assert (name, digest) == ("half", hashlib.sha256(MINE.encode()).hexdigest()[:16])
    assert build("half", "h", {}, digest) == build("half", "h", {})
    assert "half" in kinds()
    assert kinds().count("rank") == 1
    assert type(build("rank", "r", {})).__name__ == "Rank"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hal", "kind 'hal' is unknown: did you mean half"),
        ("broken", r"entry point 'broken' \(.*:Nothing\): AttributeError: .*Nothing"),
        ("function", "function dataclass at .* is no class"),
        ("twice", "'twice' .* is offered more than once"),
    ],
)
def test_entry_point_that_is_no_strategy(package: str, kind: str, message: str) -> None:
    """An unknown or broken entry point is said with its name."""
    with pytest.raises(ConfigError, match=message):
        build(kind, "x", {})


def test_changed_package_is_refused(package: str) -> None:
    """A package with another digest than the recorded one is refused."""
    with pytest.raises(ConfigError, match="'half': its package changed since it was recorded"):
        build("half", "h", {}, "0" * 16)
