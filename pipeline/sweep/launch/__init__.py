"""The only user of submitit: workers on this machine, or through Slurm."""
