"""A real broker and a trained intraday model for the tests that run the daemon as a process."""

import fcntl
from dataclasses import replace

import pytest

from tests.garch import simulate
from tests.integration.broker import Mosquitto, executable

MINUTE = 60 * 10**9
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


def pytest_collection_modifyitems(items):
    """Everything in this folder needs mosquitto."""
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.broker)


@pytest.fixture
def brokers(tmp_path):
    """Starts mosquittos. Its absence is a failure: a skipped promise is not a kept one."""
    if executable() is None:
        pytest.fail(
            "mosquitto is missing: run `make test`, which installs it, or `apt-get install mosquitto`"
        )
    running = []

    def start(**how):
        running.append(Mosquitto(tmp_path / f"broker{len(running)}", **how))
        running[-1].start()
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def broker(brokers):
    """A running mosquitto, configured as it is shipped."""
    return brokers()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, worker_id):
    """Two one-minute models: one that was trained, and a spoiled copy of it with bands far too wide.

    The first of several workers to need them makes them for all.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "models"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "spoiled").exists():
            make_checkpoints(folder)
    return folder


def make_checkpoints(folder):
    """Train the good model and spoil it."""
    import torch

    from barcast.models.checkpoint import save
    from barcast.models.training import train

    torch.set_num_threads(1)
    histories = [simulate(f"SYM{i}", 1450, seed=3, step=MINUTE).window for i in range(2)]
    good = train(histories, timeframe="1m", horizons=(1, 4, 16), levels=LEVELS, steps=40, hold_out=0.1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        good.net.denoiser.leave.weight.normal_(0, 0.02, generator=generator)
    good = replace(good, record=replace(good.record, denoiser_step=40))
    save(good, folder / "good")
    with torch.no_grad():
        good.net.map.static.mul_(3.0)
    save(good, folder / "spoiled")
