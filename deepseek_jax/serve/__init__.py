"""Running a trained model: sampling, generation over the latent cache, text as it comes."""
