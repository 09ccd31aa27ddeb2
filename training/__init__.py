"""Training: configuration, objective, complete checkpoints, construction of models and data."""
