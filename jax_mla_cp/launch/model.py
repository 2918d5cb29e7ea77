"""From a model directory to weights on a mesh, and a tokenizer."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_mla_cp import extension, platform
from jax_mla_cp.attention import Implementation, resolve_implementation
from jax_mla_cp.checkpoint import (
    ConvertedCheckpoint,
    SafetensorsSource,
    is_converted,
    load_converted,
    load_params,
    open_converted,
)
from jax_mla_cp.config.errors import ConfigError, check_choice
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import Fp8Compute, Weights
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.launch.devices import Devices
from jax_mla_cp.launch.options import Dtype, EpAxes, LaunchOptions
from jax_mla_cp.mesh import mesh_shape
from jax_mla_cp.model.build import EP_CHOICES, Build
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.grouped_matmul import resolve_grouped_matmul
from jax_mla_cp.model.loaded_model import Model, weight_bytes
from jax_mla_cp.model.params import dequantized_matrices
from jax_mla_cp.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_WEIGHTS_FRACTION = 0.7
"""The share of a device's memory at which `ep_axes="auto"` stops trying to keep the experts on fewer axes."""


def load(
    model: str | Path | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    fp8_compute: Literal["auto"] | Fp8Compute = "auto",
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
        except for the few that can't be (docs/checkpoints.md); "auto": "fp8" on GPUs, else "bf16".
      fp8_compute: what matrices in FP8 are multiplied by. "w8a16": activations in `dtype`; "w8a8": of many tokens, activations
        quantized to FP8 too, which changes results as the checkpoint's own recipe does (docs/checkpoints.md); "auto": "w8a8" where
        that is the recipe (`activation_scheme: dynamic`) and the kernel for it runs, else "w8a16".
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
    build = plan_build(
        config,
        mesh,
        dtype=dtype,
        weights=weights,
        fp8_compute=fp8_compute,
        ep_axes=ep_axes,
        attention=attention,
        mtp=mtp,
    )
    declared = nnx.state(Decoder(build))
    for reason, names in dequantized_matrices(declared).items():
        _log.info("these can't stay in FP8 and are dequantized, because %s: %s", reason, ", ".join(names))
    if build.fp8 and build.grouped_matmul == "pallas":
        _log.warning("FP8 is dequantized before every product, and decoding slow: %s", extension.cuda_problem())
    if converted:
        params = load_converted(converted, declared, config, mesh, progress=progress)
    else:
        params = load_params(SafetensorsSource(directory), declared, config, mesh, progress=progress)
    return Model(params, build, mesh), tokenizer


def read_config(directory: Path) -> tuple[ConvertedCheckpoint | None, ModelConfig]:
    """Reads a model directory's manifest, if it is a converted checkpoint, and its config.

    Raises:
      ConfigError, CheckpointError: the directory is no model, or a conversion that is not complete.
    """
    # A converted checkpoint is checked, its config.json included, before anything in it is believed.
    converted = open_converted(directory) if is_converted(directory) else None
    return converted, ModelConfig.from_dir(directory)


def _open(directory: Path) -> tuple[ConvertedCheckpoint | None, ModelConfig, Tokenizer | None]:
    """Opens a model directory: `read_config`, and its tokenizer.

    The config's stop tokens are those of config.json, generation_config.json and the tokenizer, for all that generate.
    """
    converted, config = read_config(directory)
    tokenizer = Tokenizer.from_dir(directory, config.vocab_size)
    end = None if tokenizer is None else tokenizer.eos_token_id
    if end is not None and end not in config.eos_token_ids:
        config = dataclasses.replace(config, eos_token_ids=(*config.eos_token_ids, end))
    return converted, config, tokenizer


def plan_build(
    config: ModelConfig,
    mesh: Mesh | None,
    *,
    dtype: Dtype,
    weights: Weights = "auto",
    fp8_compute: Literal["auto"] | Fp8Compute = "auto",
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
    check_choice("fp8_compute", fp8_compute, ("auto", *get_args(Fp8Compute)))
    check_choice("ep_axes", ep_axes, get_args(EpAxes))
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    fp8 = weights == "fp8" or (weights == "auto" and config.quantization is not None and jax.default_backend() == "gpu")
    kernels = resolve_grouped_matmul()
    if fp8_compute == "auto":
        recipe = config.quantization is not None and config.quantization.multiplies_in_fp8
        fp8_compute = "w8a8" if fp8 and recipe and kernels == "hopper" else "w8a16"
    shape = None if mesh is None else mesh_shape(mesh)
    implementation = resolve_implementation(attention, config, dtype)
    builds = [
        Build(
            config,
            shape,
            EP_CHOICES[name],
            jnp.dtype(dtype),
            attention=implementation,
            grouped_matmul=kernels,
            fp8=fp8,
            fp8_compute=fp8_compute,
            mtp=mtp,
        )
        for name in ([ep_axes] if ep_axes != "auto" else [name for name in EP_CHOICES if name != "none"])
    ]
    available = platform.device_memory() * _WEIGHTS_FRACTION
    fitting = [build for build in builds if weight_bytes(build) <= available]
    return fitting[0] if fitting else builds[-1]


def config_and_tokenizer(model: Path | None) -> tuple[ModelConfig, Tokenizer | None]:
    """Reads a model directory's config and tokenizer, without its weights. The tokenizer is None if there is none.

    Raises:
      ConfigError: as `load`.
    """
    _, config, tokenizer = _open(DIRECTORY if model is None else model)
    return config, tokenizer


def load_model(options: LaunchOptions, devices: Devices) -> tuple[Model, Tokenizer | None]:
    """Loads the weights onto the mesh of `set_up_devices`.

    Raises:
      ConfigError: as `load`.
    """
    try:
        return load(
            options.model,
            mesh=devices.mesh,
            dtype=options.dtype,
            weights=options.weights,
            fp8_compute=options.fp8_compute,
            ep_axes=options.ep_axes,
            attention=options.attention,
            mtp=options.speculative == "mtp",
        )
    except ConfigError as error:
        if error.field == "mtp":
            raise ConfigError("speculative", error.message) from error
        raise
