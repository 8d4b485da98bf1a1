"""One `get_config()` a run: published sizes, tiny twins for a laptop, recipes. Imports ml_collections only."""
