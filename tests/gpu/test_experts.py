"""The experts on a Hopper GPU: the Pallas kernel against float64, memory that nobody wrote, the layer against CPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_mla_cp.model.build import Build
from jax_mla_cp.model.experts import apply_experts
from jax_mla_cp.model.grouped_matmul import (
    GroupedMatmul,
    group_alignment,
    grouped_matmul,
    resolve_grouped_matmul,
)
from jax_mla_cp.model.moe import Moe
from jax_mla_cp.model.params import ParamFactory
from tests.helpers.synthetic import CONFIG

multiply = jax.jit(functools.partial(grouped_matmul, implementation="hopper"))


def random_bfloat16(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(size=s, scale=0.5), jnp.bfloat16) for s in shapes]


@pytest.mark.parametrize(
    "sizes",
    [[70, 0, 190, 20], [0] * 4, [0, 1000, 0, 0], [128, 128, 0, 256], [1, 1, 1, 1], [0, 129, 126, 1], [0, 0, 0, 1024]],
)
def test_grouped_matmul(sizes: list[int]) -> None:
    used, ends = sum(sizes), np.cumsum(sizes)
    rows, weights = random_bfloat16((1024, 2048), (4, 1280, 2048))  # 1280: ten tiles, a path of 8 and a rest of 2
    group_sizes = jnp.array(sizes, jnp.int32)
    out = np.asarray(multiply(rows.at[used:].set(jnp.nan), weights, group_sizes)).astype(np.float64)
    wide, wide_weights = (np.asarray(a).astype(np.float64) for a in (rows, weights))
    for e, end in enumerate(ends):
        part = slice(end - sizes[e], end)
        np.testing.assert_allclose(out[part], wide[part] @ wide_weights[e].T, rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize("implementation", ["hopper", "pallas"])
def test_many_groups_and_few_rows(implementation: GroupedMatmul) -> None:
    """Kimi K2's 384 experts, most of them empty, and a number of rows that is no multiple of the tile's."""
    sizes = np.bincount(np.random.default_rng(3).integers(0, 384, 200), minlength=384)
    rows, weights = random_bfloat16((200, 128), (384, 256, 128))
    product = jax.jit(functools.partial(grouped_matmul, implementation=implementation))
    out = np.asarray(product(rows, weights, jnp.asarray(sizes, jnp.int32))).astype(np.float64)
    expected = np.einsum(
        "mk,mnk->mn",
        np.asarray(rows).astype(np.float64),
        np.asarray(weights).astype(np.float64)[np.repeat(range(384), sizes)],
    )
    np.testing.assert_allclose(out, expected, rtol=2**-8, atol=1e-2)


def expert_inputs(tokens: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(2)
    x, gate_up, down = random_bfloat16((tokens, 256), (8, 512, 256), (8, 256, 256))
    expert = jnp.asarray(np.sort([rng.permutation(16)[:4] for _ in range(tokens)], -1) - 4, jnp.int32)
    return x, expert, jnp.asarray(rng.uniform(0.1, 1, (tokens, 4)), jnp.float32), gate_up, down


def run(arrays: tuple[jax.Array, ...]) -> np.ndarray:
    experts = functools.partial(apply_experts, num_experts=8, first=0, ep_size=2, implementation="hopper")
    return np.asarray(jax.jit(lambda *a: experts(*a))(*arrays))


@pytest.mark.parametrize("tokens", [33, 2048])
def test_windows_and_unwritten_rows_change_no_bit(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = expert_inputs(tokens)
    assert group_alignment(arrays[3], arrays[1].size // 2, 8, "hopper") == (128 if tokens == 2048 else 1)
    whole = run(arrays)
    assert np.isfinite(whole.astype(np.float32)).all() and whole.any()

    def unwritten(rows: jax.Array, weights: jax.Array, sizes: jax.Array, first: int, **how: Any) -> jax.Array:
        used = jnp.arange(rows.shape[0]) < sizes.sum()
        out = grouped_matmul(rows, weights, sizes, first, **how)
        return jnp.where(used[:, None], out, jnp.nan)

    for size in (128, 512, 6144):
        monkeypatch.setattr("jax_mla_cp.model.experts.window_rows", lambda *_, size=size: size)
        np.testing.assert_array_equal(run(arrays), whole)
    monkeypatch.setattr("jax_mla_cp.model.experts.grouped_matmul", unwritten)
    np.testing.assert_array_equal(run(arrays), whole)


@pytest.mark.parametrize("tokens", [7, 1500])
def test_moe_as_on_cpu(tokens: int) -> None:
    config = dataclasses.replace(CONFIG, hidden_size=256, moe_intermediate_size=128)
    build = Build(config, dtype=jnp.dtype(jnp.bfloat16))
    state = nnx.state(Moe(ParamFactory(build), build))
    rng = np.random.default_rng(4)
    state = jax.tree.map(lambda s: rng.normal(size=s.shape, scale=s.shape[-1] ** -0.5).astype(s.dtype), state)
    x = rng.normal(size=(tokens, 256)).astype(jnp.bfloat16)
    valid = np.arange(tokens) < tokens - 2

    def layer(implementation: GroupedMatmul) -> np.ndarray:
        built = dataclasses.replace(build, grouped_matmul=implementation)
        graph = nnx.graphdef(Moe(ParamFactory(built), built))
        moe: Callable[..., jax.Array] = jax.jit(lambda s, *a: nnx.merge(graph, s)(*a))
        return np.asarray(moe(state, x, valid)).astype(np.float32)

    assert resolve_grouped_matmul() == "hopper"
    on_gpu = layer("hopper")
    with jax.default_device(jax.devices("cpu")[0]):
        on_cpu = layer("blocks")
    error = np.linalg.norm(on_gpu - on_cpu, axis=1) / np.linalg.norm(on_cpu, axis=1)
    assert error.max() < 2**-6
    assert np.linalg.norm(on_gpu[1:] - on_cpu[:-1]) > 0.5 * np.linalg.norm(on_cpu), "another token's result is another"
