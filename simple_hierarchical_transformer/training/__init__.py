"""What train.py is made of: optimizers, checkpoints, costs, reports. The model knows nothing of it."""
