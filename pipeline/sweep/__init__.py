"""A study of many runs: its request, its driver, its workers."""
