"""A run as a record on disk: its folder, journal, signals and end, and the life of a step's process."""
