"""What samples of answers say about a model: pass@k, the vote of a majority, and how sure they are; plain numbers.

Of n answers to a problem, c of which are right:

    pass@1    c / n
    pass@k    1 - C(n - c, k) / C(n, k)      that one of k drawn answers is right, unbiased; Chen et al. 2021, eq. 1
    maj@n     1 if most of the n answers are equal and right (R1 section 3.1: cons@64); not of programs

All are means over problems. Their intervals are Wilson's, with problems as the independent trials. Values between 0 and
1 vary less than ones that are 0 or 1 and have the same mean, so such an interval holds for them too, if anything too
wide.
"""

import collections
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

Z = 1.959964  # standard deviations on both sides that hold 95 % of a normal distribution


class Estimate(NamedTuple):
    """A mean over problems with its 95 % interval."""

    value: float
    low: float
    high: float
    problems: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the estimate of pass@k from n >= k answers, c of which are right."""
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))  # Chen et al. 2021, eq. 1


def majority(votes: Sequence[Hashable | None], right: Hashable) -> float:
    """Returns whether most votes are `right`; where that is one of several with as many, its share among them.

    A vote of None, such as that of an answer that was cut off, does not count.
    """
    counts = collections.Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [vote for vote, count in counts.items() if count == most]
    return float(right in winners) / len(winners)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share over n trials (Wilson 1927)."""
    spread = Z * math.sqrt(mean * (1 - mean) / n + (Z / (2 * n)) ** 2)
    middle, scale = mean + Z * Z / (2 * n), 1 + Z * Z / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of at least one value between 0 and 1, one per problem."""
    mean = sum(values) / len(values)
    return Estimate(mean, *wilson(mean, len(values)), len(values))
