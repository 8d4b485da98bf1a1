"""Random numbers as a pure function of where they are used, without the state of a generator.

Every choice in the data path (order of documents, which become FIM, where they are cut) is `noise(*keys, at=counter)`,
so any process can make any sample in any order, with any version of numpy.

splitmix64 (Steele, Lea and Flood 2014): x ← mix(x + golden ratio), where mix is two rounds of xor-shift and multiply.
"""

import numpy as np

ORDER, CHOOSE, CUT, WINDOWS, SHARE = range(5)  # the last key: purpose of the numbers

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def noise(*keys: int, at: np.ndarray) -> np.ndarray:
    """Returns one uint64 per counter in `at`, independent for each tuple of integer keys."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _mix(state + _GOLDEN + np.uint64(int(key) & _MASK))
    return _mix(state + _GOLDEN * (np.asarray(at).astype(np.uint64) + np.uint64(1)))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
