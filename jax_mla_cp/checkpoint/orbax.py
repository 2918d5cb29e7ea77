"""A converted checkpoint on disk: an Orbax checkpoint of the model's parameters, and a manifest beside it.

    DIR/config.json, tokenizer.json, ..   as they were in the Hugging Face directory
    DIR/jax_mla_cp.json                   the manifest
    DIR/weights/                          the Orbax checkpoint: `Decoder`'s parameters without a mesh, unpadded
    DIR/weights/state/NAME/c/i/j/..       one chunk of one parameter, a file each

Nothing in it depends on a mesh. Chunks are cut where meshes cut: a layer, an expert, a few heads. Each ends with its
CRC-32C, which TensorStore checks whenever a chunk is read, by this package or by Orbax itself; the manifest has the
SHA-256 of every other file. Orbax's own writer can't do the first (0.12.8: no checksum in its codecs, and chunks along one
chosen axis only down to single rows), so Orbax saves the tree with arrays of one number, and TensorStore, its storage
layer, then writes the real arrays in their places.
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

from jax_mla_cp.checkpoint.source import CheckpointError
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.quantization import Weights

LAYOUT = 1
"""Raised whenever a reader of the old layout would misread the new one."""
MANIFEST = "jax_mla_cp.json"
WEIGHTS = "weights"
_STATE = f"{WEIGHTS}/state"
_CRC_BYTES = 4
_SHOWN = 20  # files listed in an error
_PIECES = 64  # that a divided dimension is cut into at most ..
_CHUNK = 1 << 20  # .. while chunks stay this many bytes


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """A parameter as it is stored: [layers if stacked, experts if routed, *inner], not padded for any mesh."""

    name: str
    """`Decoder`'s attributes, joined with dots."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk: tuple[int, ...]

    @classmethod
    def of(
        cls, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], leading: int, divided: int | None
    ) -> StoredArray:
        """Chooses the chunks.

        Args:
          leading: the stacked dimensions: a chunk holds one layer and one expert.
          divided: the inner dimension that meshes divide, if there is one.
        """
        chunk = [1] * leading + list(shape[leading:])
        if divided is not None:
            most = min(_PIECES, math.prod(chunk) * dtype.itemsize // _CHUNK)
            pieces = 1 << max(most.bit_length() - 1, 0)  # a power of two, as tp mostly is
            chunk[divided] = -(-chunk[divided] // pieces)
        return cls(name, shape, dtype, tuple(chunk))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk's file. Those at an array's end are stored whole."""
        return math.prod(self.chunk) * self.dtype.itemsize + _CRC_BYTES

    @property
    def directory(self) -> str:
        return f"{_STATE}/{self.name}"

    def chunks(self, *leading: int) -> Iterator[str]:
        """The files, relative to the checkpoint's directory; with `leading`, those of one layer or one of its experts."""
        counts = [-(-size // chunk) for size, chunk in zip(self.shape, self.chunk, strict=True)]
        for rest in itertools.product(*map(range, counts[len(leading) :])):
            yield "/".join([self.directory, "c", *map(str, (*leading, *rest))])

    def open(self, weights: Path, *, create: bool = False) -> ts.TensorStore:
        """In an Orbax checkpoint's directory, for reading and writing; `create` replaces what is there."""
        spec = {
            "driver": "zarr3",
            # The page cache is read in place: a chunk is checked there and copied once, to where it is wanted.
            "kvstore": {
                "driver": "file",
                "path": f"{weights.absolute()}/state/{self.name}/",
                "file_io_mode": {"mode": "memmap"},
            },
            "metadata": {
                "shape": self.shape,
                "data_type": self.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunk}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            },
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, open=not create, create=create, delete_existing=create).result()


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted checkpoint, as its manifest describes it."""

    directory: Path
    complete: bool
    source: str
    """The Hugging Face directory that it was made from."""
    fingerprint: str
    """Of that directory's config and weight files: see `convert`."""
    arrays: Mapping[str, StoredArray]
    files: Mapping[str, str]
    """SHA-256 of each file that is no chunk, by its path in the directory. Empty until it is complete."""

    def write(self) -> None:
        """Writes the manifest, at once or not at all."""
        body = {
            "layout": LAYOUT,
            "complete": self.complete,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "arrays": {
                a.name: {"shape": a.shape, "dtype": a.dtype.name, "chunk": a.chunk} for a in self.arrays.values()
            },
            "files": dict(self.files),
        }
        part = self.directory / f".{MANIFEST}.part"
        part.write_text(_sealed(body))
        os.replace(part, self.directory / MANIFEST)

    @classmethod
    def read(cls, directory: Path) -> Converted:
        """Reads the manifest.

        Raises:
          CheckpointError: it is missing, damaged, or of a layout that this version does not know.
        """
        path = directory / MANIFEST
        try:
            text = path.read_text()
            body = json.loads(text)
            del body["sha256"]
            layout = body["layout"]
        except FileNotFoundError:
            raise CheckpointError(str(path), f"missing. {_anew(directory)}") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(str(path), f"damaged ({error!r}). {_anew(directory)}") from error
        if layout != LAYOUT:
            raise CheckpointError(
                str(path),
                f"layout {layout!r}; this version of jax_mla_cp reads layout {LAYOUT}. Convert the Hugging Face "
                "checkpoint again, or use the version that wrote this one.",
            )
        if text != _sealed(body):
            raise CheckpointError(str(path), f"damaged (its checksum is wrong). {_anew(directory)}")
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
        """How its matrices are stored, in the words of `--weights`."""
        return "fp8" if any(name.endswith(".q") for name in self.arrays) else "bf16"

    def keeps(self, weights: Weights) -> Weights:
        """What `--weights` comes to for it: a conversion is read as it is.

        Raises:
          ConfigError: it was converted to the other kind.
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
        """What errors and reports call a conversion that is not complete, and the command that continues it."""
        return f"an unfinished conversion: its weights are not complete. Finish it with: {command(self.source, self.directory)}"

    def problems(self) -> list[str]:
        """Every file that is missing, of the wrong size or, unless it is a chunk, changed; "PATH: what is wrong"."""
        found = []
        for name, digest in self.files.items():
            try:
                if hashlib.sha256((self.directory / name).read_bytes()).hexdigest() != digest:
                    found.append(f"{self.directory / name}: changed since the conversion")
            except OSError as error:
                found.append(f"{self.directory / name}: {_reason(error)}")
        for array in self.arrays.values():
            for name in array.chunks():
                try:
                    size = os.stat(self.directory / name).st_size
                except OSError as error:
                    found.append(f"{self.directory / name}: {_reason(error)}")
                    continue
                if size != array.chunk_bytes:
                    found.append(f"{self.directory / name}: expected {array.chunk_bytes} bytes, got {size}")
        return found

    def error(self, problems: list[str]) -> CheckpointError:
        """Names them, and says how to repair them."""
        rest = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        return CheckpointError(
            "model",
            f"{self.directory} has {len(problems)} damaged files:"
            + "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
            + f"{rest}\nRepair it with: {command(self.source, self.directory)}",
        )

    def open(self, name: str) -> ts.TensorStore:
        """A parameter, for reading.

        Raises:
          CheckpointError: it can't be opened.
        """
        try:
            return self.arrays[name].open(self.directory / WEIGHTS)
        except ValueError as error:
            raise self.read_error(error) from error

    def read_error(self, error: ValueError) -> CheckpointError:
        """What TensorStore says of a chunk that it can't read, as an error that names the file."""
        return self.error([self.read_problem(error)])

    def read_problem(self, error: ValueError) -> str:
        """The same in a line: "PATH: what is wrong"."""
        text = str(error)
        file = re.search(r'local file "([^"]+)"', text)
        if "Digest mismatch" in text:
            text = "its checksum is wrong; delete it before the repair"
        return f"{file[1] if file else self.directory / WEIGHTS}: {text}"


def is_converted(directory: Path) -> bool:
    """Whether a directory is (or should be) a converted checkpoint, not a Hugging Face one, which may have a "weights" too."""
    return (directory / MANIFEST).exists() or (directory / _STATE).is_dir()


def open_converted(directory: Path) -> Converted:
    """Checks everything but the chunks' contents, which are checked as they are read.

    Raises:
      CheckpointError: an unknown layout, an unfinished conversion, or files that are missing, truncated or damaged; all
        are named.
    """
    checkpoint = Converted.read(directory)
    if not checkpoint.complete:
        raise CheckpointError("model", f"{directory} is {checkpoint.unfinished}")
    if problems := checkpoint.problems():
        raise checkpoint.error(problems)
    return checkpoint


def command(source: str | Path, directory: Path) -> str:
    """The command line that makes, finishes or repairs a conversion."""
    return shlex.join(["python", "-m", "jax_mla_cp.checkpoint", "convert", str(source), str(directory)])


def sha256_files(directory: Path, names: list[str]) -> dict[str, str]:
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in sorted(names)}


def _sealed(body: Mapping[str, Any]) -> str:
    """A manifest's text, with a checksum of all else as its last key."""
    return json.dumps({**body, "sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest()}, indent=1) + "\n"


def _anew(directory: Path) -> str:
    return f"Convert again: {command('HF_DIR', directory)} --overwrite"


def _reason(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else error.strerror or repr(error)
