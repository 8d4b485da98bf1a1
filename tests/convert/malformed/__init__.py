"""Malformed published directories: valid ones, ways to break them, and what a reader must do with them."""
