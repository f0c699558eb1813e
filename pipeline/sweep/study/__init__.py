"""The only user of Optuna: storage, claims, retries, samplers, pictures and tables of a study."""
