"""The format of a converted checkpoint: an Orbax checkpoint of the model's parameters, and a manifest.

    DIR/config.json, tokenizer.json, ..   copied from the Hugging Face directory
    DIR/jax_mla_cp.json                   the manifest
    DIR/weights/                          the Orbax checkpoint: `Decoder`'s parameters without a mesh, unpadded
    DIR/weights/state/NAME/c/i/j/..       one chunk of one parameter, a file each

In layout 2 matrices lie as in the Hugging Face tensors, [outputs, inputs]; in layout 1 inputs came first.

Nothing in it depends on a mesh. Chunk boundaries are where meshes divide: a layer, an expert, a few heads. Each chunk ends
with its CRC-32C, which TensorStore verifies at every read, by this package or by Orbax; the manifest has the SHA-256 of
every other file. Orbax's own writer has no checksums (0.12.8: none in its codecs, and chunks along one chosen axis go down to
single rows only). So Orbax saves the tree with placeholder arrays of one element, and TensorStore, its storage layer,
replaces them with the real arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorstore as ts

from jax_mla_cp.checkpoint.errors import CheckpointError
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.quantization import Weights

LAYOUT = 2
"""Version of the format; incremented when an older reader would misread a newer checkpoint."""
MANIFEST = "jax_mla_cp.json"
WEIGHTS = "weights"
_STATE = f"{WEIGHTS}/state"
_CRC_BYTES = 4
_MAX_LISTED = 20  # files listed in an error
_MAX_SPLITS = 64  # of the sharded dimension, as long as chunks ..
_MIN_CHUNK_BYTES = 1 << 20  # .. are not smaller than this


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """A stored parameter: [layers if stacked, experts if routed, *inner], not padded for any mesh."""

    name: str
    """`Decoder`'s attributes, joined with dots."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]

    @classmethod
    def chunked(
        cls, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], stacked_dims: int, sharded_dim: int | None
    ) -> StoredArray:
        """Chooses the chunk shape.

        >>> StoredArray.chunked("moe.mla.q_b", (58, 128 * 192, 1536), np.dtype("float16"), 1, 1).chunk_shape
        (1, 384, 1536)

        Args:
          stacked_dims: number of leading dimensions of which a chunk holds one element each: layers, experts.
          sharded_dim: the inner dimension that meshes divide, if there is one.
        """
        chunk_shape = [1] * stacked_dims + list(shape[stacked_dims:])
        if sharded_dim is not None:
            max_splits = min(_MAX_SPLITS, math.prod(chunk_shape) * dtype.itemsize // _MIN_CHUNK_BYTES)
            splits = 1 << max(max_splits.bit_length() - 1, 0)  # a power of two, as tp usually is
            chunk_shape[sharded_dim] = -(-chunk_shape[sharded_dim] // splits)
        return cls(name, shape, dtype, tuple(chunk_shape))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk's file. Chunks at the end of an array are stored in full."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize + _CRC_BYTES

    @property
    def directory(self) -> str:
        return f"{_STATE}/{self.name}"

    def chunk_files(self, *index: int) -> Iterator[str]:
        """Yields the chunks' files, relative to the checkpoint's directory.

        >>> list(StoredArray("head", (4, 6), np.dtype("float32"), (4, 2)).chunk_files())
        ['weights/state/head/c/0/0', 'weights/state/head/c/0/1', 'weights/state/head/c/0/2']

        Args:
          index: restricts them to one layer, or to one expert of a layer.
        """
        counts = [-(-size // chunk) for size, chunk in zip(self.shape, self.chunk_shape, strict=True)]
        for rest in itertools.product(*map(range, counts[len(index) :])):
            yield "/".join([self.directory, "c", *map(str, (*index, *rest))])

    def open(self, weights: Path, *, create: bool = False) -> ts.TensorStore:
        """Opens the array in an Orbax checkpoint's directory, for reading and writing; `create` replaces an existing one."""
        spec = {
            "driver": "zarr3",
            # Memory-mapped: a chunk is verified in the page cache and copied once, to its destination.
            "kvstore": {
                "driver": "file",
                "path": f"{weights.absolute()}/state/{self.name}/",
                "file_io_mode": {"mode": "memmap"},
            },
            "metadata": {
                "shape": self.shape,
                "data_type": self.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunk_shape}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            },
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, open=not create, create=create, delete_existing=create).result()


@dataclasses.dataclass(frozen=True)
class ConvertedCheckpoint:
    """A converted checkpoint, as its manifest describes it."""

    directory: Path
    complete: bool
    source: str
    """The Hugging Face directory that it was converted from."""
    fingerprint: str
    """Digest of that directory's config and weight files; see `convert`."""
    arrays: Mapping[str, StoredArray]
    files: Mapping[str, str]
    """SHA-256 of every file that is not a chunk, by path in the directory. Empty until the conversion is complete."""

    def write(self) -> None:
        """Writes the manifest, atomically."""
        body = {
            "layout": LAYOUT,
            "complete": self.complete,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "arrays": {
                a.name: {"shape": a.shape, "dtype": a.dtype.name, "chunk": a.chunk_shape} for a in self.arrays.values()
            },
            "files": dict(self.files),
        }
        part = self.directory / f".{MANIFEST}.part"
        part.write_text(_with_checksum(body))
        os.replace(part, self.directory / MANIFEST)

    @classmethod
    def read(cls, directory: Path) -> ConvertedCheckpoint:
        """Reads the manifest.

        Raises:
          CheckpointError: it is missing, damaged, or of an unknown layout.
        """
        path = directory / MANIFEST
        try:
            text = path.read_text()
            body = json.loads(text)
            del body["sha256"]
            layout = body["layout"]
        except FileNotFoundError:
            raise CheckpointError(str(path), f"missing. {_convert_again(directory)}") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(str(path), f"damaged ({error!r}). {_convert_again(directory)}") from error
        if layout != LAYOUT:
            raise CheckpointError(
                str(path),
                f"layout {layout!r}; this version of jax_mla_cp reads layout {LAYOUT}. Use the version that wrote this "
                f"one. {_convert_again(directory)}",
            )
        if text != _with_checksum(body):
            raise CheckpointError(str(path), f"damaged (wrong checksum). {_convert_again(directory)}")
        arrays = {
            name: StoredArray(name, tuple(a["shape"]), np.dtype(ts.dtype(a["dtype"]).numpy_dtype), tuple(a["chunk"]))
            for name, a in body["arrays"].items()
        }
        return cls(directory, body["complete"], body["source"], body["fingerprint"], arrays, body["files"])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def weights(self) -> Literal["bf16", "fp8"]:
        """Storage of its matrices, as a value of `--weights`."""
        return "fp8" if any(name.endswith(".scale") for name in self.arrays) else "bf16"  # `mla.q` may be plain

    def resolve_weights(self, weights: Weights) -> Weights:
        """Resolves "auto" to the kind that is stored; a converted checkpoint can't be loaded as the other kind.

        Raises:
          ConfigError: `weights` asks for the other kind.
        """
        if weights not in ("auto", self.weights):
            raise ConfigError(
                "weights",
                f"{self.directory} was converted with {self.weights} weights, got {weights!r}. Use weights='auto', or "
                f"convert again: {command(self.source, self.directory)} --weights {weights} --overwrite",
            )
        return self.weights

    @property
    def unfinished(self) -> str:
        """The problem of a conversion that is not complete, and the command that finishes it."""
        files = [self.directory / file for array in self.arrays.values() for file in array.chunk_files()]
        written = sum(file.exists() for file in files)
        return (
            f"half-converted: {written} of {len(files)} chunks are written. "
            f"Finish it with: {command(self.source, self.directory)}"
        )

    def problems(self) -> list[str]:
        """Lists files that are missing, of the wrong size or, except for chunks, changed, as "PATH: what is wrong"."""
        found = []
        for name, digest in self.files.items():
            try:
                if hashlib.sha256((self.directory / name).read_bytes()).hexdigest() != digest:
                    found.append(f"{self.directory / name}: changed since the conversion")
            except OSError as error:
                found.append(f"{self.directory / name}: {_reason(error)}")
        for array in self.arrays.values():
            for name in array.chunk_files():
                try:
                    size = os.stat(self.directory / name).st_size
                except OSError as error:
                    found.append(f"{self.directory / name}: {_reason(error)}")
                    continue
                if size != array.chunk_bytes:
                    found.append(f"{self.directory / name}: expected {array.chunk_bytes} bytes, got {size}")
        return found

    def damage_error(self, problems: list[str]) -> CheckpointError:
        """An error that lists the problems and the command that repairs them."""
        rest = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        return CheckpointError(
            "model",
            f"{self.directory}: {len(problems)} damaged files:"
            + "".join(f"\n  {problem}" for problem in problems[:_MAX_LISTED])
            + f"{rest}\nRepair it with: {command(self.source, self.directory)}",
        )

    def open(self, name: str) -> ts.TensorStore:
        """Opens a parameter for reading.

        Raises:
          CheckpointError: it can't be opened.
        """
        try:
            return self.arrays[name].open(self.directory / WEIGHTS)
        except ValueError as error:
            raise self.read_error(error) from error

    def read_error(self, error: ValueError) -> CheckpointError:
        """Turns TensorStore's error for a chunk that can't be read into one that names the file and the repair."""
        return self.damage_error([self.read_problem(error)])

    def read_problem(self, error: ValueError) -> str:
        """Turns TensorStore's error for a chunk that can't be read into "PATH: what is wrong"."""
        text = str(error)
        file = re.search(r'local file "([^"]+)"', text)
        if "Digest mismatch" in text:
            text = "wrong checksum; delete the file before the repair"
        return f"{file[1] if file else self.directory / WEIGHTS}: {text}"


def is_converted(directory: Path) -> bool:
    """True if a directory is a converted checkpoint, complete or not. (A Hugging Face directory may have a "weights" too.)"""
    return (directory / MANIFEST).exists() or (directory / _STATE).is_dir()


def mixed_problem(directory: Path) -> str | None:
    """The problem of a directory with a converted checkpoint and safetensors files; None if it has not both."""
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    if not files or not is_converted(directory):
        return None
    return (
        f"half-converted: it holds a Hugging Face checkpoint ({files[0]}{', ..' if len(files) > 1 else ''}) and a conversion "
        f"({MANIFEST}, {WEIGHTS}/), and which is meant can't be told. Move one of them to a directory of its own."
    )


def open_converted(directory: Path) -> ConvertedCheckpoint:
    """Opens a converted checkpoint and verifies it, except for the contents of chunks, which are verified as they are read.

    Raises:
      CheckpointError: an unknown layout, a half-converted directory, or files that are missing, truncated or damaged; lists
        all of them.
    """
    if mixed := mixed_problem(directory):
        raise CheckpointError("model", f"{directory} is {mixed}")
    checkpoint = ConvertedCheckpoint.read(directory)
    if not checkpoint.complete:
        raise CheckpointError("model", f"{directory} is {checkpoint.unfinished}")
    if problems := checkpoint.problems():
        raise checkpoint.damage_error(problems)
    return checkpoint


def command(source: str | Path, directory: Path) -> str:
    """The command line that starts, finishes or repairs a conversion.

    >>> command("DeepSeek-V3", Path("out dir"))
    "python -m jax_mla_cp.checkpoint convert DeepSeek-V3 'out dir'"
    """
    return shlex.join(["python", "-m", "jax_mla_cp.checkpoint", "convert", str(source), str(directory)])


def sha256_files(directory: Path, names: list[str]) -> dict[str, str]:
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in sorted(names)}


def _with_checksum(body: Mapping[str, Any]) -> str:
    """The manifest's text. Its last key is the checksum of all others."""
    return json.dumps({**body, "sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest()}, indent=1) + "\n"


def _convert_again(directory: Path) -> str:
    return f"Convert again: {command('HF_DIR', directory)} --overwrite"


def _reason(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else error.strerror or repr(error)
