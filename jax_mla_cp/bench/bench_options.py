"""The benchmarks' options: one frozen `Options`, checked without a device, and each command's defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

from jax_mla_cp.attention import Implementation
from jax_mla_cp.cli import check_output
from jax_mla_cp.config import presets
from jax_mla_cp.config.errors import ConfigError, check_choice
from jax_mla_cp.config.quantization import Fp8Compute
from jax_mla_cp.distributed.cluster_options import ClusterOptions
from jax_mla_cp.mesh import MeshShape

Command = Literal["attention", "layer", "model", "decode", "load", "host", "scaling", "engine"]
FormName = Literal["expanded", "absorbed"]
EpName = Literal["none", "tp", "tp,cp", "tp,cp,dp"]
WeightsName = Literal["bf16", "fp8"]


@dataclasses.dataclass(frozen=True)
class WeightsKind:
    """The storage of a row's weights, and the activations that those in FP8 are multiplied by."""

    storage: WeightsName = "bf16"
    compute: Fp8Compute = "w8a16"

    def __str__(self) -> str:
        return self.storage if self.storage == "bf16" else f"fp8, {self.compute}"


_CPU_TOKENS = 8192
"""More than this in one row would take a CPU minutes."""


PLAIN = WeightsKind()


@dataclasses.dataclass(frozen=True)
class Options:
    """A benchmark's options. A field is the flag of the same name.

    Raises:
      ConfigError: a value out of bounds.
    """

    command: Command
    platform: Literal["cuda", "cpu"] = "cuda"
    model: str = "deepseek_v3"
    attention: Implementation = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    samples: int = 10
    quick: bool = False
    json: Path | None = None
    forms: tuple[FormName, ...] = ("expanded", "absorbed")
    seq: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    cp: tuple[int, ...] = (4, 8)
    mesh: MeshShape = dataclasses.field(default_factory=lambda: MeshShape(tp=8, cp=4))
    meshes: tuple[MeshShape, ...] = ()
    ep_axes: tuple[EpName, ...] = ("tp", "tp,cp")
    weights: tuple[WeightsName, ...] = ("bf16",)
    fp8_compute: tuple[Fp8Compute, ...] = ("w8a8",)
    layers: int | None = None
    long: tuple[int, ...] = ()
    chunk: int = 65536
    shapes: tuple[tuple[int, int], ...] = ()
    tokens: tuple[int, ...] = (1, 4)
    full: bool = False
    profile: Path | None = None
    gb: int = 4
    scratch: Path | None = None
    processes: int = 1
    """Processes on this host that `host` sends a step to, with this one."""
    cluster: ClusterOptions = dataclasses.field(default_factory=ClusterOptions)
    """The processes that `scaling` runs as. Its fields are flags too."""

    def __post_init__(self) -> None:
        check_choice("platform", self.platform, ("cuda", "cpu"))
        check_choice("attention", self.attention, get_args(Implementation))
        check_choice("dtype", self.dtype, ("bfloat16", "float32"))
        check_choice("model", self.model, presets.names())
        for form in self.forms:
            check_choice("forms", form, get_args(FormName))
        for ep in self.ep_axes:
            check_choice("ep_axes", ep, get_args(EpName))
        for weights in self.weights:
            check_choice("weights", weights, get_args(WeightsName))
        for compute in self.fp8_compute:
            check_choice("fp8_compute", compute, get_args(Fp8Compute))
        for field, values, low, high in (
            ("samples", (self.samples,), 1, 1000),
            ("seq", self.seq, 1, 1 << 24),
            ("heads", self.heads, 1, 1024),
            ("cp", self.cp, 2, 1024),
            ("layers", () if self.layers is None else (self.layers,), 1, 1000),
            ("long", self.long, 1, 1 << 24),
            ("chunk", (self.chunk,), 1, 1 << 24),
            ("tokens", self.tokens, 1, 64),
            ("gb", (self.gb,), 1, 10000),
            ("processes", (self.processes,), 1, 64),
        ):
            for value in values:
                if not low <= value <= high:
                    raise ConfigError(field, f"must be whole numbers from {low} to {high}, got {value}.")
        for field, mesh in [("mesh", self.mesh), *(("meshes", mesh) for mesh in self.meshes)]:
            if mesh.dp != 1:
                raise ConfigError(
                    field, f"dp only repeats the same work, got {mesh}. Use tp and cp alone, e.g. tp=8,cp=4."
                )
        check_output("json", self.json)
        if self.scratch is not None and not self.scratch.is_dir():
            raise ConfigError("scratch", f"{self.scratch} is not a directory. Make it first.")
        if self.platform == "cpu":
            self._check_cpu()

    @property
    def weights_kinds(self) -> list[WeightsKind]:
        """The kinds of weights to measure: those in FP8 with each `fp8_compute`."""
        computes: dict[WeightsName, tuple[Fp8Compute, ...]] = {"bf16": ("w8a16",), "fp8": self.fp8_compute}
        return [WeightsKind(storage, compute) for storage in self.weights for compute in computes[storage]]

    def _check_cpu(self) -> None:
        if self.command == "host":
            return
        most = max([*self.seq, *self.long, *(n * context for n, context in self.shapes)], default=0)
        if most > _CPU_TOKENS:
            raise ConfigError(
                "platform",
                f"cpu is there to try the program, and {most} tokens would take it hours. {_SMALL[self.command]}",
            )
        if self.command in ("layer", "model", "scaling", "engine") and self.model != "tiny":
            raise ConfigError("platform", f"{self.model} does not fit a CPU's memory. {_SMALL[self.command]}")


_SMALL: dict[Command, str] = {
    "attention": "Give small sizes: seq=(256,) heads=(2,).",
    "decode": "Give small sizes: heads=(2,), and `shapes` like 4x128.",
    "layer": "Give small sizes: model='tiny' seq=(1024,).",
    "model": "Give small sizes: model='tiny' seq=(1024,) long=(4096,) chunk=2048 layers=2.",
    "scaling": "Give small sizes: model='tiny' seq=(1024,).",
    "engine": "Give small sizes: model='tiny', and `shapes` like 2x64.",
}

_K = 1024
_DEFAULTS: dict[Command, dict[str, Any]] = {
    "attention": {"seq": (8 * _K, 32 * _K, 128 * _K), "heads": (16,)},
    "layer": {"seq": (128 * _K,)},
    "model": {"seq": (8 * _K, 32 * _K, 128 * _K), "long": (256 * _K, 512 * _K, 1024 * _K)},
    "decode": {
        "shapes": ((64, 8 * _K), (8, 128 * _K), (256, 2 * _K), (16, 32 * _K), (1, 128 * _K)),
        "heads": (16, 128),
        "mesh": MeshShape(tp=8),
        "ep_axes": ("tp",),
    },
    "load": {"mesh": MeshShape(tp=2, cp=2), "samples": 3},
    "scaling": {
        "model": "deepseek_v2_lite",
        "seq": (8 * _K, 32 * _K, 128 * _K),
        "forms": ("expanded",),
        "ep_axes": ("tp",),
        "meshes": (MeshShape(), MeshShape(cp=2), MeshShape(tp=2)),
    },
    "engine": {
        "model": "deepseek_v2_lite",
        "shapes": ((1, _K), (8, _K), (64, _K), (8, 32 * _K)),
        "chunk": 8 * _K,
        "ep_axes": ("tp",),
        "meshes": (MeshShape(),),
    },
    "host": {"platform": "cpu", "shapes": tuple((n, 8 * _K) for n in (1, 8, 16, 32, 64)), "samples": 20},
}
_QUICK: dict[Command, dict[str, Any]] = {
    "attention": {"seq": (128 * _K,), "cp": (4,), "samples": 3},
    "layer": {"ep_axes": ("tp",), "forms": ("expanded",), "samples": 3},
    "model": {"seq": (128 * _K,), "long": (), "ep_axes": ("tp",), "forms": ("expanded",), "layers": 8, "samples": 3},
    "decode": {"shapes": ((64, 8 * _K), (8, 128 * _K)), "heads": (16,), "tokens": (1,), "samples": 3},
    "load": {"gb": 1, "samples": 1},
    "host": {"shapes": ((1, 8 * _K), (64, 8 * _K)), "samples": 3},
    "scaling": {"seq": (32 * _K,), "samples": 3},
    "engine": {"shapes": ((1, _K), (64, _K))},
}

_CLUSTER = frozenset(field.name for field in dataclasses.fields(ClusterOptions))
_FULL_ONLY = ("mesh", "ep_axes", "layers", "weights", "fp8_compute")
"""Settings of `decode` that only `--full` uses."""


def make(command: Command, *, quick: bool = False, **given: Any) -> Options:
    """A command's options: what was given, else its defaults. The fields of `ClusterOptions` may be given too.

    Raises:
      ConfigError: as `Options` and `ClusterOptions`.
    """
    if cluster := {name: given.pop(name) for name in _CLUSTER & given.keys()}:
        given["cluster"] = ClusterOptions(**cluster)
    full_only = [name for name in _FULL_ONLY if name in given]
    if command == "decode" and full_only and not given.get("full"):
        raise ConfigError(full_only[0], "is for the whole decode step. Add `full`, or leave it out.")
    defaults = _DEFAULTS[command] | (_QUICK[command] if quick else {})
    return Options(command=command, quick=quick, **(defaults | given))
