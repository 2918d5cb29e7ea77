"""`ParamFactory`: declares the parameters of modules: their shapes, dtypes and shardings."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jax_mla_cp.model.build import Build
from jax_mla_cp.model.fp8 import Fp8
from jax_mla_cp.model.fp8_blocks import why_dequantized

Spec = tuple[str | tuple[str, ...] | None, ...]


class ParamFactory:
    """Makes `nnx.Param`s whose values are `jax.ShapeDtypeStruct`s: a checkpoint's loader fills them.

    A parameter's metadata: `spec`, its PartitionSpec; `quantized`, whether a checkpoint may have it quantized; `dequantized`, the
    reason if it can't stay in FP8 though the build says so; `whole`, as below; `dims`, of a matrix: the others are of layers and
    experts.

    Args:
      layers: gives every parameter a leading dimension [layers], for a `LayerStack`. Under its `lax.scan` each layer gets
        its slice of a parameter, except of those that a kernel of ours may read from the whole stack (`whole`): XLA copies the slice
        that such a kernel is given, which for experts would be gigabytes a layer.
    """

    def __init__(self, build: Build, layers: int | None = None):
        self.build = build
        self.layers = layers

    def __call__(
        self, *shape: int, spec: Spec = (), dtype: jnp.dtype | None = None, whole: bool = False
    ) -> nnx.Param[Any]:
        """A parameter in `dtype`, by default the model's, divided over the mesh as `spec` says."""
        return self._param(shape, spec, dtype or self.build.dtype, whole=whole)

    def matrix(
        self, *shape: int, spec: Spec = (), experts: bool = False, reordered: Iterable[range] = ()
    ) -> nnx.Param[Any] | Fp8:
        """A matrix that a checkpoint may have quantized, as it has it: [N outputs, K inputs], [E, ..] of experts.

        [2, F, K] are gate and up, a matrix of `2 F` outputs.

        Args:
          reordered: ranges of outputs within which the loader changes the order.
        """
        quantization = self.build.config.quantization
        inner = shape[1:] if experts else shape
        plain = functools.partial(self._param, shape, spec, self.build.dtype, whole=True, dims=len(inner))
        if quantization is None or (quantization.experts_only and not experts):
            return plain()
        if not self.build.fp8:
            return plain(quantized=True)
        ways = tuple(self.build.axes.size(axes or ()) for axes in spec) or (1,) * len(shape)
        if reason := why_dequantized(inner, ways, quantization.block, reordered):
            return plain(quantized=True, dequantized=reason)
        scales = (*shape[:-2], *quantization.scales(shape[-2:]))
        return Fp8(
            self._param(shape, spec, jnp.dtype(jnp.uint8), whole=True, quantized=True),
            self._param(scales, spec, jnp.dtype(quantization.scale_dtype), whole=True, quantized=True),
            quantization.block,
            self.build.dtype,
            dims=len(inner),
        )

    def per_head(self, *shape: int, spec: Spec = ()) -> nnx.Param[Any]:
        """Matrices [heads, N, K] of which each head multiplies with its own, in two directions: never in FP8."""
        quantization = self.build.config.quantization
        quantized = quantization is not None and not quantization.experts_only
        return self._param(shape, spec, self.build.dtype, quantized=quantized)

    def _param(
        self,
        shape: tuple[int, ...],
        spec: Spec,
        dtype: jnp.dtype,
        *,
        whole: bool = False,
        dims: int | None = None,
        quantized: bool = False,
        dequantized: str = "",
    ) -> nnx.Param[Any]:
        if self.layers is not None:
            shape, spec = (self.layers, *shape), (None, *spec)
        return nnx.Param(
            jax.ShapeDtypeStruct(shape, dtype),
            spec=PartitionSpec(*spec),
            whole=whole,
            dims=dims,
            quantized=quantized,
            dequantized=dequantized,
        )


def dequantized_matrices(declared: nnx.State[Any, Any]) -> dict[str, list[str]]:
    """The matrices that can't stay in FP8 though the build says so: their names, by the reason."""
    found: dict[str, list[str]] = {}
    for path, param in nnx.to_flat_state(declared):
        if reason := param.get_metadata("dequantized"):
            found.setdefault(reason, []).append(".".join(map(str, path)))
    return found
