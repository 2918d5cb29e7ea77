"""The compiled extension `jax_mla_cp._ffi` (ffi/): loading it, calling its targets, and the reason why its CUDA kernels can't run."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.mesh import vary_like


@functools.cache
def load() -> Any:
    """Imports the extension and registers its targets with JAX.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        from jax_mla_cp import _ffi
    except ImportError as error:
        raise ConfigError(
            "attention",
            f"the extension jax_mla_cp._ffi can't be loaded ({error}). Install the package again where a C++ compiler "
            "is present; for the CUDA kernels with nvcc and JAX_MLA_CP_CUDA=1 (README.md, On GPUs)",
        ) from error
    for platform, targets in _ffi.registrations().items():
        for name, handler in targets.items():
            jax.ffi.register_ffi_target(name, handler, platform=platform)
    return _ffi


def call(
    target: str, results: Any, *operands: jax.typing.ArrayLike, aliases: dict[int, int] | None = None, **attributes: Any
) -> Any:
    """Calls a target. Its results vary over the mesh axes that any operand varies over.

    JAX types a custom call's results as equal on all devices, whatever its operands. Left so, check_vma would accept a program that
    takes one device's numbers for all devices'.

    Args:
      results: jax.ShapeDtypeStructs.
      operands: arrays.
      aliases: operands whose memory a result takes, by their numbers.
      attributes: NumPy scalars of the handler's types.

    Raises:
      ConfigError: the extension is not installed.
      XlaRuntimeError: when it runs, if shapes, dtypes or sizes don't fit; names the argument, expected and got.
    """
    load()
    run: Any = jax.ffi.ffi_call(target, results, input_output_aliases=aliases)
    return vary_like(run(*operands, **attributes), operands)


def index_operand(index: Int32[Array, ""] | int) -> Int32[Array, " 1"]:
    """An index as the targets take it."""
    return lax.convert_element_type(index, jnp.int32).reshape(1)


def cuda_problem() -> str | None:
    """The reason why the CUDA kernels can't run on this machine's devices, and what to do; None if they can."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"its kernels need a Hopper GPU, JAX runs on {device.platform}. Install with the extra cuda13 or cuda12 (README.md, On GPUs)"
    capability = getattr(device, "compute_capability", "unknown")
    if capability != "9.0":
        return f"its kernels are for compute capability 9.0 (Hopper), {device.device_kind} has {capability}"
    try:
        module = load()
    except ConfigError as error:
        return error.message
    return driver_problem(module.built_for_cuda(), module.driver_cuda())


def driver_problem(built: int, driver: int) -> str | None:
    """The reason why a driver can't run a build for a CUDA version, or None; versions are 1000 major + 10 minor."""
    if not built:
        return (
            "this installation was built without CUDA. Install again with nvcc (CUDA 12.3 or newer) on the PATH and "
            "JAX_MLA_CP_CUDA=1 (README.md, On GPUs)"
        )
    if driver // 1000 < built // 1000:  # within a major version, older drivers run newer builds
        return (
            f"it was built for CUDA {_dotted(built)}, this machine's NVIDIA driver runs CUDA {_dotted(driver)}. "
            f"Update the driver, or install again with the nvcc of CUDA {driver // 1000}"
        )
    return None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
