"""A bug, planted into the real code in other words."""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import pytest


def plant(where: Callable[..., Any], words: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a function the code that its source has with other words, wherever it was imported."""
    source = textwrap.dedent(inspect.getsource(where))
    for old, new in words.items():
        assert source.count(old) == 1, f"{where.__name__} does not say {old!r} once: plant the bug again"
        source = source.replace(old, new)
    planted: dict[str, Any] = {}
    exec(compile(source, "<planted>", "exec"), where.__globals__, planted)
    monkeypatch.setattr(where, "__code__", planted[where.__name__].__code__)
