"""From a Hugging Face directory to a converted checkpoint, piece by piece: interrupted anywhere, it goes on from there.

A piece is one layer of a parameter, or one expert of it. Its chunks are written to a temporary name, flushed and renamed
by TensorStore, so that a chunk's file that has its full size is done, and the state of a conversion is its files. Nothing
larger than the pieces in flight is in memory.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import logging
import math
import os
import shutil
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import nnx
from numpy.typing import NDArray
from orbax.checkpoint import v1 as ocp

from jax_mla_cp.checkpoint.directories import alone, check_directories, check_room, check_same
from jax_mla_cp.checkpoint.huggingface import mtp_marker
from jax_mla_cp.checkpoint.orbax import MANIFEST, WEIGHTS, Converted, StoredArray, command, is_converted, sha256_files
from jax_mla_cp.checkpoint.progress import loading_bar
from jax_mla_cp.checkpoint.source import INDEX, CheckpointError, SafetensorsSource
from jax_mla_cp.checkpoint.target import Place, Target
from jax_mla_cp.checkpoint.tensors import check_tensors
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import Weights
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.decoder import Decoder

_IN_FLIGHT = 256 << 20
"""Bytes that are being written while the next piece is made."""
_COPIED = (".json", ".jinja", ".model", ".txt")
_COPIED_NAMES = ("LICENSE", "NOTICE")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion has done."""

    pieces: int
    kept: int
    """Pieces that an earlier run had written."""
    nbytes: int
    """Of the whole checkpoint."""


def convert(
    source: Path, out: Path, *, weights: Weights = "auto", overwrite: bool = False, progress: bool | None = None
) -> Summary:
    """Converts the Hugging Face directory `source` to `out`, or goes on with what an earlier run began.

    Args:
      weights: of a quantized checkpoint: "fp8" keeps it so, "bf16" dequantizes it; "auto" keeps it.
      overwrite: delete what an earlier conversion, of whatever source, left in `out`.
      progress: as `load_params`.

    Raises:
      ConfigError: directories that can't be used.
      CheckpointError: a source that can't be read or isn't the one that the conversion was begun with, a disk that is full.
      KeyboardInterrupt: the pieces that were in flight are on the disk.
    """
    check_directories(source, out, overwrite=overwrite)
    config = ModelConfig.from_dir(source)
    tensors = SafetensorsSource(source)
    if weights == "auto" and not overwrite and (out / MANIFEST).exists():
        weights = Converted.read(out).weights  # goes on as it was begun
    targets, arrays = _plan(tensors, config, weights)
    begun = Converted(out, False, str(source.resolve()), _fingerprint(source, tensors), arrays, {})
    with alone(out):
        if overwrite:
            _delete(out)
        elif (out / MANIFEST).exists():
            check_same(Converted.read(out), begun, source, out)
        check_room(begun)
        try:
            begun.write()
            _make_tree(begun)
            done = _write(tensors, config, targets, begun, progress)
            _remove_leftovers(begun)
            copied = _copy_settings(source, out)
            tree = [str(path.relative_to(out)) for path in _tree_files(out / WEIGHTS)]
            files = sha256_files(out, copied + tree)
            dataclasses.replace(begun, complete=True, files=files).write()
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            raise _failed(error, source, out) from error
    return done


def _plan(
    tensors: SafetensorsSource, config: ModelConfig, weights: Weights
) -> tuple[list[Target], dict[str, StoredArray]]:
    """The parameters without a mesh, each in the dtype of the tensors that it is made of; dequantized, in bfloat16."""
    fp8 = weights == "fp8" or (weights == "auto" and config.quantization is not None)
    mtp = bool(config.num_mtp_layers) and mtp_marker(config) in set(tensors.names())
    declared = dict(
        nnx.to_flat_state(nnx.state(Decoder(Build(config, dtype=jnp.dtype(jnp.bfloat16), fp8=fp8, mtp=mtp))))
    )
    targets = [Target.of(path, param, config, None) for path, param in declared.items()]
    names = check_tensors(tensors, config, targets)
    arrays = {}
    for i, (target, param) in enumerate(zip(targets, declared.values(), strict=True)):
        targets[i] = target = dataclasses.replace(target, dtype=_stored_dtype(tensors, names, target))
        divided = [i for i, axis in enumerate(param.get_metadata("spec")) if axis and i >= target.leading]
        arrays[target.path] = StoredArray.of(
            target.path, target.shape, target.dtype, target.leading, divided[0] if divided else None
        )
    return targets, arrays


def _stored_dtype(tensors: SafetensorsSource, names: Set[str], target: Target) -> np.dtype[Any]:
    """The one that holds all the parameter's tensors exactly; mostly they have the same. What is decoded has its own."""
    result = None
    for layer in target.layers or (None,):
        for place in target.places(layer):
            if target.holds or len(target.operands(place, names)) > 1:
                return target.dtype
            dtype = tensors.dtype(place.tensor(place.slot))
            result = dtype if result is None else jnp.promote_types(result, dtype)
    return np.dtype(result)


def _fingerprint(source: Path, tensors: SafetensorsSource) -> str:
    """Of the config and of each weight file's name, size, time and header: enough to see another checkpoint."""
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for file in tensors.files:
        stat = file.stat()
        with file.open("rb") as stream:
            header = stream.read(8 + int.from_bytes(stream.read(8), "little"))
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode() + header)
    return digest.hexdigest()


def _delete(out: Path) -> None:
    """The manifest last: a directory that is half deleted is still known for what it is."""
    if is_converted(out):
        shutil.rmtree(out / WEIGHTS, ignore_errors=True)
    (out / MANIFEST).unlink(missing_ok=True)


def _make_tree(checkpoint: Converted) -> None:
    """The Orbax checkpoint without its chunks. Made again by every run, whatever became of it."""
    weights = checkpoint.directory / WEIGHTS
    new = weights.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    tree: dict[str, Any] = {}
    for array in checkpoint.arrays.values():
        *parents, last = array.name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.zeros((1,) * len(array.shape), array.dtype)
    context = ocp.Context()
    context.array.saving.use_ocdbt = False  # a directory for each array, in which TensorStore can replace it
    with context, _without_warnings():
        ocp.save(new.absolute(), tree)
    for array in checkpoint.arrays.values():
        array.open(new, create=True)
    for path in _tree_files(new):
        target = weights / path.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(new)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns that there is nothing to merge, as it should be."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _write(
    tensors: SafetensorsSource,
    config: ModelConfig,
    targets: list[Target],
    checkpoint: Converted,
    progress: bool | None,
) -> Summary:
    pieces = [piece for layer in (None, *range(config.num_layers + 1)) for t in targets for piece in _pieces(t, layer)]
    stores = {array.name: array.open(checkpoint.directory / WEIGHTS) for array in checkpoint.arrays.values()}
    writing: collections.deque[tuple[int, ts.WriteFutures]] = collections.deque()
    names, kept = set(tensors.names()), 0
    with loading_bar(checkpoint.nbytes, len(pieces), show=progress, title="converting") as advance:

        def wait() -> None:
            nbytes, write = writing.popleft()
            write.result()
            advance(nbytes)

        try:
            for piece in pieces:
                array = checkpoint.arrays[piece.target.path]
                if _is_written(array, piece.at, checkpoint.directory):
                    kept += 1
                    advance(piece.nbytes)
                    continue
                value = piece.read(tensors, names)
                place = stores[array.name][piece.at]
                writing.append((value.nbytes, place.write(value, can_reference_source_data_indefinitely=True)))
                while sum(nbytes for nbytes, _ in writing) > _IN_FLIGHT:
                    wait()
        finally:
            while writing:
                wait()
    return Summary(len(pieces), kept, checkpoint.nbytes)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One layer of a parameter, or one expert of it: what is written at a time."""

    target: Target
    places: tuple[Place, ...]

    @property
    def at(self) -> tuple[int, ...]:
        """Which layer, and which expert."""
        return self.places[0].start[: self.target.leading]

    @property
    def nbytes(self) -> int:
        return math.prod(self.target.shape[self.target.leading :]) * self.target.dtype.itemsize

    def read(self, tensors: SafetensorsSource, names: Set[str]) -> NDArray[Any]:
        leading = self.target.leading
        parts = [self._part(tensors, names, place) for place in self.places]
        if len(parts) == 1:
            return parts[0]
        whole = np.empty(self.target.shape[leading:], self.target.dtype)
        for place, part in zip(self.places, parts, strict=True):
            start = place.start[leading:]
            whole[tuple(slice(at, at + size) for at, size in zip(start, part.shape, strict=True))] = part
        return whole

    def _part(self, tensors: SafetensorsSource, names: Set[str], place: Place) -> NDArray[Any]:
        target, operands = self.target, self.target.operands(place, names)
        stored = [
            target.part(tensors, place, operand, tuple((0, size) for size in operand.shape(place)))
            for operand in operands
        ]
        decode = target.decode(operands)
        plain = len(stored) == 1 and decode.packed_dim is None
        value = stored[0] if plain else np.asarray(decode(*map(jnp.asarray, stored)))
        return value.reshape(value.shape[target.leading :])


def _pieces(target: Target, layer: int | None) -> list[_Piece]:
    by_slot = itertools.groupby(target.places(layer), key=lambda place: place.slot)
    return [_Piece(target, tuple(places)) for _, places in by_slot]


def _is_written(array: StoredArray, at: tuple[int, ...], out: Path) -> bool:
    try:
        return all(os.stat(out / chunk).st_size == array.chunk_bytes for chunk in array.chunks(*at))
    except FileNotFoundError:
        return False


def _remove_leftovers(checkpoint: Converted) -> None:
    """Temporary files of a run that was killed."""
    for array in checkpoint.arrays.values():
        for path in (checkpoint.directory / array.directory).rglob("*.__lock"):
            path.unlink(missing_ok=True)


def _tree_files(weights: Path) -> list[Path]:
    """What an Orbax checkpoint has beside its chunks."""
    others = [*weights.glob("*"), *weights.glob("state/*"), *weights.glob("state/*/*")]
    return [path for path in others if path.is_file()]


def _copy_settings(source: Path, out: Path) -> list[str]:
    """config.json, the tokenizer's files and the license: all that a model directory has beside its weights."""
    names = [
        path.name
        for path in source.iterdir()
        if path.is_file()
        and path.name not in (INDEX, MANIFEST)
        and (path.suffix in _COPIED or path.name.startswith(_COPIED_NAMES))
    ]
    for name in names:
        shutil.copyfile(source / name, out / name)
    return names


def _failed(error: Exception, source: Path, out: Path) -> CheckpointError:
    """For what the system or TensorStore says while a conversion runs."""
    full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
    what = "its disk is full" if full else f"stopped by an error: {error}"
    return CheckpointError(f"OUT {out}: {what}. What is written stays; go on with: {command(source, out)}")
