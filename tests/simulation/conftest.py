"""What the simulation needs of the process."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulation.soak import MEMORY
from tests.simulation.world import prepared


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, in a process in which schedules can be played."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, prepared():
        yield Path(folder)
