"""Fixtures for all tests: small disks, tracking stores and servers, PostgreSQL, Slurm and the team's server."""

from hypothesis import settings

settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")  # the same examples in every run: CI is to fail for what was changed

pytest_plugins = ["tests.disks", "tests.servers", "tests.postgres", "tests.slurm", "tests.team_server"]
