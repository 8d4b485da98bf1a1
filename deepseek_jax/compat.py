"""Names that differ between the supported versions of jax (0.10.2 up to 0.12), in one place."""
