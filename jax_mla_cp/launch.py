"""From a model directory (or the built-in model) to a runner: weights on the mesh, tokenizer, cache and compiled steps.

`load` is the library's entry. `LaunchOptions` and the functions that take it are what the programs share.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_mla_cp import platform
from jax_mla_cp.attention import Implementation, resolve_implementation
from jax_mla_cp.batch.form import Form
from jax_mla_cp.checkpoint import (
    ConvertedCheckpoint,
    SafetensorsSource,
    is_converted,
    load_converted,
    load_params,
    open_converted,
)
from jax_mla_cp.config.errors import ConfigError, check_choice, check_whole
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import Weights
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.mesh import MeshShape, make_mesh, mesh_shape
from jax_mla_cp.model.build import EP_CHOICES, Build
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.grouped_matmul import resolve_grouped_matmul
from jax_mla_cp.model.loaded_model import Model, weight_bytes
from jax_mla_cp.platform import Platform
from jax_mla_cp.step.cache_sizing import create_runner
from jax_mla_cp.step.planner import MAX_DRAFT_TOKENS
from jax_mla_cp.step.runner import Runner
from jax_mla_cp.tokenizer import Tokenizer

__all__ = [
    "Dtype",
    "EpAxes",
    "LaunchOptions",
    "Runner",
    "Speculative",
    "config_and_tokenizer",
    "load",
    "load_model",
    "make_runner",
    "plan_build",
    "set_up_devices",
]

EpAxes = Literal["auto", "tp", "tp,cp", "tp,cp,dp"]
Dtype = Literal["auto", "float32", "bfloat16"]
Speculative = Literal["off", "mtp"]

_WEIGHTS_FRACTION = 0.7
"""The share of a device's memory at which `ep_axes="auto"` stops trying to keep the experts on fewer axes."""
_INT32_MAX = 2**31 - 1
"""Token and page counts are int32 on the device."""


def load(
    model: str | Path | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    ep_axes: EpAxes = "auto",
    attention: Implementation = "auto",
    mtp: bool = False,
    progress: bool | None = None,
) -> tuple[Model, Tokenizer | None]:
    """Loads a model onto a mesh made by `make_mesh`, or onto one device.

    Args:
      model: a Hugging Face model directory, or what `python -m jax_mla_cp.checkpoint convert` made of one; None is the
        built-in model (jax_mla_cp/default_model).
      dtype: of weights, activations and cache; "auto" is float32 on CPU and bfloat16 on GPUs.
      weights: of a quantized checkpoint. "bf16": dequantized while loading, to `dtype`; "fp8": kept in FP8 in device memory,
        and dequantized by every use; "auto": "fp8" on GPUs, else "bf16".
      ep_axes: the mesh axes that divide the experts; "auto" takes the fewest whose weights fit the memory.
      attention: "auto" is the fastest that runs here.
      mtp: with the checkpoint's layer for multi-token prediction, for `Planner.create(.., draft_tokens=..)`.
      progress: a bar on stderr; None: if that is a terminal.

    Returns: the model, and its tokenizer, or None if the directory has none that `Tokenizer.from_dir` reads.

    Raises:
      ConfigError: the directory, the config, the mesh, a parameter or the checkpoint's tensors don't fit.
    """
    directory = DIRECTORY if model is None else Path(model)
    converted, config, tokenizer = _open(directory)
    if converted:
        weights = converted.resolve_weights(weights)
    build = plan_build(config, mesh, dtype=dtype, weights=weights, ep_axes=ep_axes, attention=attention, mtp=mtp)
    declared = nnx.state(Decoder(build))
    if converted:
        params = load_converted(converted, declared, config, mesh, progress=progress)
    else:
        params = load_params(SafetensorsSource(directory), declared, config, mesh, progress=progress)
    return Model(params, build, mesh), tokenizer


def _open(directory: Path) -> tuple[ConvertedCheckpoint | None, ModelConfig, Tokenizer | None]:
    """A directory's manifest, if it is a converted checkpoint, its config and its tokenizer."""
    # A converted checkpoint is checked, its config.json included, before anything in it is believed.
    converted = open_converted(directory) if is_converted(directory) else None
    config = ModelConfig.from_dir(directory)
    return converted, config, Tokenizer.from_dir(directory, config.vocab_size)


def plan_build(
    config: ModelConfig,
    mesh: Mesh | None,
    *,
    dtype: Dtype,
    weights: Weights = "auto",
    ep_axes: EpAxes,
    attention: Implementation,
    mtp: bool = False,
) -> Build:
    """Makes what is static about a model on a mesh, before any weight is read.

    Raises:
      ConfigError: as `load`.
    """
    check_choice("dtype", dtype, get_args(Dtype))
    check_choice("weights", weights, get_args(Weights))
    check_choice("ep_axes", ep_axes, get_args(EpAxes))
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    fp8 = weights == "fp8" or (weights == "auto" and config.quantization is not None and jax.default_backend() == "gpu")
    shape = None if mesh is None else mesh_shape(mesh)
    implementation = resolve_implementation(attention, config, dtype)
    builds = [
        Build(
            config,
            shape,
            EP_CHOICES[name],
            jnp.dtype(dtype),
            attention=implementation,
            grouped_matmul=resolve_grouped_matmul(),
            fp8=fp8,
            mtp=mtp,
        )
        for name in ([ep_axes] if ep_axes != "auto" else EP_CHOICES)
    ]
    available = platform.device_memory() * _WEIGHTS_FRACTION
    fitting = [build for build in builds if weight_bytes(build) <= available]
    return fitting[0] if fitting else builds[-1]


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """Model, devices, cache and schedule: the options that the programs share. A field is the flag of the same name.

    Raises:
      ConfigError: a number out of bounds, or options that exclude each other. The functions that take the other named choices
        check them: `load`, `Planner.create`, `platform.setup`.
    """

    model: Path | None = None
    """Model directory. None: the built-in model."""
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    platform: Platform = "auto"
    dtype: Dtype = "auto"
    weights: Weights = "auto"
    ep_axes: EpAxes = "auto"
    attention: Implementation = "auto"
    form: Form = "auto"
    page_size: int = 64
    kv_pages: int | None = None
    """Pages per dp group. None: what `memory_fraction` allows."""
    memory_fraction: float | None = None
    """None: `platform.default_memory_budget`."""
    prefill_chunk: int = 2048
    max_model_len: int | None = None
    """None: the smaller of the model's length and what the pages hold."""
    max_running: int = 32
    speculative: Speculative = "off"
    draft_tokens: int | None = None
    """None: 1 with speculation. DeepSeek-V3's layer is trained to guess one token, and 85 to 90% of these are right
    (arXiv:2412.19437, section 5.4.3); those after it are right less often, and each costs a pass of the layer."""
    compile_cache: str = "auto"
    """A directory, "auto" (`platform.default_compile_cache`) or "off"."""

    def __post_init__(self) -> None:
        check_choice("speculative", self.speculative, get_args(Speculative))
        check_whole("page_size", self.page_size, 1, 65536)
        check_whole("prefill_chunk", self.prefill_chunk, 1, _INT32_MAX)
        check_whole("max_running", self.max_running, 1, 4096)
        if self.kv_pages is not None:
            check_whole("kv_pages", self.kv_pages, 1, _INT32_MAX)
        if self.max_model_len is not None:
            check_whole("max_model_len", self.max_model_len, 2, _INT32_MAX)  # a prompt token and a sampled one
        fraction = self.memory_fraction
        if fraction is not None and not (math.isfinite(fraction) and 0 < fraction <= 1):
            raise ConfigError("memory_fraction", f"must be above 0 and at most 1, got {fraction}. Try 0.9.")
        if not self.compile_cache:
            raise ConfigError("compile_cache", "must be a directory, auto or off, got ''.")
        if self.draft_tokens is not None:
            if self.speculative == "off":
                raise ConfigError("draft_tokens", "without speculation there are no drafts. Add speculative='mtp'.")
            check_whole("draft_tokens", self.draft_tokens, 1, MAX_DRAFT_TOKENS)
        elif self.speculative == "mtp":
            object.__setattr__(self, "draft_tokens", 1)

    @property
    def model_name(self) -> str:
        """The model directory's name, without spaces."""
        name = "" if self.model is None else "-".join(self.model.resolve().name.split())
        return name or "jax-mla-cp-tiny"


def set_up_devices(options: LaunchOptions) -> Literal["cpu", "cuda"]:
    """Starts the platform with as many devices as the mesh needs, and the compile cache. Call it before JAX's first use.

    Returns: the platform.

    Raises:
      ConfigError: as `platform.setup` and `platform.enable_compile_cache`.
    """
    used = platform.setup(options.platform, options.mesh.devices)
    if options.compile_cache != "off":
        auto = options.compile_cache == "auto"
        platform.enable_compile_cache(platform.default_compile_cache() if auto else options.compile_cache)
    return used


def config_and_tokenizer(model: Path | None) -> tuple[ModelConfig, Tokenizer | None]:
    """Reads a model directory's config and tokenizer, without its weights. The tokenizer is None if there is none.

    Raises:
      ConfigError: as `load`.
    """
    _, config, tokenizer = _open(DIRECTORY if model is None else model)
    return config, tokenizer


def load_model(options: LaunchOptions) -> tuple[Model, Tokenizer | None]:
    """Loads the weights onto the mesh, after `set_up_devices`.

    Raises:
      ConfigError: as `load`.
    """
    try:
        return load(
            options.model,
            mesh=make_mesh(options.mesh),
            dtype=options.dtype,
            weights=options.weights,
            ep_axes=options.ep_axes,
            attention=options.attention,
            mtp=options.speculative == "mtp",
        )
    except ConfigError as error:
        if error.field == "mtp":
            raise ConfigError("speculative", error.message) from error
        raise


def make_runner(model: Model, options: LaunchOptions) -> Runner:
    """Makes the cache and the runner for a model of `load_model`.

    Raises:
      ConfigError: as `create_runner`.
    """
    return create_runner(
        model,
        page_size=options.page_size,
        kv_pages=options.kv_pages,
        memory_fraction=options.memory_fraction,
        prefill_chunk=options.prefill_chunk,
        max_model_len=options.max_model_len,
        max_running=options.max_running,
        form=options.form,
        draft_tokens=options.draft_tokens or 0,
    )
