"""Training: from batches of tokens to checkpoints and figures."""
