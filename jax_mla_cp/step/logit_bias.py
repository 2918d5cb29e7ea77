"""Logit biases (`jax_mla_cp.batch.logit_bias`) on the devices: dense arrays over the vocabulary, for every place.

The arrays have the same shapes in every step, so one program serves steps with and without biases; it begins with a
`lax.cond`. A step without biases is given the same neutral arrays each time, and nothing is transferred. For a step with
biases, a small program of its own makes the arrays: it is sent the listed tokens of all requests, filled up to one of few
lengths, and each device keeps those of its places. Masks are sent whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32
from numpy.typing import NDArray

from jax_mla_cp.batch.shapes import BatchShape
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.mesh import TOKENS, Axes, on_devices, vary_like
from jax_mla_cp.model.loaded_model import Model

_SHORTEST_LIST, _FACTOR = 256, 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitBiasArrays:
    """`LogitBias` of each of a device's `J` places; all P(("dp", "cp"))."""

    add: Float32[Any, "J V"]
    scale: Float32[Any, "J V"]
    mask: UInt32[Any, "J V/32"]
    """A word for each 32 tokens, rounded up."""
    biased: Bool[Any, " J"]
    """The place has a bias."""


def apply_logit_bias(
    logits: Float[Array, "J V"], logprobs: Float[Array, "J V"], bias: LogitBiasArrays
) -> Float[Array, "J V"]:
    """The biased logits of places that have a bias, the log-probabilities of the others."""

    def change(logits: jax.Array, logprobs: jax.Array, bias: LogitBiasArrays) -> jax.Array:
        x = jnp.where(logits > 0, logits / bias.scale, logits * bias.scale) + bias.add
        allowed = (bias.mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        allowed = lax.collapse(allowed, 1, 3)[:, : logits.shape[1]]
        return jnp.where(bias.biased[:, None], jnp.where(allowed == 1, x, -jnp.inf), logprobs)

    def keep(logits: jax.Array, logprobs: jax.Array, bias: LogitBiasArrays) -> jax.Array:
        return vary_like(logprobs, logits, bias)

    return lax.cond(bias.biased.any(), change, keep, logits.astype(jnp.float32), logprobs, bias)


def shapes(model: Model, shape: BatchShape) -> LogitBiasArrays:
    """The arrays as jax.ShapeDtypeStruct."""
    places, vocabulary = shape.dp * shape.max_requests * shape.samples_per_request, model.config.vocab_size
    sharding = None if model.mesh is None else NamedSharding(model.mesh, PartitionSpec(TOKENS))

    def struct(dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((places, *more), dtype, sharding=sharding)

    words = -(-vocabulary // 32)
    return LogitBiasArrays(
        struct(jnp.float32, vocabulary), struct(jnp.float32, vocabulary), struct(jnp.uint32, words), struct(jnp.bool_)
    )


def device_bytes(model: Model, shape: BatchShape) -> int:
    """Bytes of the arrays on a device: the neutral ones and a step's."""
    return 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes(model, shape))) // (shape.dp * shape.cp)


@dataclasses.dataclass(frozen=True)
class HostBias:
    """A step's logit biases on the host, for all places, of which `LogitBiasBuilder.place` makes the devices' arrays."""

    biased: Bool[np.ndarray, " J"]
    """The place has a bias."""
    mask: UInt32[np.ndarray, "J V/32"] | None
    """None: no place has a mask."""
    entries: Int32[np.ndarray, "4 N"] | None
    """Place, token, add and scale of each listed token, floats by their bits; filled up with places that no device has. None:
    no token is listed."""


class LogitBiasBuilder:
    """Makes a step's `LogitBiasArrays`."""

    def __init__(self, model: Model, shape: BatchShape):
        self._model, self._shape = model, shape
        self._programs: dict[int, jax.stages.Compiled] = {}
        like = shapes(model, shape)

        def neutral() -> LogitBiasArrays:
            return LogitBiasArrays(
                jnp.zeros(like.add.shape, jnp.float32),
                jnp.ones(like.scale.shape, jnp.float32),
                jnp.full(like.mask.shape, 0xFFFFFFFF, jnp.uint32),
                jnp.zeros(like.biased.shape, jnp.bool_),
            )

        shardings = None if model.mesh is None else jax.tree.map(lambda x: x.sharding, like)
        self.neutral: LogitBiasArrays = jax.jit(neutral, out_shardings=shardings)()
        """Arrays that change no logit."""

    def collect(self, groups: Sequence[Sequence[StepRequest]]) -> HostBias | None:
        """The biases of requests that `check_requests` has passed, one list per dp group. None: there are none."""
        biases = [
            ((group * self._shape.max_requests + i) * self._shape.samples_per_request, request.logit_bias)
            for group, requests in enumerate(groups)
            for i, request in enumerate(requests)
            if request.logit_bias is not None
        ]
        if not biases:
            return None
        rows = np.array([row for row, _ in biases])
        biased = np.zeros(self.neutral.biased.shape, np.bool_)
        biased[rows] = True
        mask = entries = None
        masks = [(row, bias.mask) for row, bias in biases if bias.mask is not None]
        if masks:
            mask = np.full(self.neutral.mask.shape, 0xFFFFFFFF, np.uint32)
            mask[[row for row, _ in masks]] = [words for _, words in masks]
        counts = np.array([len(bias.tokens) for _, bias in biases])
        if counts.any():
            entries = self._entries(
                np.repeat(rows, counts),
                *(np.concatenate([getattr(a, name) for _, a in biases]) for name in ("tokens", "add", "scale")),
            )
        return HostBias(biased, mask, entries)

    def place(self, bias: HostBias | None) -> LogitBiasArrays:
        """The arrays on this process's devices. Every process must pass the same biases."""
        if bias is None:
            return self.neutral
        mesh = self._model.mesh
        arrays: dict[str, Any] = {"biased": bias.biased} | ({} if bias.mask is None else {"mask": bias.mask})
        arrays = on_devices(arrays, {name: PartitionSpec(TOKENS) for name in arrays}, mesh)
        if bias.entries is not None:
            program = self._program(bias.entries.shape[1])
            arrays["add"], arrays["scale"] = program(on_devices(bias.entries, PartitionSpec(), mesh))
        return dataclasses.replace(self.neutral, **arrays)

    def warmup(self) -> None:
        """Compiles the programs for all lengths of lists."""
        length = _SHORTEST_LIST
        self._program(length)
        while length < self.neutral.add.size:
            length *= _FACTOR
            self._program(length)

    def _entries(
        self, row: NDArray[Any], token: NDArray[Any], add: NDArray[Any], scale: NDArray[Any]
    ) -> NDArray[np.int32]:
        """`HostBias.entries`, of one of few lengths."""
        length = _SHORTEST_LIST
        while length < len(row):
            length *= _FACTOR
        entries = np.full((4, length), len(self.neutral.biased), np.int32)
        columns = row, token, add.astype(np.float32).view(np.int32), scale.astype(np.float32).view(np.int32)
        for out, values in zip(entries, columns, strict=True):
            out[: len(values)] = values
        return entries

    def _program(self, length: int) -> jax.stages.Compiled:
        if length not in self._programs:
            mesh, axes = self._model.mesh, self._model.build.axes
            ways = self._shape.dp * self._shape.cp
            run: Callable[..., Any] = functools.partial(
                _scatter, axes=axes, shape=(len(self.neutral.biased) // ways, self.neutral.add.shape[1])
            )
            sharding = None
            if mesh is not None:
                run = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(TOKENS))
                sharding = NamedSharding(mesh, PartitionSpec())
            entries = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=sharding)
            self._programs[length] = jax.jit(run).lower(entries).compile()
        return self._programs[length]


def _scatter(entries: Int32[Array, "4 N"], *, axes: Axes, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """(add, scale) of this device's places."""
    row = entries[0] - axes.index(TOKENS) * shape[0]
    at = jnp.where(row < 0, shape[0], row), entries[1]
    add, scale = (lax.bitcast_convert_type(bits, jnp.float32) for bits in entries[2:])
    return (
        vary_like(jnp.zeros(shape), row).at[at].set(add, mode="drop"),
        vary_like(jnp.ones(shape), row).at[at].set(scale, mode="drop"),
    )
