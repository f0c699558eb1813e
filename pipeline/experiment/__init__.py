"""Kept for one release: the place from which `deliver` was called (CHANGELOG.md)."""
