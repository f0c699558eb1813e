"""Finished runs side by side: which may be pooled, what differs, and by how much."""
