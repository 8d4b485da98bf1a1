"""What a run costs, from shapes and stated formulas only: counts, operations, memory, traffic, time; no arrays."""
