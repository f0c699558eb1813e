"""What a trained network is worth: its measures on a split, its pictures, its speed, and the job that logs them."""
