"""The ablation ladder, and comparisons of finished runs."""
