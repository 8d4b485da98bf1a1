"""Malformed published directories: valid ones, ways to break them, what a reader must make of them."""
