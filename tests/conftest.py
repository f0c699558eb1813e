"""Fixtures for all tests: tracking stores and servers, PostgreSQL, Slurm and the team's server."""

pytest_plugins = ["tests.servers", "tests.postgres", "tests.slurm", "tests.team_server"]
