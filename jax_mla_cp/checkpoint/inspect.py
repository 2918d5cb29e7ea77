"""Summary and checks of a checkpoint, a Hugging Face directory or a converted one."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from jax_mla_cp.checkpoint.check_tensors import check_tensors
from jax_mla_cp.checkpoint.errors import CheckpointError
from jax_mla_cp.checkpoint.finite import count_not_finite
from jax_mla_cp.checkpoint.huggingface import has_mtp, tensor_mappings
from jax_mla_cp.checkpoint.orbax import ConvertedCheckpoint, is_converted, mixed_problem
from jax_mla_cp.checkpoint.parameter import Parameter
from jax_mla_cp.checkpoint.progress_bar import progress_bar
from jax_mla_cp.checkpoint.tensor_source import SafetensorsSource
from jax_mla_cp.config.errors import ConfigError, check_choice
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.model.build import EP_CHOICES, Build
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.loaded_model import weight_bytes

T = TypeVar("T")

_MODEL_DTYPES = ("bfloat16", "float16", "float32")
_BLOCK_ELEMENTS = 1 << 24  # checked at a time
_GROUPS = {
    "routed experts": r"\.experts\.\d+\.|(moe|mtp\.layer)\.mlp\.(gate_up|down)",
    "shared experts": r"shared_experts|\.shared\.",
    "router": r"mlp\.gate\.|mlp\.router|mlp\.bias",
    "norms": r"norm",
    "attention": r"self_attn|\.mla\.",
    "dense MLP": r"mlp",
    "embedding and head": r"embed|head",
    "multi-token prediction": r"eh_proj|mtp\.project",
}
"""Parts of the model, by the names of tensors or parameters; the first match counts."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    @property
    def group(self) -> str:
        return next((group for group, names in _GROUPS.items() if re.search(names, self.name)), "other")


def inspect(
    directory: Path, *, mesh: MeshShape | None = None, ep_axes: str = "tp", verify: bool = False
) -> dict[str, Any]:
    """Collects what `python -m jax_mla_cp.checkpoint inspect` shows, as JSON data.

    Args:
      verify: read all weights, verify checksums and look for NaN and infinity.

    Raises:
      ConfigError: the directory does not exist, or the mesh does not fit the model.
      CheckpointError: there are no weights, or the manifest or a header can't be read.
    """
    if not directory.is_dir():
        raise ConfigError("model", f"{directory} is not a directory. Give a model directory.")
    problems = [problem] if (problem := mixed_problem(directory)) else []
    source = ConvertedCheckpoint.read(directory) if is_converted(directory) else SafetensorsSource(directory)
    half_converted = isinstance(source, ConvertedCheckpoint) and not source.complete
    # A conversion copies config.json last.
    without_config = half_converted and not (directory / "config.json").exists()
    config = None if without_config else _collect(problems, lambda: ModelConfig.from_dir(directory))
    if isinstance(source, ConvertedCheckpoint):
        tensors = [_Tensor(a.name, a.shape, a.dtype) for a in source.arrays.values()]
        files = sum(1 for array in source.arrays.values() for _ in array.chunk_files()) + len(source.files)
        problems += [source.unfinished] if half_converted else source.problems()
    else:
        hf = source
        tensors = [_Tensor(name, source.shape(name), source.dtype(name)) for name in source.names()]
        files = len(source.files)
        if config:
            variables = nnx.to_flat_state(nnx.state(Decoder(Build(config, mtp=has_mtp(config, set(source.names()))))))
            parameters = [Parameter.from_variable(path, variable, config, None) for path, variable in variables]
            _collect(problems, lambda: check_tensors(hf, config, parameters))
    report: dict[str, Any] = {
        "directory": str(directory),
        "kind": "Orbax" if isinstance(source, ConvertedCheckpoint) else "Hugging Face",
        **_from_config(directory),
        "parameters": sum(t.count for t in tensors),
        "bytes": sum(t.nbytes for t in tensors),
        "files": files,
        "dtypes": _sums(tensors, lambda t: t.dtype.name),
        "groups": _sums(tensors, lambda t: t.group),
        "tensors": _tensor_rows(tensors),
    }
    if mesh is not None and config is not None:
        report["device"] = _per_device(config, mesh, ep_axes, tensors)
    if verify:
        report["verified"] = _verify(source, tensors, problems)
    return report | {"problems": problems}


def show(report: dict[str, Any], *, tensors: bool) -> None:
    """Prints the report that `inspect` returned."""
    console = Console(highlight=False, soft_wrap=True)
    quantized = f", {report['quantization']}" if report["quantization"] else ""
    console.print(
        f"{report['directory']}: {report['model_type']}, {report['kind']}{quantized}\n"
        f"{report['parameters']:,} parameters, {decimal(report['bytes'])}, {report['files']} files",
        markup=False,
    )
    for key, title in (("dtypes", "dtype"), ("groups", "part")):
        table = Table(title, "parameters", "size", "share")
        for name, row in report[key].items():
            share = row["bytes"] / report["bytes"] if report["bytes"] else 0
            table.add_row(name, f"{row['parameters']:,}", decimal(row["bytes"]), f"{share:.1%}")
        console.print(table)
    if tensors:
        table = Table(Column("tensor", overflow="fold"), "shape", "dtype", "count")
        for row in report["tensors"]:
            table.add_row(row["name"], str(row["shape"]), row["dtype"], str(row["count"]))
        console.print(table)
    if device := report.get("device"):
        console.print(
            f"weights per device on {device['mesh']}, experts over {device['ep_axes']}, {device['dtype']}: "
            f"{decimal(device['bytes'])}"
        )
    if done := report.get("verified"):
        console.print(
            f"read {decimal(done['bytes'])} in {done['seconds']:.1f} s ({done['gb_per_s']:.2f} GB/s); "
            + (
                "checksums verified"
                if done["checksums"]
                else "no checksums in this format, so changed bytes go unnoticed"
            )
        )
    for problem in report["problems"]:
        console.print(f"problem: {problem}", markup=False)
    if not report["problems"]:
        console.print("no problems found")


def _collect(problems: list[str], check: Callable[[], T]) -> T | None:
    """Returns the result of `check`. An error becomes a problem, and the result None."""
    try:
        return check()
    except ConfigError as error:
        problems.append(error.message if error.field == "model" else str(error))
        return None


def _from_config(directory: Path) -> dict[str, Any]:
    try:
        raw = json.loads((directory / "config.json").read_text())
        quantization = raw.get("quantization_config") or {}
        return {"model_type": raw.get("model_type"), "quantization": quantization.get("quant_method")}
    except (OSError, ValueError, AttributeError):
        return {"model_type": None, "quantization": None}  # already reported as a problem


def _sums(tensors: list[_Tensor], key: Callable[[_Tensor], str]) -> dict[str, dict[str, int]]:
    sums: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        row = sums.setdefault(key(tensor), {"parameters": 0, "bytes": 0})
        row["parameters"] += tensor.count
        row["bytes"] += tensor.nbytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]["bytes"]))


def _tensor_rows(tensors: list[_Tensor]) -> list[dict[str, Any]]:
    """One row for all tensors whose names differ only in the numbers of layer and expert."""
    counts = collections.Counter(
        (re.sub(r"(layers|experts)\.\d+\.", r"\1.*.", t.name), t.shape, t.dtype.name) for t in tensors
    )
    return [
        {"name": name, "shape": list(shape), "dtype": dtype, "count": n} for (name, shape, dtype), n in counts.items()
    ]


def _per_device(config: ModelConfig, mesh: MeshShape, ep_axes: str, tensors: list[_Tensor]) -> dict[str, Any]:
    """Size of the weights on each device of a mesh, loaded in the dtype of the checkpoint's embedding."""
    check_choice("ep_axes", ep_axes, tuple(EP_CHOICES))
    # Not of most of it: scales, and what a conversion has dequantized, are float32 beside bfloat16.
    names = {"embed", *(mapping.name for mapping in tensor_mappings(config)["embed"])}
    embedding = next((t.dtype.name for t in tensors if t.name in names), "")
    dtype = embedding if embedding in _MODEL_DTYPES else "bfloat16"
    fp8 = config.quantization is not None and not any(t.name == "moe.mlp.down" for t in tensors)
    build = Build(config, mesh, EP_CHOICES[ep_axes], jnp.dtype(dtype), fp8=fp8)
    dtypes_kept = f"{dtype} and FP8" if fp8 else dtype
    return {"mesh": str(mesh), "ep_axes": ep_axes, "dtype": dtypes_kept, "bytes": weight_bytes(build)}


def _verify(
    source: ConvertedCheckpoint | SafetensorsSource, tensors: list[_Tensor], problems: list[str]
) -> dict[str, Any]:
    """Reads all weights, block by block. Adds blocks that can't be read, and values that are not finite, to `problems`."""
    begin, total = time.perf_counter(), 0
    converted = isinstance(source, ConvertedCheckpoint)
    with progress_bar("reading weights", sum(t.nbytes for t in tensors), len(tensors), "tensor") as advance:
        for tensor in tensors:
            not_finite = 0
            blocks = (
                _stored_blocks(source, tensor)
                if isinstance(source, ConvertedCheckpoint)
                else _blocks(source.read(tensor.name))
            )
            for block in blocks:
                if isinstance(block, str):
                    if not any(block.partition(": ")[0] in problem for problem in problems):
                        problems.append(block)
                    continue
                not_finite += count_not_finite(block)
                total += block.nbytes
            if not_finite:
                problems.append(f"{tensor.name}: {not_finite} values are NaN or infinite")
            advance(tensor.nbytes)
    seconds = time.perf_counter() - begin
    return {"bytes": total, "seconds": seconds, "gb_per_s": total / 1e9 / seconds, "checksums": converted}


def _stored_blocks(checkpoint: ConvertedCheckpoint, tensor: _Tensor) -> Iterator[NDArray[Any] | str]:
    """Yields a converted parameter chunk by chunk; for a chunk that can't be read, "PATH: what is wrong"."""
    array = checkpoint.arrays[tensor.name]
    try:
        store = checkpoint.open(tensor.name)
    except CheckpointError as error:
        yield str(error)
        return
    starts = itertools.product(*map(range, (0,) * len(array.shape), array.shape, array.chunk_shape))
    for start, file in zip(starts, array.chunk_files(), strict=True):
        if not (checkpoint.complete or (checkpoint.directory / file).exists()):
            continue  # `unfinished` counts it
        part = tuple(
            slice(i, min(i + n, size)) for i, n, size in zip(start, array.chunk_shape, array.shape, strict=True)
        )
        try:
            yield store[part].read().result()
        except ValueError as error:
            yield checkpoint.read_problem(error)


def _blocks(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    flat = values.reshape(-1)
    for start in range(0, flat.size, _BLOCK_ELEMENTS):
        yield flat[start : start + _BLOCK_ELEMENTS]
