"""`ParamFactory`: declares the parameters of modules: their shapes, dtypes and shardings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jax_mla_cp.config.quantization import Quantization
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.fp8 import Fp8


class ParamFactory:
    """Makes `nnx.Param`s whose values are `jax.ShapeDtypeStruct`s: a checkpoint's loader fills them.

    A parameter's metadata: `spec`, its PartitionSpec; `blocks`, the elements of a quantized matrix that share a scale, along
    each dimension; `whole`, as below.

    Args:
      layers: gives every parameter a leading dimension [layers], for a `LayerStack`. Under its `lax.scan` each layer gets
        its slice of a parameter, but all layers' weights of experts (`whole`): XLA copies the slice that a kernel of ours
        is given, which for experts would be gigabytes a layer.
    """

    def __init__(self, build: Build, layers: int | None = None):
        self.build = build
        self.layers = layers

    def __call__(
        self,
        *shape: int,
        spec: tuple[str | tuple[str, ...] | None, ...] = (),
        dtype: jnp.dtype | None = None,
    ) -> nnx.Param[Any]:
        """A parameter in `dtype`, by default the model's, divided over the mesh as `spec` says."""
        return self._param(shape, spec, dtype or self.build.dtype, experts=False)

    def matrix(
        self,
        *shape: int,
        blocks: tuple[int, ...],
        spec: tuple[str | tuple[str, ...] | None, ...] = (),
        experts: bool = False,
    ) -> nnx.Param[Any] | Fp8:
        """A matrix that a checkpoint may have quantized: [inputs, ...outputs], of experts [E, inputs, outputs].

        Args:
          blocks: the dimensions along which its scales stay one per block; the last one is of outputs, others of inputs.
            Not a dimension that the mesh divides, or that is a part of the stored one, as heads are: blocks would be cut.
        """
        quantization = self.build.config.quantization
        if quantization is None or (quantization.experts_only and not experts):
            return self._param(shape, spec, self.build.dtype, experts)
        sizes = _block_sizes(len(shape), blocks, quantization)
        if not self.build.fp8:
            return self._param(shape, spec, self.build.dtype, experts, sizes)
        scales = tuple(-(-size // block) for size, block in zip(shape, sizes, strict=True))
        q = self._param(shape, spec, jnp.dtype(jnp.uint8), experts, sizes)
        return Fp8(
            q, self._param(scales, spec, jnp.dtype(quantization.scale_dtype), experts, sizes), sizes, self.build.dtype
        )

    def _param(
        self,
        shape: tuple[int, ...],
        spec: tuple[str | tuple[str, ...] | None, ...],
        dtype: jnp.dtype,
        experts: bool,
        blocks: tuple[int, ...] = (),
    ) -> nnx.Param[Any]:
        if self.layers is not None:
            shape, spec, blocks = (self.layers, *shape), (None, *spec), (1, *blocks) if blocks else ()
        value = jax.ShapeDtypeStruct(shape, dtype)
        return nnx.Param(value, spec=PartitionSpec(*spec), whole=experts, blocks=blocks)


def _block_sizes(dims: int, blocks: tuple[int, ...], quantization: Quantization) -> tuple[int, ...]:
    outputs, inputs = quantization.block
    return tuple((outputs if dim == dims - 1 else inputs) if dim in blocks else 1 for dim in range(dims))
