"""Running a trained model: sampling, generation over the latent cache, incremental text."""
