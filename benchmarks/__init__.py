"""What is fast, measured; results with the machine and the versions in results/."""
