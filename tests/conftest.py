"""Fixtures for all tests: tracking stores and servers, PostgreSQL and Slurm."""

pytest_plugins = ["tests.servers", "tests.postgres", "tests.slurm"]
