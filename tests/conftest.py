"""Settings of all tests: time is measured in benchmarks, never in a test."""

import pytest
import structlog
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from barcast.backtest import cli
from tests.postgres import (  # noqa: F401 - fixtures
    cluster,
    each_journal,
)

settings.register_profile("barcast", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("barcast")


class Files(LoadScopeScheduling):
    """One worker has a file, whose tests share what they made; tests with a broker go out one by one."""

    def _split_scope(self, nodeid):
        file = nodeid.split("::")[0]
        return nodeid if file.startswith("tests/integration/") else file


def pytest_xdist_make_scheduler(config, log):
    """Keep the order of the tests."""
    config.option.loadscopereorder = False
    return Files(config, log)


def pytest_collection_modifyitems(items):
    """What takes longest begins first, so that nobody waits for it in the end; it has ten minutes."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(600))
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command; give its exit status, output and error output."""
    # It would make this process, and all tests after, the last to be served and the first to be killed.
    monkeypatch.setattr("barcast.daemon.trainer.give_way", lambda *_: None)

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["barcast", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as leaving:
            status = leaving.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return command


@pytest.fixture(autouse=True)
def _log_is_nobodys():
    """A command run in this process writes its log to a stream that is closed with its test."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def few_looks():
    """Trainings look at few forecasts: for tests of which weights they like does not matter.

    The value is the program that does so in another process.
    """
    from barcast.models import training

    few = {"LOOK_ORIGINS": 100, "LOOK_PATHS": 20, "LOOK_SAMPLES": 32}
    with pytest.MonkeyPatch.context() as patch:
        for name, count in few.items():
            patch.setattr(training, name, count)
        yield f"from barcast.models import training\nvars(training).update({few})\n"
