"""Teachers, student and distillation inside a tracked run."""
