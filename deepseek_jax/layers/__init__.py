"""Parts of a network, each in its own file; no part knows which family it is built into."""
