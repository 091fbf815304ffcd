"""Parameters of a strategy: what its fields say of them, checked before it is made."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from math import isfinite
from typing import Any, get_type_hints

import msgspec
from msgspec import inspect

from barcast.models import ConfigError

SHOWN = 60
"""Characters of a wrong value that a sentence shows."""


def checked(cls: type, name: str, params: Mapping[str, object]) -> dict[str, Any]:
    """The parameters as the fields of a strategy's class want them.

    A field's type says what fits: bool, int, float, str, a Literal of these, one of them or None, with bounds
    as `Annotated[float, msgspec.Meta(ge=0)]`. No number is a bool, no int has a point, and a float is finite.
    Raise `ConfigError` for a parameter that the class lacks, one that it needs and a value that does not fit.
    """
    hints = get_type_hints(cls, include_extras=True)
    known = [field for field in fields(cls) if field.name != "name" and field.init]
    values: dict[str, Any] = {}
    for param, value in params.items():
        if param not in (names := [field.name for field in known]):
            raise ConfigError(f"strategy {name!r} has no parameter {param!r}: {one_of(param, names)}.")
        try:
            values[param] = msgspec.convert(value, hints[param])
            fits = not isinstance(values[param], float) or isfinite(values[param])
        except (msgspec.ValidationError, TypeError):  # TypeError: a type that msgspec does not know
            fits = False
        if not fits:
            raise ConfigError(
                f"strategy {name!r}: parameter {param} is {value!r:.{SHOWN}}, not {_wanted(hints[param])}."
            )
    for field in known:
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(
                f"strategy {name!r} needs the parameter {field.name}: give it {_wanted(hints[field.name])}."
            )
    return values


def parameters_of(strategy: Any) -> dict[str, object]:
    """What can be set of a strategy, beside its name, in JSON's values: not what it works out for itself."""
    own = {one.name: getattr(strategy, one.name) for one in fields(strategy) if one.init}
    return {name: msgspec.to_builtins(value, enc_hook=str) for name, value in own.items() if name != "name"}


def one_of(given: str, known: Iterable[str]) -> str:
    """What there is instead of a name that there is not, the nearest first."""
    names = list(known)
    near, listed = difflib.get_close_matches(given, names, n=1), ", ".join(names)
    if near:
        return f"did you mean {near[0]}? There are {listed}"
    return f"take one of {listed}" if names else "there is none"


def _wanted(hint: Any) -> str:
    return _said(inspect.type_info(hint))


def _said(kind: inspect.Type) -> str:
    match kind:
        case inspect.Metadata():
            return _said(kind.type)
        case inspect.UnionType():
            return " or ".join(_said(one) for one in kind.types if not isinstance(one, inspect.NoneType))
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType() | inspect.FloatType():
            bounds = {"from": kind.ge, "above": kind.gt, "to": kind.le, "below": kind.lt}
            number = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
            return number + "".join(f" {word} {n:g}" for word, n in bounds.items() if n is not None)
        case inspect.StrType():
            return "a text"
        case inspect.LiteralType():
            return f"one of {', '.join(map(str, kind.values))}"
    return f"of a type that a parameter can have ({type(kind).__name__}): bool, int, float or str"
