"""Sources of named tensors: the protocol, and a directory of safetensors files."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.checkpoint.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

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
    """A directory with `model.safetensors`, or with shards and their index, `model.safetensors.index.json`.

    The files are memory-mapped: `read` returns a read-only view of the page cache and uses no anonymous memory.
    (The safetensors library's NumPy reader copies the whole tensor, even for a device that keeps a slice of it.)

    Raises:
      CheckpointError: the files or one of the shards are missing, a file is truncated, or its header does not match it.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        self.files: list[Path] = [directory / SINGLE]
        self._entries: dict[str, _Entry] = {}
        if (directory / INDEX).is_file():
            self._add_shards(directory)
        elif (directory / SINGLE).is_file():
            self._entries = _map_file(directory / SINGLE)
        else:
            raise CheckpointError(
                "model",
                f"{directory} has neither {INDEX} nor {SINGLE}. Give a Hugging Face model directory with "
                "safetensors weights (transformers' save_pretrained writes them).",
            )

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

    def _add_shards(self, directory: Path) -> None:
        """Maps the files that the index lists. Shapes, dtypes and offsets come from the files' own headers."""
        try:
            weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                str(directory / INDEX), f"expected a JSON object with a 'weight_map': {error!r}"
            ) from error
        missing = [shard for shard in shards if Path(shard).name != shard or not (directory / shard).is_file()]
        if missing:
            raise CheckpointError(
                "model",
                f"{directory}: {len(missing)} of {len(shards)} files listed in {INDEX} are missing: "
                f"{', '.join(missing[:20])}. Download them again.",
            )
        self.files = [directory / shard for shard in shards]
        files = {shard: _map_file(directory / shard) for shard in shards}
        for name, shard in weight_map.items():
            if name not in files[shard]:
                raise CheckpointError(
                    str(directory / shard), f"has no tensor {name!r}, although {INDEX} lists it there."
                )
            self._entries[name] = files[shard][name]


def _map_file(path: Path) -> dict[str, _Entry]:
    """Maps a safetensors file (header length as a little-endian u64, JSON header, data) and checks its sizes."""
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(
            str(path), f"truncated: {size} bytes are too few for a safetensors file. Download it again."
        )
    with path.open("rb") as stream:
        file = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    data = 8 + int.from_bytes(file[:8], "little")
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
