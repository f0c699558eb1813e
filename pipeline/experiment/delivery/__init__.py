"""Brings journals to MLflow: a process of its own, the only one that imports it, and what talks to that process."""
