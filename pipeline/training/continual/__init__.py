"""Continual learning: what is kept of past tasks, and what is measured at each task's end (docs/continual.md)."""
