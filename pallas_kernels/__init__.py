"""Kernels: a folder an operation, with a readable reference that defines it. Imports jax only."""
