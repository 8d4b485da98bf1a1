"""Several prepared corpora in one sequence of samples: sample i is of corpus c(i), by weight, and needs no state.

Of each PERIOD samples in a row, corpus c has its share: the nearest whole number, spread evenly. So sample i of the
run is sample  j = (i div PERIOD) · share_c + rank(i mod PERIOD)  of its corpus, found without those before it.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from deepseek_jax.data.prepared.reading import PreparedSide, check_agrees, read_manifest
from deepseek_jax.data.prepared.source import Source
from deepseek_jax.data.tokenizer import Tokenizer

PERIOD = 10_000  # a weight is exact to a ten-thousandth


class Shares:
    """Which corpus each sample of a mixture is from.

    Attributes:
        counts: int64, samples of each corpus in a period.
    """

    def __init__(self, weights: list[float]):
        shares = np.array(weights) / sum(weights) * PERIOD
        self.counts = np.maximum(np.floor(shares), 1).astype(np.int64)
        while (left := PERIOD - int(self.counts.sum())) != 0:
            short_of = (shares - self.counts) * np.sign(left)
            may = (self.counts > 1) | (left > 0)  # each keeps a sample at least
            self.counts[np.argmax(np.where(may, short_of, -np.inf))] += np.sign(left)
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        order = np.argsort(places, kind="stable")
        self._corpus = np.repeat(np.arange(len(weights), dtype=np.int16), self.counts)[order]
        self._rank = np.concatenate([np.arange(count, dtype=np.int32) for count in self.counts])[order]

    def place(self, i: int) -> tuple[int, int]:
        """Returns the corpus of sample `i`, and its number there."""
        period, rest = divmod(i, PERIOD)
        corpus = int(self._corpus[rest])
        return corpus, period * int(self.counts[corpus]) + int(self._rank[rest])

    def number_of(self, corpus: int, number: int) -> int:
        """Returns which sample of the mixture is sample `number` of a corpus: the inverse of `place`."""
        period, rank = divmod(number, int(self.counts[corpus]))
        return period * PERIOD + int(np.flatnonzero(self._corpus == corpus)[rank])


class Mixture:
    """One side of a mixture; the attributes are those of `Packing`, of all corpora together."""

    has_whole_documents: ClassVar[bool] = True

    def __init__(self, sides: list[PreparedSide], weights: list[float]):
        self.sides, self._weights = sides, weights
        self.shares = Shares(weights)
        self.seed, self.shuffle, self.seq_len = sides[0].seed, sides[0].shuffle, sides[0].seq_len
        self.n_documents = sum(side.n_documents for side in sides)
        rates = self.shares.counts / PERIOD
        # Evaluation reads no held-out window twice: it ends where the first corpus would begin anew.
        most = min(self.shares.number_of(corpus, side.n_samples) for corpus, side in enumerate(sides))
        self.n_samples = sum(side.n_samples for side in sides) if self.shuffle else most
        self.n_tokens = self.n_samples * self.seq_len
        self.bytes_per_token = float(sum(rate * side.bytes_per_token for side, rate in zip(sides, rates, strict=True)))

    @property
    def shortage(self) -> str:
        """What to do if there is no sample."""
        return "one of the corpora has no window. Leave it out, or prepare more of its text."

    def summary(self) -> str:
        """Returns a description of what the windows hold."""
        rates = self.shares.counts / PERIOD
        parts = (f"{rate:.2%} of {side.n_samples:,} windows" for side, rate in zip(self.sides, rates, strict=True))
        return f"a mixture of {', '.join(parts)}"

    def fingerprint(self) -> str:
        """Returns a hash of the corpora and of their shares."""
        content = "".join(f"{side.fingerprint()} {n}\n" for side, n in zip(self.sides, self.shares.counts, strict=True))
        return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


def open_sides(
    found: Sequence[Source], tokenizer: Tokenizer, *, seq_len: int, mask_documents: bool, seed: int
) -> tuple[PreparedSide | Mixture, PreparedSide | Mixture | None]:
    """Returns the training and the held-out side of prepared text; the second is None if none is held out.

    Raises UserError if a folder is incomplete, or was prepared for another tokenizer or length.
    """
    training, held_out = [], []
    for number, (folder, weight) in enumerate(found):
        manifest = read_manifest(folder)
        check_agrees(folder, manifest["settings"], tokenizer, seq_len)
        # each corpus has an order of its own
        options: dict[str, Any] = {"mask_documents": mask_documents, "seed": (seed + number) % 2**64}
        training.append((PreparedSide(folder, manifest, "train", **options), weight))
        if manifest["settings"]["holdout_rate"]:
            held_out.append((PreparedSide(folder, manifest, "holdout", **options), weight))
    return _mixed(training), _mixed(held_out) if held_out else None


def _mixed(sides: list[tuple[PreparedSide, float]]) -> PreparedSide | Mixture:
    return sides[0][0] if len(sides) == 1 else Mixture([side for side, _ in sides], [weight for _, weight in sides])


def settled_by(found: Sequence[Source]) -> dict:
    """Returns the keys of `config.data` that were decided when the text was prepared; rates of a mixture are means."""
    manifests = [read_manifest(one.folder)["settings"] for one in found]
    weights = np.array([one.weight for one in found]) / sum(one.weight for one in found)
    rates = {key: round(float(weights @ [each[key] for each in manifests]), 12) for key in ("fim_rate", "holdout_rate")}
    return rates | {key: any(each[key] for each in manifests) for key in ("add_bos", "special_tokens")}
