"""Checkpoints: saved while training continues, verified when they are read, written in pieces by conversions."""
