"""A sweep: its search space, its driver, its workers."""
