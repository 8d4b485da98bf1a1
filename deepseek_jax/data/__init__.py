"""Text in, batches of token ids out; a batch is a pure function of (seed, sample number).

Nothing here depends on a model, and the only state is the number of the next sample.
"""
