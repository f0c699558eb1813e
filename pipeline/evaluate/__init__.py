"""How good a trained network is: its measures on a split, its pictures, its speed, and the job that logs them."""
