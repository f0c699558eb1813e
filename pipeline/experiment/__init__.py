"""Kept for one release: where `deliver` used to be called from (CHANGELOG.md)."""
