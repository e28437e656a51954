"""Training runs: settings, optimizers, checkpoints, costs and reports. The model does not depend on it."""
