"""A grid of runs: rungs of a ladder by seeds."""
