"""What the training scripts share: configuration, objective, complete checkpoints, construction of models and data."""
