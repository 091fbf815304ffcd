"""Strategies that are not built in: a class in a Python file, or the entry point of an installed package."""

import hashlib
import inspect
import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import entry_points
from itertools import count
from pathlib import Path
from traceback import extract_tb
from types import CodeType, ModuleType
from typing import Any, get_type_hints

from barcast.models import ConfigError
from barcast.strategies.params import one_of

GROUP = "barcast.strategies"
"""The group of entry points in which packages offer strategies."""

PATH = re.compile(r"(?P<file>.+\.py)(?::(?P<name>[^\W\d]\w*))?", re.DOTALL)
"""A kind that is a file, with the class in it, which may be left out when it is the only strategy there."""

_COMPILED: dict[tuple[Path, str], CodeType] = {}
"""The versions of files that this process has read, by path and digest: it can go on with each."""

_NUMBERS = count()


def packaged() -> list[str]:
    """The names of the strategies that installed packages offer."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def from_file(path: Path, name: str | None, digest: str, kept: Path | None = None) -> tuple[type, str]:
    """The strategy's class of a file, and the digest of the file.

    Each call executes the file as a module of its own, so that what it keeps in one is nowhere else. With a
    `digest` it is the file as it was then, which may be `kept` as DIGEST.py in a folder: whatever the file
    says now, and wherever it is. The file stands alone: what it imports must be installed. Raise
    `ConfigError` for one that is missing, that fails, that has another digest, or that has no such strategy
    in it.
    """
    code = _COMPILED.get((path, digest))
    if code is None:
        version = None if kept is None else kept / f"{digest}.py"
        try:
            source = (version if version is not None and version.is_file() else path).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"strategy {path}: {reason}; name a Python file that can be read") from error
        found = hashlib.sha256(source).hexdigest()[:16]
        if digest not in ("", found):
            raise ConfigError(
                f"strategy {path}: changed since it was recorded (its digest is {found}, not {digest}); put "
                "that version back to go on from there, and give a changed one a file of its own"
            )
        digest = found
        code = _COMPILED.get((path, digest))
        if code is None:
            with _said(
                str(path), path
            ):  # from what was hashed: what Python caches may be of an older version
                code = compile(source, path, "exec")
            _COMPILED[path, digest] = code
    module = _executed(path, code, f"barcast_strategy_{digest}_{next(_NUMBERS)}")
    return _usable(str(path), _class(path, name, module)), digest


@cache
def from_package(name: str) -> tuple[type, str] | None:
    """The strategy's class of an entry point, and the digest of the file it is in; None where there is none.

    Raise `ConfigError` for one that cannot be loaded or is no strategy.
    """
    points = {point.value: point for point in entry_points(group=GROUP, name=name)}
    if not points:
        return None
    where = f"entry point {name!r} ({', '.join(points)})"
    if len(points) > 1:
        raise ConfigError(f"strategy {where} is offered more than once; uninstall one of the packages")
    with _said(where, None):
        found = next(iter(points.values())).load()
    source = getattr(sys.modules.get(getattr(found, "__module__", "")), "__file__", None)
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16] if source else ""
    return _usable(where, found), digest


class _Place(ModuleType):
    """What stands for a module among those that were imported, and does not hold it."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module.__name__)
        object.__setattr__(self, "_module", weakref.ref(module))

    def __getattribute__(self, name: str) -> Any:
        module = object.__getattribute__(self, "_module")()
        return object.__getattribute__(self, name) if module is None else getattr(module, name)

    def __setattr__(self, name: str, value: object) -> None:
        module = object.__getattribute__(self, "_module")()
        object.__setattr__(self if module is None else module, name, value)

    def __delattr__(self, name: str) -> None:
        module = object.__getattribute__(self, "_module")()
        object.__delattr__(self if module is None else module, name)


def _executed(path: Path, code: CodeType, name: str) -> ModuleType:
    """A new module made by the code, which can be imported by its name for as long as anything of it is used.

    Dataclasses, type hints and pickle look a module up by name, also later. The module is not held by its
    place there but by its own functions, through the variables that they share: it goes with the last of
    them, however many were made.
    """
    module = ModuleType(name)
    module.__file__ = str(path)
    vars(module)["__barcast__"] = module
    sys.modules[name] = _Place(module)
    weakref.finalize(module, sys.modules.pop, name, None).atexit = False
    try:
        with _said(str(path), path):
            exec(code, vars(module))
    except ConfigError:
        del sys.modules[name]
        raise
    return module


def made(cls: type, name: str, values: Mapping[str, Any]) -> Any:
    """The class called with these values. Raise `ConfigError` where it raises, saying where in its file.

    A ValueError is what the class itself says of its parameters.
    """
    try:
        return cls(name=name, **values)
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"strategy {name!r}: {error}") from error
    except (Exception, SystemExit) as error:
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        raise ConfigError(_told(f"{name!r}" + (f" of {file}" if file else ""), file, error)) from error


@contextmanager
def _said(where: str, path: Path | None) -> Iterator[None]:
    """Say of whatever goes wrong in foreign code where it was."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ConfigError(_told(where, None if path is None else str(path), error)) from error


def _told(where: str, file: str | None, error: BaseException) -> str:
    """What was raised, and in which line of the file."""
    lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == file]
    reason = str(error)
    if isinstance(error, SyntaxError) and error.filename == file:
        lines, reason = [error.lineno], error.msg
    line, reason = f", line {lines[-1]}" if lines else "", " ".join(reason.split())
    return f"strategy {where}{line}: {type(error).__name__}: {reason}; correct it there"


def _class(path: Path, name: str | None, module: ModuleType) -> Any:
    own = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
    }
    if name is not None:
        if name not in vars(module):
            raise ConfigError(f"strategy {path}: there is no class {name} in it: {one_of(name, own)}.")
        return vars(module)[name]
    found = [key for key, value in own.items() if hasattr(value, "on_forecasts")]
    if not found:
        raise ConfigError(f"strategy {path}: no class in it has a method on_forecasts; write one")
    if len(found) > 1:
        raise ConfigError(f"strategy {path}: which class? Write {' or '.join(f'{path}:{k}' for k in found)}")
    return own[found[0]]


def _usable(where: str, cls: Any) -> type:
    """The class, if it has the form of a strategy. Raise `ConfigError` saying what is missing."""
    if not isinstance(cls, type):
        raise ConfigError(f"strategy {where}: {cls!r:.60} is no class; name the class of a strategy")
    lacks = ""
    if not is_dataclass(cls):
        lacks = "is no dataclass; write @dataclass(frozen=True) above it"
    elif [field.name for field in fields(cls)][:1] != ["name"]:
        lacks = "does not begin with the field `name`; write `name: str` first"
    elif not callable(method := getattr(cls, "on_forecasts", None)):
        lacks = "has no method on_forecasts; write on_forecasts(self, close_time, forecasts)"
    else:
        try:
            inspect.signature(method).bind(None, 0, {})
        except TypeError:
            lacks = "cannot be asked; write on_forecasts(self, close_time, forecasts)"
        try:
            get_type_hints(cls)
        except (NameError, AttributeError) as error:
            lacks = f"has a field of an unknown type ({error}); import it, outside of `if TYPE_CHECKING`"
    if lacks:
        raise ConfigError(f"strategy {where}: the class {cls.__name__} {lacks}")
    return cls
