"""Fixtures for all tests: tracking stores and servers (tests/servers.py)."""

pytest_plugins = ["tests.servers"]
