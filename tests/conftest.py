"""Fixtures for all tests: tracking stores and servers, PostgreSQL and Slurm."""

from hypothesis import settings

settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")  # the same examples in every run: CI is to fail for what was changed

pytest_plugins = ["tests.servers", "tests.postgres", "tests.slurm"]
