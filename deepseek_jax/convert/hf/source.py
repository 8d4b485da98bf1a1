"""The weights in a directory as pieces of our weights, each tensor read once."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deepseek_jax.convert import fp8_weights, hf_config, names, safetensors
from deepseek_jax.convert.hf.published import CONFIG, EMBEDDING, Published, Warn, warn_on_stderr
from deepseek_jax.convert.safetensors import Tensors
from deepseek_jax.errors import UserError
from deepseek_jax.precision.fp8_weight import Layout, divided
from deepseek_jax.precision.quantize import E4M3

HEAD = "lm_head.weight"
WEIGHT_DTYPES = ("F32", "F16", "BF16")  # in addition to floats of 8 and 4 bits with scales
INTEGER_DTYPES = ("I64", "I32")
SHOWN, LONGEST = 3, 150  # names in a message, and characters per name


def _left_out(tensors: Tensors, numbers: dict[str, Any]) -> tuple[str, ...]:
    """Returns prefixes of the layers of multi-token prediction that the files have and config.json does not name."""
    if "mtp_depth" not in numbers:
        return ()
    n = numbers["n_layers"] + numbers["mtp_depth"]
    layers = map("model.layers.{}.".format, itertools.count(n))
    depths = map("mtp.{}.".format, itertools.count(numbers["mtp_depth"]))
    return (
        *itertools.takewhile(lambda at: f"{at}eh_proj.weight" in tensors, layers),
        *itertools.takewhile(lambda at: f"{at}e_proj.weight" in tensors, depths),
    )


@dataclass(frozen=True)
class Piece:
    """A part of one of our weights."""

    path: names.Path  # of the weight in the tree, such as ("params", "moe_blocks", "experts", "gate_XDF")
    index: names.Index  # () for the whole weight, else the layer, or layer and expert
    array: np.ndarray  # values, perhaps a transposed view
    n_bytes_read: int  # bytes of the files up to and including this piece, whether read or skipped


class Source:
    """The weights in a directory as pieces of our weights.

    Raises UserError if tensors are missing, unexpected, or of a wrong shape or dtype; the first few are named.

    Args:
        published: result of `open_published`.
        shapes: {"params": tree, "router_bias": tree} of the model with its numbers, as from `layers.base.split`.
        in_fp8: whether matrices of E4M3 codes, and those in FP4, stay codes. Then `abstract` has, in place of such a
            weight, a tree with its "codes" and "scale" (see `convert.fp8_weights`), and pieces are of these.
        warn: called with a message about copies that differ from their original, about multi-token prediction that the
            files contain and the config does not name (it is left out), and about settings that others read
            differently.

    Attributes:
        abstract: a tree like `shapes` of `jax.ShapeDtypeStruct`, with the dtypes of the pieces.
        coded: the weights that stay in FP8, and how they lie in the published matrices.
        n_bytes: bytes of the tensors to read.
    """

    def __init__(self, published: Published, shapes: dict, warn: Warn = warn_on_stderr, *, in_fp8: bool = False):
        if published.tensors is None:
            raise ValueError("expected the result of open_published: this directory was opened without its weights")
        self._files, self._warn = published.tensors, warn
        self._copies = names.copies(shapes)
        is_tied = published.facts.is_tied and HEAD not in self._files  # a stored head is used as it is
        left_out = _left_out(self._files, published.numbers)
        self._tensors = self._checked(shapes, is_tied, left_out)
        dtypes: dict[names.Path, np.dtype] = {}
        for tensor, stored in self._tensors:
            for path, _ in tensor.places:
                dtype = self._dtype(stored)
                dtypes[path] = np.dtype(jnp.promote_types(dtypes.get(path, dtype), dtype))
        self._dtypes = dtypes
        self.coded = self._stay_codes() if in_fp8 else {}
        self.n_bytes = sum(self._files.info(stored).nbytes for stored in {stored for _, stored in self._tensors})
        self.abstract = map_leaves(shapes, self._abstract)
        where = f"{self._files.directory}: {CONFIG}"
        for at in left_out:
            warn(f"{where}: num_nextn_predict_layers={published.numbers['mtp_depth']}, so {at}* is left out.")
        for remark in hf_config.remarks(published.config):
            warn(f"{where}: {remark}")

    def pieces(self, skip: Callable[[names.Path, names.Index], bool] | None = None) -> Iterator[Piece]:
        """Yields all pieces in a fixed order; a tensor is not read if `skip(path, index)` holds for all its pieces."""
        n_bytes_read, compared = 0, set()
        for stored, tensors in self._by_stored().items():
            n_bytes_read += self._files.info(stored).nbytes
            if tensors[0].places[0][0] in self.coded:
                yield from self._coded_pieces(stored, tensors[0], n_bytes_read, skip)
                continue
            needed = [place for tensor in tensors for place in tensor.places if not (skip and skip(*place))]
            if not needed:
                continue
            array = self._files.read_dequantized(stored)
            compared |= self._compare_copies(stored, array)
            for tensor in tensors:
                for (path, index), part in zip(tensor.places, tensor.to_ours(array), strict=True):
                    if (path, index) in needed:
                        yield Piece(path, index, part.astype(self._dtypes[path], copy=False), n_bytes_read)
                    del part
            del array
        for copy in self._copies.keys() - compared:
            if copy in self._files and not self._files.is_same(copy, self._original(copy)):
                self._warn_of(copy)

    def _stay_codes(self) -> dict[names.Path, Layout]:
        """Returns the weights of which all tensors are matrices of E4M3 codes, or all of FP4, with their layouts."""
        found: dict[names.Path, Layout] = {}
        kinds: dict[names.Path, set[str]] = {}
        for tensor, stored in self._tensors:
            kind = "F4" if self._files.is_fp4(stored) else self._files.info(stored).dtype
            for path, _ in tensor.places:
                kinds.setdefault(path, set()).add(kind)
            if kind in ("F8_E4M3", "F4") and len(tensor.shape) == 2:
                found |= zip((path for path, _ in tensor.places), fp8_weights.layouts(tensor), strict=True)
        self._in_fp4 = {path for path in found if kinds[path] == {"F4"}}
        return {path: layout for path, layout in found.items() if kinds[path] in ({"F4"}, {"F8_E4M3"})}

    def _abstract(self, path: names.Path, x: jax.ShapeDtypeStruct) -> Any:
        if path not in self.coded:
            return jax.ShapeDtypeStruct(x.shape, self._dtypes[path])
        layout = self.coded[path]
        leading = x.shape[: len(x.shape) - len(layout.order)]
        if path in self._in_fp4:
            rows, columns = layout.matrix
            return {
                fp8_weights.CODES: jax.ShapeDtypeStruct((*leading, rows, columns // 2), np.uint8),
                fp8_weights.SCALE: jax.ShapeDtypeStruct((*leading, rows, columns // 32), np.uint8),
            }
        return {
            fp8_weights.CODES: jax.ShapeDtypeStruct((*leading, *layout.matrix), E4M3),
            fp8_weights.SCALE: jax.ShapeDtypeStruct((*leading, *layout.blocks), jnp.float32),
        }

    def _coded_pieces(
        self,
        stored: str,
        tensor: names.Tensor,
        n_bytes_read: int,
        skip: Callable[[names.Path, names.Index], bool] | None,
    ) -> Iterator[Piece]:
        """Yields codes and scales of the weights in a tensor that stay in FP8."""
        needed = [not (skip and skip((*path, fp8_weights.CODES), index)) for path, index in tensor.places]
        if not any(needed):
            return
        codes, scales = self._files.read_codes(stored)
        if tensor.places[0][0] in self._in_fp4:
            scales = scales.view(np.uint8)
        parts = divided(codes, scales, tuple(self.coded[path] for path, _ in tensor.places))
        for (path, index), part, is_needed in zip(tensor.places, parts, needed, strict=True):
            if is_needed:
                yield Piece((*path, fp8_weights.CODES), index, part.codes, n_bytes_read)
                yield Piece((*path, fp8_weights.SCALE), index, part.scale, n_bytes_read)

    def _by_stored(self) -> dict[str, list[names.Tensor]]:
        """Returns the tensors in their order; those read from the same stored one (a tied head) together."""
        found: dict[str, list[names.Tensor]] = {}
        for tensor, stored in self._tensors:
            found.setdefault(stored, []).append(tensor)
        return found

    def _checked(self, shapes: dict, is_tied: bool, left_out: tuple[str, ...]) -> list[tuple[names.Tensor, str]]:
        """Returns (tensor, name in the files) of all. Raises UserError unless the files hold exactly these tensors.

        Further tensors may be empty, or start with one of `left_out`.
        """
        found, missing, wrong = [], [], []
        expected = {copy for copy in self._copies if copy in self._files}
        for tensor in names.tensors(shapes):
            stored = EMBEDDING if is_tied and tensor.name == HEAD else tensor.name
            if stored not in self._files and names.saved_by_others(stored) in self._files:
                stored = names.saved_by_others(stored)
            if stored not in self._files:
                missing.append(stored)
                if len(missing) > SHOWN:
                    break  # a hostile config may name a million layers
                continue
            found.append((tensor, stored))
            expected.add(stored)
            info = self._files.info(stored)
            if self._files.is_quantized(stored):
                expected.add(self._files.scale_name(stored))
            elif names.INTEGERS.search(stored):
                if info.dtype not in INTEGER_DTYPES:
                    wrong.append(f"{stored} is {info.dtype}, expected {', '.join(INTEGER_DTYPES)}")
            elif info.dtype not in WEIGHT_DTYPES:
                wrong.append(f"{stored} is {info.dtype}, expected {', '.join(WEIGHT_DTYPES)} or 8-bit floats")
            if (shape := self._files.shape(stored)) != tensor.shape:
                wrong.append(f"{stored} has shape {list(shape)}, expected {list(tensor.shape)}")
        others = (
            name
            for name in self._files.names()
            if not (name in expected or name.startswith(left_out) or names.IGNORED.search(name))
            and 0 not in self._files.info(name).shape
        )
        unexpected = [] if len(missing) > SHOWN else list(others)  # the expected names are incomplete then
        if missing or wrong or unexpected:
            raise UserError(f"{self._files.directory}: {_difference(missing, unexpected, wrong)}")
        return found

    def _dtype(self, stored: str) -> np.dtype:
        if self._files.is_quantized(stored):
            return np.dtype(ml_dtypes.bfloat16)
        if names.INTEGERS.search(stored):
            return np.dtype(np.int32)
        return safetensors.DTYPES[self._files.info(stored).dtype]

    def _compare_copies(self, stored: str, array: np.ndarray) -> set[str]:
        """Compares the copies of a tensor with it while it is in memory, and returns them; 8-bit ones are not compared.

        Embedding and head are shared here, so a copy that differs causes a warning.
        """
        if self._files.is_quantized(stored):
            return set()
        copies = {copy for copy in self._copies if copy in self._files and self._original(copy) == stored}
        for copy in sorted(copies):
            if not self._files.holds(copy, array):
                self._warn_of(copy)
        return copies

    def _original(self, copy: str) -> str:
        """Returns the stored name of a copy's original."""
        return self._copies[copy] if self._copies[copy] in self._files else EMBEDDING  # a tied head

    def _warn_of(self, copy: str) -> None:
        self._warn(f"{self._files.directory}: {copy} differs from {self._original(copy)}, which is used instead.")


def _difference(missing: list[str], unexpected: list[str], wrong: list[str]) -> str:
    """Returns what is wrong with the tensors of a directory."""
    parts = []
    for what, found in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong)):
        if found:
            count = "" if found is missing else f"{len(found) - SHOWN} "  # the search for missing ones stopped early
            more = f" and {count}more" if len(found) > SHOWN else ""
            parts.append(f"{what}: {', '.join(name[:LONGEST] for name in found[:SHOWN])}{more}")
    return f"{'; '.join(parts)}. The files do not match the model in {CONFIG}."


def map_leaves(tree: dict, function: Callable[[names.Path, Any], Any], path: names.Path = ()) -> dict:
    """Returns a tree like `tree` with `function(path, leaf)` for each leaf."""
    return {
        key: map_leaves(sub, function, (*path, key)) if isinstance(sub, dict) else function((*path, key), sub)
        for key, sub in tree.items()
    }
