"""Sources of named tensors: the protocol, and a directory of safetensors files."""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.checkpoint.errors import CheckpointError
from jax_mla_cp.config.files import lfs_problem

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library (`MAX_HEADER_SIZE` in its tensor.rs)."""
_MAX_LISTED = 20

_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}


class TensorSource(Protocol):
    """Named tensors, with the names and layout of a Hugging Face checkpoint."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype[Any]: ...

    def read(self, name: str) -> NDArray[Any]:
        """Returns the tensor, where possible as a view of the source's memory."""
        ...


class _Entry(NamedTuple):
    file: mmap.mmap
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int  # bytes from the file's start


class SafetensorsSource:
    """A directory with `model.safetensors`, or with shards `model-00001-of-00002.safetensors`, ..

    The index of the shards, `model.safetensors.index.json`, says which are needed. Without one, all of 1 to N are.

    The files are memory-mapped: `read` returns a read-only view of the page cache and uses no anonymous memory.
    (The safetensors library's NumPy reader copies the whole tensor, even for a device that keeps a slice of it.)

    Raises:
      CheckpointError: files or shards are missing, which files are meant is not clear, a file is truncated or a Git LFS pointer,
        or its header does not match it.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        self._entries: dict[str, _Entry] = {}
        if (directory / INDEX).is_file():
            weight_map = _read_index(directory)
            self.files = [directory / shard for shard in sorted(set(weight_map.values()))]
            self._add_indexed(weight_map)
        else:
            self.files = _files_without_index(directory)
            self._add_all()

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._entries[name].dtype

    def read(self, name: str) -> NDArray[Any]:
        entry = self._entries[name]
        flat = np.frombuffer(entry.file, entry.dtype, count=math.prod(entry.shape), offset=entry.offset)
        return flat.reshape(entry.shape)

    def _add_indexed(self, weight_map: Mapping[str, str]) -> None:
        """Maps the files that the index lists. Shapes, dtypes and offsets come from the files' own headers."""
        files = {path.name: _map_file(path) for path in self.files}
        for name, shard in weight_map.items():
            if name not in files[shard]:
                path = next(path for path in self.files if path.name == shard)
                raise CheckpointError(str(path), f"has no tensor {name!r}, although {INDEX} lists it there.")
            self._entries[name] = files[shard][name]

    def _add_all(self) -> None:
        """Maps the files and takes all of their tensors."""
        owner: dict[str, Path] = {}
        for path in self.files:
            for name, entry in _map_file(path).items():
                if name in owner:
                    raise CheckpointError(
                        str(path),
                        f"has the tensor {name!r}, as {owner[name].name} has, and there is no {INDEX} that says which counts. "
                        "Take all shards from one checkpoint, with their index.",
                    )
                owner[name], self._entries[name] = path, entry


def _read_index(directory: Path) -> dict[str, str]:
    """The file of each tensor.

    Raises:
      CheckpointError: the index can't be read, lists files that are missing, or leaves out a `model.safetensors` that is there.
    """
    path = directory / INDEX
    if problem := lfs_problem(path):
        raise CheckpointError(str(path), problem)
    try:
        weight_map: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if Path(shard).name != shard or not (directory / shard).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(path), f"expected a JSON object with a 'weight_map': {error!r}") from error
    if missing:
        raise CheckpointError(
            "model",
            f"{directory}: {len(missing)} of {len(shards)} files listed in {INDEX} are missing: "
            f"{', '.join(missing[:_MAX_LISTED])}. Download them again.",
        )
    if SINGLE not in shards and (directory / SINGLE).is_file():
        raise CheckpointError(
            "model",
            f"{directory} has {SINGLE} and {INDEX}, which does not list it: two checkpoints, and which is meant can't be told. "
            "Remove one.",
        )
    return weight_map


def _files_without_index(directory: Path) -> list[Path]:
    """The weight files of a directory that has no index.

    Raises:
      CheckpointError: there are none, shards are missing, or there are several sets of them.
    """
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    shards = {name: (int(match[1]), int(match[2])) for name in found if (match := _SHARD.fullmatch(name))}
    single = [name for name in found if name == SINGLE]
    if single and not shards:
        return [directory / SINGLE]
    if not shards:
        raise CheckpointError("model", _no_weights(directory, found))
    count = max(of for _, of in shards.values())
    numbers = {number for number, of in shards.values() if of == count and 1 <= number <= count}
    if single or len(numbers) < len(shards):
        raise CheckpointError(
            "model",
            f"{directory} has no {INDEX}, and its files don't tell which belong together: {_listed([*shards, *single])}. "
            "Download the index, or remove the files of other checkpoints.",
        )
    if len(numbers) < count:
        first = next(number for number in range(1, count + 1) if number not in numbers)
        raise CheckpointError(
            "model",
            f"{directory} has {len(numbers)} of {count} shards, and no {INDEX}; the first that is missing is number {first}. "
            "Download the checkpoint again.",
        )
    return [directory / name for name in shards]


def _no_weights(directory: Path, found: list[str]) -> str:
    """The problem of a directory without weights that can be read, with the weights that can't."""
    others = found + sorted(
        path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".gguf")
    )
    there = f" There are {_listed(others)}, which are not read." if others else ""
    return (
        f"{directory} has neither {INDEX} nor {SINGLE}, nor shards named model-00001-of-N.safetensors.{there} Give a "
        "Hugging Face model directory with safetensors weights (transformers' save_pretrained writes them)."
    )


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + rest


def _map_file(path: Path) -> dict[str, _Entry]:
    """Maps a safetensors file (header length as a little-endian u64, JSON header, data) and checks its sizes."""
    if problem := lfs_problem(path):
        raise CheckpointError(str(path), problem)
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(
            str(path), f"truncated: {size} bytes are too few for a safetensors file. Download it again."
        )
    with path.open("rb") as stream:
        file = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    data = 8 + int.from_bytes(file[:8], "little")
    if data - 8 > _MAX_HEADER_BYTES:
        raise CheckpointError(
            str(path),
            f"not a safetensors file: it begins with {file[:16]!r}, not with a header's length. Download it again.",
        )
    if data > size:
        raise CheckpointError(
            str(path), f"truncated: the header ends at byte {data}, the file at byte {size}. Download it again."
        )
    try:
        header: dict[str, Any] = json.loads(file[8:data])
        header.pop("__metadata__", None)
        entries = {name: _entry(file, data, name, spec) for name, spec in header.items()}
        end = max((data + spec["data_offsets"][1] for spec in header.values()), default=data)
    except CheckpointError as error:
        raise CheckpointError(str(path), str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(str(path), f"not a safetensors header: {error!r}") from error
    if end > size:
        raise CheckpointError(
            str(path), f"truncated: the tensors end at byte {end}, the file at byte {size}. Download it again."
        )
    return entries


def _entry(file: mmap.mmap, data: int, name: str, spec: Mapping[str, Any]) -> _Entry:
    if spec["dtype"] not in _DTYPES:
        raise CheckpointError(name, f"dtype {spec['dtype']} is not supported. Supported: {', '.join(_DTYPES)}.")
    dtype, shape = _DTYPES[spec["dtype"]], tuple(spec["shape"])
    begin, end = spec["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(name, f"{end - begin} bytes of data for shape {list(shape)} of {spec['dtype']}.")
    return _Entry(file, dtype, shape, data + begin)
