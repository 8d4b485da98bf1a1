"""Prepared text as training reads it: any window by its number, with an index of a few bytes per shard in memory."""

import hashlib
import json
from typing import ClassVar

import numpy as np

from deepseek_jax.data.blocks import DamagedFile
from deepseek_jax.data.packing import Sample, sample
from deepseek_jax.data.prepared.folder import read, read_all
from deepseek_jax.data.prepared.plan import SIDES, VERSION, file_name, marker_name
from deepseek_jax.data.prepared.records import from_record, read_record
from deepseek_jax.data.prepared.source import MANIFEST, PLAN
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.storage import Place, StorageError, refusal


def read_manifest(folder: Place) -> dict:
    """Returns the manifest of a folder. Raises UserError if it is missing, damaged, or of another version."""
    try:
        manifest = json.loads(read(folder, MANIFEST))
        settings = manifest["settings"]
        version, n_shards = settings["version"], settings["shards"]
        whole = all(len(manifest["sides"][side][key]) == n_shards for side in SIDES for key in ("windows", "bytes"))
    except FileNotFoundError as error:
        n_done, n_all = _progress(folder)
        raise UserError(
            f"{folder} is not completely prepared: {n_done:,} of {n_all:,} shards are there, and the manifest "
            f"{MANIFEST} is written after the last. Continue with the same deepseek-jax prepare command."
        ) from error
    except StorageError as error:
        raise refusal(error) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged. Remove it, and repeat the prepare command.") from error
    if version != VERSION or not whole:
        raise UserError(f"{folder / MANIFEST} is of version {version}, expected {VERSION}. Prepare the text again.")
    return manifest


def _progress(folder: Place) -> tuple[int, int]:
    """Returns how many shards are there, and how many there will be."""
    n_all = json.loads(read(folder, PLAN))["shards"]
    return len(read_all(folder, map(marker_name, range(n_all)))), n_all


def check_agrees(folder: Place, settings: dict, tokenizer: Tokenizer, seq_len: int) -> None:
    """Raises UserError unless text was prepared for this tokenizer and length of a sample."""
    if settings["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"{folder} was prepared with another tokenizer than data.tokenizer: of {settings['vocab_size']:,} ids, and "
            f"fingerprint {settings['tokenizer']}, not {tokenizer.vocab_size:,} ids and {tokenizer.fingerprint}. Name "
            "that one, or prepare the text again."
        )
    if settings["seq_len"] != seq_len:
        raise UserError(
            f"{folder} was prepared in windows of {settings['seq_len']:,} tokens, and data.seq_len = {seq_len}. Set "
            f"data.seq_len={settings['seq_len']}, or prepare the text again."
        )


class PreparedSide:
    """The windows of one side of a folder, training or held-out, by number; `packing.Packing` read from files.

    An epoch's windows are always the same; their order is not. The attributes are those of `Packing`.
    """

    has_whole_documents: ClassVar[bool] = True

    def __init__(self, folder: Place, manifest: dict, name: str, *, mask_documents: bool, seed: int):
        settings, counts = manifest["settings"], manifest["sides"][name]
        self._folder, self._name, self._mask = folder, name, mask_documents
        self._ends = np.cumsum(np.array(counts["windows"], np.int64))
        self._sizes = np.array(counts["bytes"], np.int64)
        self._dtype = np.min_scalar_type(settings["vocab_size"] - 1)
        self._content = hashlib.blake2b(json.dumps([settings, counts["hash"]]).encode(), digest_size=12).hexdigest()
        self.seq_len, self.n_documents = settings["seq_len"], counts["documents"]
        self.seed, self.shuffle = seed, name == SIDES[0]
        self.n_samples = int(self._ends[-1])
        self.n_tokens = self.n_samples * self.seq_len if self.shuffle else counts["tokens"]
        self.bytes_per_token = counts["text_bytes"] / max(counts["tokens"], 1)

    @property
    def shortage(self) -> str:
        """What to do if there is no sample."""
        return "no window. Set data.holdout_rate higher and prepare the text again."

    def summary(self) -> str:
        """Returns a description of what the windows hold."""
        return f"{self.n_documents:,} documents in {self.n_samples:,} prepared windows"

    def fingerprint(self) -> str:
        """Returns a hash of the settings and of all records."""
        return self._content

    def sample(self, epoch: int, n: int) -> Sample:
        """Returns window `n` as a row of a batch.

        Raises DamagedFile if it is not as it was written, another LocalError if a bucket refuses or the cache is full.
        """
        shard = int(np.searchsorted(self._ends, n, side="right"))
        number = int(n - (self._ends[shard - 1] if shard else 0))
        try:
            path = self._folder / file_name(self._name, shard)
            record = read_record(path, number, int(self._sizes[shard]), self._content)
            return sample(from_record(record, self.seq_len + 1, self._dtype), self._mask)
        except (DamagedFile, ValueError) as error:
            raise DamagedFile(
                f"{error} Remove {self._folder / marker_name(shard)}, repeat the prepare command, and start again."
            ) from error
