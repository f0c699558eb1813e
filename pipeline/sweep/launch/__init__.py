"""The one home of submitit: workers on this machine, or through Slurm."""
