"""Settings of all tests: time is measured in benchmarks, never in a test."""

import pytest
import structlog
from hypothesis import HealthCheck, settings

settings.register_profile("barcast", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("barcast")


@pytest.fixture(autouse=True)
def _log_is_nobodys():
    """A command run in this process writes its log to a stream that is closed with its test."""
    yield
    structlog.reset_defaults()
