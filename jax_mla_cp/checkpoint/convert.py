"""Converts a Hugging Face directory to an Orbax checkpoint, slice by slice. An interrupted conversion can be resumed.

A slice is one layer of a parameter, or one expert of that layer. TensorStore writes each of its chunks to a temporary file,
flushes it and renames it: a chunk file of full size is complete, and a conversion has no state besides its files. Memory holds
only the slices in flight.
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

from jax_mla_cp.checkpoint.check_tensors import check_tensors
from jax_mla_cp.checkpoint.directories import alone, check_directories, check_room, check_same
from jax_mla_cp.checkpoint.errors import CheckpointError
from jax_mla_cp.checkpoint.huggingface import has_mtp
from jax_mla_cp.checkpoint.orbax import (
    MANIFEST,
    WEIGHTS,
    ConvertedCheckpoint,
    StoredArray,
    command,
    is_converted,
    sha256_files,
)
from jax_mla_cp.checkpoint.parameter import Parameter, Region
from jax_mla_cp.checkpoint.progress_bar import progress_bar
from jax_mla_cp.checkpoint.tensor_source import INDEX, SafetensorsSource
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.files import lfs_problem
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import Weights
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.decoder import Decoder

_IN_FLIGHT_BYTES = 256 << 20
"""Size of the slices that are being written while the next one is read."""
_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_COPIED_NAMES = ("LICENSE", "NOTICE")


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of a conversion."""

    slices: int
    skipped: int
    """Slices that an earlier run had written."""
    nbytes: int
    """Size of the whole checkpoint."""


def convert(
    source: Path, out: Path, *, weights: Weights = "auto", overwrite: bool = False, progress: bool | None = None
) -> Summary:
    """Converts the Hugging Face directory `source` to `out`, or resumes an earlier conversion.

    Args:
      weights: for a quantized checkpoint: "fp8" keeps its matrices in FP8, "bf16" dequantizes them; "auto" is "fp8", or the
        choice of the run that is resumed.
      overwrite: first delete an earlier conversion, of any source, in `out`.
      progress: as `load_params`.

    Raises:
      ConfigError: a directory can't be used.
      CheckpointError: `source` can't be read, has Git LFS pointers, or is not the source of the conversion in `out`; the disk is full.
      KeyboardInterrupt: raised after the slices in flight have been written.
    """
    check_directories(source, out, overwrite=overwrite)
    for path in _other_files(source):
        if problem := lfs_problem(path):
            raise CheckpointError(str(path), problem)
    config = ModelConfig.from_dir(source)
    tensors = SafetensorsSource(source)
    if weights == "auto" and not overwrite and (out / MANIFEST).exists():
        weights = ConvertedCheckpoint.read(out).weights  # resumes with the same choice
    parameters, arrays = _plan(tensors, config, weights)
    checkpoint = ConvertedCheckpoint(out, False, str(source.resolve()), _fingerprint(source, tensors), arrays, {})
    with alone(out):
        if overwrite:
            _delete(out)
        elif (out / MANIFEST).exists():
            check_same(ConvertedCheckpoint.read(out), checkpoint, source, out)
        check_room(checkpoint)
        try:
            checkpoint.write()
            _make_tree(checkpoint)
            summary = _write(tensors, config, parameters, checkpoint, progress)
            _remove_temporary_files(checkpoint)
            copied = _copy_other_files(source, out)
            tree = [str(path.relative_to(out)) for path in _tree_files(out / WEIGHTS)]
            files = sha256_files(out, copied + tree)
            dataclasses.replace(checkpoint, complete=True, files=files).write()
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            raise _conversion_error(error, source, out) from error
    return summary


def _plan(
    tensors: SafetensorsSource, config: ModelConfig, weights: Weights
) -> tuple[list[Parameter], dict[str, StoredArray]]:
    """The parameters without a mesh, and their stored form, in the dtypes of the checkpoint's tensors; see `_stored_dtype`."""
    fp8 = weights == "fp8" or (weights == "auto" and config.quantization is not None)
    mtp = has_mtp(config, set(tensors.names()))
    declared = dict(
        nnx.to_flat_state(nnx.state(Decoder(Build(config, dtype=jnp.dtype(jnp.bfloat16), fp8=fp8, mtp=mtp))))
    )
    parameters = [Parameter.from_variable(path, variable, config, None) for path, variable in declared.items()]
    names = check_tensors(tensors, config, parameters)
    arrays = {}
    for i, (parameter, variable) in enumerate(zip(parameters, declared.values(), strict=True)):
        parameters[i] = parameter = dataclasses.replace(
            parameter, dtype=_stored_dtype(tensors, names, parameter, fp8=fp8)
        )
        stacked_dims = parameter.stacked_dims
        sharded_dims = [dim for dim, axis in enumerate(variable.get_metadata("spec")) if axis and dim >= stacked_dims]
        arrays[parameter.path] = StoredArray.chunked(
            parameter.path, parameter.shape, parameter.dtype, stacked_dims, next(iter(sharded_dims), None)
        )
    return parameters, arrays


def _stored_dtype(tensors: SafetensorsSource, names: Set[str], parameter: Parameter, *, fp8: bool) -> np.dtype[Any]:
    """The dtype that holds all of the parameter's tensors exactly.

    Of what is dequantized: the declared one, or float32 beside others that stay in FP8, which are loaded in any dtype exactly.
    """
    result = None
    for layer in parameter.layers or (None,):
        for region in parameter.regions(layer):
            if parameter.component:
                return parameter.dtype
            if len(parameter.operands(region, names)) > 1:
                return np.dtype(np.float32) if fp8 else parameter.dtype
            dtype = tensors.dtype(region.tensor_name(region.local_expert))
            result = dtype if result is None else jnp.promote_types(result, dtype)
    return np.dtype(result)


def _fingerprint(source: Path, tensors: SafetensorsSource) -> str:
    """Digest of config.json and of each weight file's name, size, modification time and header."""
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for file in tensors.files:
        stat = file.stat()
        with file.open("rb") as stream:
            header = stream.read(8 + int.from_bytes(stream.read(8), "little"))
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode() + header)
    return digest.hexdigest()


def _delete(out: Path) -> None:
    """Deletes a conversion; the checkpoint last, so that a directory that is half deleted is still recognized."""
    if is_converted(out):
        shutil.rmtree(out / WEIGHTS, ignore_errors=True)
    (out / MANIFEST).unlink(missing_ok=True)


def _make_tree(checkpoint: ConvertedCheckpoint) -> None:
    """Writes the Orbax checkpoint without its chunks. Every run does so again, which repairs damaged metadata."""
    weights = checkpoint.directory / WEIGHTS
    new = weights.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    tree: dict[str, Any] = {}
    for array in checkpoint.arrays.values():
        *parents, leaf = array.name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.zeros((1,) * len(array.shape), array.dtype)
    context = ocp.Context()
    context.array.saving.use_ocdbt = False  # a directory for each array, which TensorStore replaces
    with context, _without_warnings():
        ocp.save(new.absolute(), tree)
    for array in checkpoint.arrays.values():
        array.open(new, create=True)
    for path in _tree_files(new):
        destination = weights / path.relative_to(new)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, destination)
    shutil.rmtree(new)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppresses Orbax's warning that there is nothing to merge, which is as intended."""
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
    parameters: list[Parameter],
    checkpoint: ConvertedCheckpoint,
    progress: bool | None,
) -> Summary:
    """Writes the slices that are not there yet, in the order of the source's files."""
    layers = (None, *range(config.num_layers + 1))
    slices = [part for layer in layers for parameter in parameters for part in _slices(parameter, layer)]
    stores = {array.name: array.open(checkpoint.directory / WEIGHTS) for array in checkpoint.arrays.values()}
    writes: collections.deque[tuple[int, ts.WriteFutures]] = collections.deque()
    names, skipped = set(tensors.names()), 0
    with progress_bar("converting weights", checkpoint.nbytes, len(slices), "slice", show=progress) as advance:

        def finish_oldest() -> None:
            nbytes, write = writes.popleft()
            write.result()
            advance(nbytes)

        try:
            for part in slices:
                array = checkpoint.arrays[part.parameter.path]
                if _is_written(array, part.index, checkpoint.directory):
                    skipped += 1
                    advance(part.nbytes)
                    continue
                value = part.read(tensors, names)
                destination = stores[array.name][part.index]
                writes.append((value.nbytes, destination.write(value, can_reference_source_data_indefinitely=True)))
                while sum(nbytes for nbytes, _ in writes) > _IN_FLIGHT_BYTES:
                    finish_oldest()
        finally:
            while writes:
                finish_oldest()
    return Summary(len(slices), skipped, checkpoint.nbytes)


@dataclasses.dataclass(frozen=True)
class _Slice:
    """One layer of a parameter, or one expert of that layer: the unit of writing."""

    parameter: Parameter
    regions: tuple[Region, ...]

    @property
    def index(self) -> tuple[int, ...]:
        """Position along the stacked dimensions: layer, expert."""
        return self.regions[0].start[: self.parameter.stacked_dims]

    @property
    def nbytes(self) -> int:
        return math.prod(self.parameter.shape[self.parameter.stacked_dims :]) * self.parameter.dtype.itemsize

    def read(self, tensors: SafetensorsSource, names: Set[str]) -> NDArray[Any]:
        stacked_dims = self.parameter.stacked_dims
        values = [self._read_region(tensors, names, region) for region in self.regions]
        if len(values) == 1:
            return values[0]
        result = np.empty(self.parameter.shape[stacked_dims:], self.parameter.dtype)
        for region, value in zip(self.regions, values, strict=True):
            start = region.start[stacked_dims:]
            result[tuple(slice(i, i + size) for i, size in zip(start, value.shape, strict=True))] = value
        return result

    def _read_region(self, tensors: SafetensorsSource, names: Set[str], region: Region) -> NDArray[Any]:
        parameter, operands = self.parameter, self.parameter.operands(region, names)
        stored = [
            parameter.read_shard(tensors, region, operand, tuple((0, size) for size in operand.shape(region)))
            for operand in operands
        ]
        dequantizer = parameter.dequantizer(operands)
        plain = len(stored) == 1 and not dequantizer.packed
        value = stored[0] if plain else np.asarray(dequantizer(*map(jnp.asarray, stored)))
        return value.reshape(value.shape[parameter.stacked_dims :])


def _slices(parameter: Parameter, layer: int | None) -> list[_Slice]:
    by_expert = itertools.groupby(parameter.regions(layer), key=lambda region: region.local_expert)
    return [_Slice(parameter, tuple(regions)) for _, regions in by_expert]


def _is_written(array: StoredArray, index: tuple[int, ...], out: Path) -> bool:
    try:
        return all(os.stat(out / chunk).st_size == array.chunk_bytes for chunk in array.chunk_files(*index))
    except FileNotFoundError:
        return False


def _remove_temporary_files(checkpoint: ConvertedCheckpoint) -> None:
    """Removes the temporary files of a run that was killed."""
    for array in checkpoint.arrays.values():
        for path in (checkpoint.directory / array.directory).rglob("*.__lock"):
            path.unlink(missing_ok=True)


def _tree_files(weights: Path) -> list[Path]:
    """The files of an Orbax checkpoint that are not chunks."""
    paths = [*weights.glob("*"), *weights.glob("state/*"), *weights.glob("state/*/*")]
    return [path for path in paths if path.is_file()]


def _other_files(source: Path) -> list[Path]:
    """config.json, the tokenizer's files and the license: everything but the weights."""
    return [
        path
        for path in source.iterdir()
        if path.is_file()
        and path.name not in (INDEX, MANIFEST)
        and (path.suffix in _COPIED_SUFFIXES or path.name.startswith(_COPIED_NAMES))
    ]


def _copy_other_files(source: Path, out: Path) -> list[str]:
    """Copies everything but the weights. Returns the names."""
    names = [path.name for path in _other_files(source)]
    for name in names:
        shutil.copyfile(source / name, out / name)
    return names


def _conversion_error(error: Exception, source: Path, out: Path) -> CheckpointError:
    """An error of the system or of TensorStore, with the command that resumes the conversion."""
    full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
    reason = "the disk is full" if full else f"stopped by an error: {error}"
    return CheckpointError("out", f"{out}: {reason}. Nothing written is lost. Resume with: {command(source, out)}")
