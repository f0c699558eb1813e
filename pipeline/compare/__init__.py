"""Finished runs beside each other: which may be pooled, what differs, by how much."""
