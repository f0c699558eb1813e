"""Workers on this machine or through Slurm: their request, their start, what each does first. Uses submitit alone."""
