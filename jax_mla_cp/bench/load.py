"""`load`: loading a random checkpoint, as safetensors and converted to Orbax: time and host memory.

The two loaders load the same weights in turn, once to warm up (compilation) before anything is timed. Cold: after dropping
the files from the page cache (posix_fadvise). Memory is the peak of anonymous memory (RssAnon), less what was held before;
on a CPU it includes the loaded arrays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_mla_cp.bench.bench_options import Options
from jax_mla_cp.bench.table import Report
from jax_mla_cp.checkpoint import SafetensorsSource, expected_shapes, load_converted, load_params, open_converted
from jax_mla_cp.checkpoint.convert import convert
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import make_mesh, mesh_shape
from jax_mla_cp.model.build import EP_CHOICES, Build
from jax_mla_cp.model.decoder import Decoder

_RAW: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 32768,
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
}
_GB = 10**9
_SHARD = 1 << 30  # bytes of a safetensors file
_MEMORY = 1.2  # times the local shards


def run(options: Options, config: ModelConfig, report: Report) -> None:
    """Adds rows for each loader, without a mesh and on `options.mesh`, warm and cold. `config` is unused: --gb sets the sizes."""
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="jax_mla_cp_load_") as scratch:
        hf, out = Path(scratch) / "hf", Path(scratch) / "orbax"
        report.say(f"writing {options.gb} GB of random weights to {scratch}")
        raw = write_random(hf, options.gb * _GB)
        report.row("convert", "safetensors to Orbax", lambda: _timed_convert(hf, out))
        meshes: list[Mesh | None] = [None]
        if options.mesh.devices <= jax.local_device_count():
            meshes.append(make_mesh(options.mesh))
        else:
            report.notes.append(
                f"mesh {options.mesh} needs {options.mesh.devices} devices, found {jax.local_device_count()}."
            )
        for mesh in meshes:
            _Bench(options, ModelConfig.from_hf(raw), report, mesh, hf, out).run()


def write_random(directory: Path, nbytes: int) -> dict[str, Any]:
    """Writes a random bfloat16 checkpoint of at most `nbytes` bytes, but at least two layers; returns its config.json."""

    def raw_of(layers: int) -> dict[str, Any]:
        return _RAW | {"num_hidden_layers": layers}

    def size(layers: int) -> int:
        return sum(2 * math.prod(s) for s in expected_shapes(ModelConfig.from_hf(raw_of(layers))).values())

    layer = size(3) - size(2)
    raw = raw_of(2 + max((nbytes - size(2)) // layer, 0))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw))
    noise = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32).astype(ml_dtypes.bfloat16)
    shapes = list(expected_shapes(ModelConfig.from_hf(raw)).items())
    weight_map: dict[str, str] = {}
    while shapes:
        name, taken, held = f"model-{len(set(weight_map.values())):05d}.safetensors", [], 0
        while shapes and held < _SHARD:
            taken.append(shapes.pop(0))
            held += 2 * math.prod(taken[-1][1])
        _write_safetensors(directory / name, taken, noise)
        weight_map |= {tensor: name for tensor, _ in taken}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return raw


def _write_safetensors(path: Path, tensors: list[tuple[str, tuple[int, ...]]], noise: np.ndarray) -> None:
    header, at = {}, 0
    for name, shape in tensors:
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in tensors:
            left = math.prod(shape)
            while left:
                part = noise[: min(left, len(noise))]
                file.write(part.view(np.uint16))
                left -= len(part)


def _timed_convert(hf: Path, out: Path) -> dict[str, float]:
    begin = time.perf_counter()
    done = convert(hf, out, progress=False)
    seconds = time.perf_counter() - begin
    return {"ms": seconds * 1e3, "load_gbs": done.nbytes / 1e9 / seconds, "gb": done.nbytes / 1e9}


@dataclasses.dataclass
class _Bench:
    options: Options
    config: ModelConfig
    report: Report
    mesh: Mesh | None
    hf: Path
    out: Path

    def run(self) -> None:
        shape = None if self.mesh is None else mesh_shape(self.mesh)
        build = Build(self.config, shape, EP_CHOICES["tp"], jnp.dtype(self.options.dtype))
        declared = nnx.state(Decoder(build))
        where = "no mesh" if shape is None else str(shape)
        loaders: dict[str, tuple[Path, Callable[[], Any]]] = {
            "safetensors": (
                self.hf,
                lambda: load_params(SafetensorsSource(self.hf), declared, self.config, self.mesh, progress=False),
            ),
            "Orbax": (
                self.out,
                lambda: load_converted(open_converted(self.out), declared, self.config, self.mesh, progress=False),
            ),
        }
        for _, load in loaders.values():
            _measure(load)
        for cache in ("warm", "cold"):
            seen: dict[str, dict[str, Any]] = {}
            samples: dict[str, list[dict[str, Any]]] = {name: [] for name in loaders}
            for _ in range(self.options.samples):
                for name, (directory, load) in loaders.items():
                    if cache == "cold":
                        _drop_from_page_cache(directory)
                    samples[name].append(_measure(load))
            for name, taken in samples.items():
                row = self.report.row("load", name, functools.partial(_median, taken), mesh=where, cache=cache)
                seen |= {name: row} if row else {}
            self._hold(where, cache, seen)

    def _hold(self, where: str, cache: str, seen: dict[str, dict[str, Any]]) -> None:
        ratio = seen["Orbax"]["ms"] / seen["safetensors"]["ms"]
        self.report.hold(f"Orbax / safetensors, {where}, {cache}: time", ratio, at_most=1.0)
        if self.options.platform == "cpu":
            for name, row in seen.items():
                self.report.hold(f"{name}, {where}, {cache}: memory / local shards", row["peak"], at_most=_MEMORY)


def _measure(load: Callable[[], Any]) -> dict[str, Any]:
    gc.collect()
    with _peak_anonymous() as peak:
        begin, cpu = time.perf_counter(), time.process_time()
        params = jax.block_until_ready(load())
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    shards = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    held = peak[0] / 1e9
    return {
        "ms": seconds * 1e3,
        "load_gbs": total / 1e9 / seconds,
        "cpu_s": cpu,
        "host_gb": held,
        "peak": held * 1e9 / sum(shards),
    }


def _median(taken: list[dict[str, Any]]) -> dict[str, Any]:
    """The median sample, with the highest memory of all samples."""
    middle = statistics.median_low([sample["ms"] for sample in taken])
    row = next(sample for sample in taken if sample["ms"] == middle)
    return row | {key: max(sample[key] for sample in taken) for key in ("host_gb", "peak")} | {"n": len(taken)}


@contextlib.contextmanager
def _peak_anonymous() -> Iterator[list[int]]:
    """Measures the process's peak anonymous memory in the block, in bytes, less what it held before: yields a list of it."""
    before = _anonymous()
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _anonymous() - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux.")


def _drop_from_page_cache(directory: Path) -> None:
    gc.collect()  # mapped pages are not dropped
    for path in directory.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)  # nor are dirty ones
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
