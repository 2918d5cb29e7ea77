"""`Model`: a model's weights on a mesh, and the static configuration of the programs that run them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import MeshShape, spec_axes
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.decoder import Decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A pytree: pass it to your own `jax.jit`. Its leaves are the weights."""

    params: Any
    """nnx.State of `Decoder`: sharded arrays, whose names and shapes `Decoder` declares."""
    build: Build = dataclasses.field(metadata={"static": True})
    mesh: Mesh | None = dataclasses.field(metadata={"static": True})

    @property
    def config(self) -> ModelConfig:
        return self.build.config

    def decoder(self, params: Any) -> Decoder:
        """The NNX module with these parameters; inside `shard_map`, with this device's part of them."""
        return nnx.merge(nnx.graphdef(Decoder(self.build)), params)


def param_specs(params: Any) -> Any:
    """The PartitionSpec of each parameter, as a tree for `shard_map`'s in_specs."""
    return jax.tree.map(lambda p: p.get_metadata("spec"), params, is_leaf=lambda p: isinstance(p, nnx.Variable))


def weight_bytes(build: Build) -> int:
    """Bytes of the weights that one device holds."""
    return sum(_bytes_by_path(build).values())


def expert_bytes(build: Build) -> int:
    """Bytes of the routed experts' matrices that one device holds."""
    paths = _bytes_by_path(build).items()
    return sum(size for path, size in paths if path[:2] == ("moe", "mlp") and path[2] in ("gate_up", "down"))


def _bytes_by_path(build: Build) -> dict[tuple[Any, ...], int]:
    """By a parameter's path in `Decoder`: the bytes that one device holds of it."""
    shape = build.shape or MeshShape()
    sizes = {}
    for path, param in nnx.to_flat_state(nnx.state(Decoder(build))):
        value = param.get_value()
        ways = int(np.prod([getattr(shape, axis) for axis in spec_axes(param.get_metadata("spec"))]))
        sizes[path] = int(np.prod(value.shape)) * value.dtype.itemsize // ways
    return sizes
