"""The legend of shape suffixes: an array's name ends in its dimensions, one capital letter each.

`q_BTHQ` has axes batch, token, head, query-key width. The einsum strings use the same letters, so a formula
can be checked by eye (and is, by `tests/test_suffixes.py`).
"""

LEGEND = {
    "B": "batch: sequences on this device",
    "T": "tokens of a sequence (query positions)",
    "S": "source positions (keys, cache slots)",
    "M": "tokens of all sequences in one row, M = B*T",
    "D": "model width (hidden size)",
    "V": "vocabulary",
    "H": "attention heads",
    "Q": "width of a query or key head, Q = N + P",
    "N": "part of a query-key head without position",
    "P": "rotary part of a query-key head",
    "U": "width of a value head",
    "R": "rank of the query latent; of V4, also the width of a group's part of the output's latent",
    "C": "rank of the key-value latent",
    "F": "hidden width of a feed-forward or of one expert",
    "E": "routed experts",
    "X": "experts that live on this device",
    "G": "groups of experts (nodes in V3's node-limited routing), or of heads",
    "K": "what is chosen for a token: experts, or positions that it attends to",
    "A": "assignments, one row per (token, chosen expert), A = M*K",
    "J": "members of a group: rows of a grouped matmul's block, query heads (H = Z*J), tokens of a compressed entry; "
    "streams after they were mixed",
    "I": "blocks of a grouped matmul, or of tokens that have one entry",
    "L": "layers stacked on one leading axis",
    "Z": "key-value heads of grouped-query attention",
    "W": "devices along a mesh axis",
    "Y": "widths side by side: two of the model, Y = 2D; the outputs of the heads of a group; what hyper-connections "
    "compute of a token, Y = (2+O)*O",
    "O": "streams of a residual connection (hyper-connections)",
}
