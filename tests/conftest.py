"""Settings of all tests: time is measured in benchmarks, never in a test."""

from hypothesis import HealthCheck, settings

settings.register_profile("barcast", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("barcast")
