"""What a checkpoint holds and whether it is sound: of a Hugging Face directory or a converted one."""

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
import ml_dtypes
import numpy as np
from flax import nnx
from numpy.typing import NDArray
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from jax_mla_cp.checkpoint.orbax import Converted, command, is_converted
from jax_mla_cp.checkpoint.progress import loading_bar
from jax_mla_cp.checkpoint.source import CheckpointError, SafetensorsSource
from jax_mla_cp.checkpoint.target import Target
from jax_mla_cp.checkpoint.tensors import check_tensors
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.model.build import EP_CHOICES, Build
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.loaded_model import weight_bytes

T = TypeVar("T")

_MODEL_DTYPES = ("bfloat16", "float16", "float32")
_BLOCK = 1 << 24  # numbers checked at a time
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
"""Parts of the model by names, Hugging Face's or ours; the first that fits."""


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
    """Everything that `python -m jax_mla_cp.checkpoint inspect` shows, ready for JSON.

    Args:
      verify: read all of it.

    Raises:
      ConfigError: no such directory, an impossible mesh.
      CheckpointError: nothing can be told of it: no weights, a manifest or a header that can't be read.
    """
    if not directory.is_dir():
        raise ConfigError(f"DIR {directory}: is not a directory. Give a model directory.")
    problems: list[str] = []
    config = _found(problems, lambda: ModelConfig.from_dir(directory))
    source = Converted.read(directory) if is_converted(directory) else SafetensorsSource(directory)
    if isinstance(source, Converted):
        tensors = [_Tensor(a.name, a.shape, a.dtype) for a in source.arrays.values()]
        files = sum(1 for array in source.arrays.values() for _ in array.chunks()) + len(source.files)
        if not source.complete:
            problems.append(f"the conversion is not complete; finish it with: {command(source.source, directory)}")
        problems += source.problems()
    else:
        hf = source
        tensors = [_Tensor(name, source.shape(name), source.dtype(name)) for name in source.names()]
        files = len(source.files)
        if config:
            targets = [Target.of(path, param, config, None) for path, param in _declared(config)]
            _found(problems, lambda: check_tensors(hf, config, targets))
    report: dict[str, Any] = {
        "directory": str(directory),
        "kind": "Orbax" if isinstance(source, Converted) else "Hugging Face",
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
    """Prints a report of `inspect`."""
    console = Console(highlight=False, soft_wrap=True)
    quantized = f", {report['quantization']}" if report["quantization"] else ""
    console.print(
        f"{report['directory']}: {report['model_type']}, {report['kind']}{quantized}\n"
        f"{report['parameters']:,} parameters, {decimal(report['bytes'])}, {report['files']} files",
        markup=False,
    )
    for what in ("dtypes", "groups"):
        table = Table(what.removesuffix("s"), "parameters", "bytes", "share")
        for name, row in report[what].items():
            share = row["bytes"] / report["bytes"] if report["bytes"] else 0
            table.add_row(name, f"{row['parameters']:,}", decimal(row["bytes"]), f"{share:.1%}")
        console.print(table)
    if tensors:
        table = Table(Column("tensor", overflow="fold"), "shape", "dtype", "how many")
        for row in report["tensors"]:
            table.add_row(row["name"], str(row["shape"]), row["dtype"], str(row["count"]))
        console.print(table)
    if device := report.get("device"):
        console.print(
            f"on {device['mesh']}, experts over {device['ep_axes']}: {decimal(device['bytes'])} of weights per device "
            f"in {device['dtype']}"
        )
    if done := report.get("verified"):
        console.print(
            f"read {decimal(done['bytes'])} in {done['seconds']:.1f} s ({done['gb_per_s']:.2f} GB/s); "
            + (
                "checksums checked"
                if done["checksums"]
                else "this format has no checksums: changed bytes can't be seen"
            )
        )
    for problem in report["problems"]:
        console.print(f"problem: {problem}", markup=False)
    if not report["problems"]:
        console.print("no problems found")


def _declared(config: ModelConfig) -> Iterator[tuple[tuple[Any, ...], Any]]:
    yield from nnx.to_flat_state(nnx.state(Decoder(Build(config))))


def _found(problems: list[str], look: Callable[[], T]) -> T | None:
    """What `look` finds; an error of it becomes a problem."""
    try:
        return look()
    except ConfigError as error:
        problems.append(str(error))
        return None


def _from_config(directory: Path) -> dict[str, Any]:
    try:
        raw = json.loads((directory / "config.json").read_text())
        quantization = raw.get("quantization_config") or {}
        return {"model_type": raw.get("model_type"), "quantization": quantization.get("quant_method")}
    except (OSError, ValueError, AttributeError):
        return {"model_type": None, "quantization": None}  # which is among the problems


def _sums(tensors: list[_Tensor], key: Callable[[_Tensor], str]) -> dict[str, dict[str, int]]:
    sums: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        row = sums.setdefault(key(tensor), {"parameters": 0, "bytes": 0})
        row["parameters"] += tensor.count
        row["bytes"] += tensor.nbytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]["bytes"]))


def _tensor_rows(tensors: list[_Tensor]) -> list[dict[str, Any]]:
    """One row for the tensors whose names differ only in the layer's and the expert's number."""
    alike = collections.Counter(
        (re.sub(r"(layers|experts)\.\d+\.", r"\1.*.", t.name), t.shape, t.dtype.name) for t in tensors
    )
    return [
        {"name": name, "shape": list(shape), "dtype": dtype, "count": n} for (name, shape, dtype), n in alike.items()
    ]


def _per_device(config: ModelConfig, mesh: MeshShape, ep_axes: str, tensors: list[_Tensor]) -> dict[str, Any]:
    """What the loader would put on each device of a mesh, in the dtype that most of the checkpoint has."""
    if ep_axes not in EP_CHOICES:
        raise ConfigError(f"--ep-axes must be {' or '.join(EP_CHOICES)}, got {ep_axes!r}.")
    kinds = _sums([t for t in tensors if t.dtype.name in _MODEL_DTYPES], lambda t: t.dtype.name)
    dtype = next(iter(kinds), "bfloat16")
    fp8 = config.quantization is not None and not any(t.name == "moe.mlp.down" for t in tensors)
    build = Build(config, mesh, EP_CHOICES[ep_axes], jnp.dtype(dtype), fp8=fp8)
    stored = f"{dtype} and FP8" if fp8 else dtype
    return {"mesh": str(mesh), "ep_axes": ep_axes, "dtype": stored, "bytes": weight_bytes(build)}


def _verify(source: Converted | SafetensorsSource, tensors: list[_Tensor], problems: list[str]) -> dict[str, Any]:
    """Reads everything, a block at a time: what can't be read, and numbers that are not finite, are problems."""
    begin, total = time.perf_counter(), 0
    converted = isinstance(source, Converted)
    with loading_bar(sum(t.nbytes for t in tensors), len(tensors), title="reading") as advance:
        for tensor in tensors:
            bad = 0
            blocks = (
                _stored_blocks(source, tensor) if isinstance(source, Converted) else _blocks(source.read(tensor.name))
            )
            for block in blocks:
                if isinstance(block, str):
                    if not any(block.partition(": ")[0] in problem for problem in problems):
                        problems.append(block)
                    continue
                bad += _not_finite(block)
                total += block.nbytes
            if bad:
                problems.append(f"{tensor.name}: {bad} numbers are not finite")
            advance(tensor.nbytes)
    seconds = time.perf_counter() - begin
    return {"bytes": total, "seconds": seconds, "gb_per_s": total / 1e9 / seconds, "checksums": converted}


def _stored_blocks(checkpoint: Converted, tensor: _Tensor) -> Iterator[NDArray[Any] | str]:
    """Chunk by chunk; what can't be read, as what is wrong with it."""
    array = checkpoint.arrays[tensor.name]
    try:
        store = checkpoint.open(tensor.name)
    except CheckpointError as error:
        yield str(error)
        return
    for starts in itertools.product(*map(range, (0,) * len(array.shape), array.shape, array.chunk)):
        part = tuple(slice(at, min(at + n, size)) for at, n, size in zip(starts, array.chunk, array.shape, strict=True))
        try:
            yield store[part].read().result()
        except ValueError as error:
            yield checkpoint.read_problem(error)


def _blocks(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    flat = values.reshape(-1)
    for at in range(0, flat.size, _BLOCK):
        yield flat[at : at + _BLOCK]


def _not_finite(values: NDArray[Any]) -> int:
    if values.dtype == ml_dtypes.bfloat16:  # NumPy's own loop over bfloat16 takes ten times as long
        exponent = np.uint16(0x7F80)
        return int(np.count_nonzero((np.ascontiguousarray(values).view(np.uint16) & exponent) == exponent))
    if values.dtype == ml_dtypes.float8_e4m3fn:  # has no infinity, and one NaN of either sign
        return int(np.count_nonzero((np.ascontiguousarray(values).view(np.uint8) & 0x7F) == 0x7F))
    if values.dtype.kind in "iub":
        return 0
    return int(values.size - np.count_nonzero(np.isfinite(values)))
