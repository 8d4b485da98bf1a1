"""A corpus of any size as shards of packed windows: made once by any number of machines, read by number.

`plan` says what shard i holds, `shards` makes it, `workers` makes many; training reads `reading` and `mixture`.
"""
