"""Rows and matrices in FP8: the quantization of rows, their product, and where it is taken. The kernels are tested in tests/gpu."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jax_mla_cp as mla
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.launch import plan_build
from jax_mla_cp.mesh import make_mesh
from jax_mla_cp.model.experts import apply_experts
from jax_mla_cp.model.fp8 import Matrices, ScaledMatrices
from jax_mla_cp.model.fp8_rows import ScaledRows, dequantize_rows, quantize_rows
from jax_mla_cp.model.grouped_matmul import GroupedMatmul, grouped_matmul
from jax_mla_cp.model.quantize import quantize, quantize_gated
from jax_mla_cp.model.w8a8 import fits, quantizes_rows
from tests.helpers import quantize as checkpoint_format
from tests.helpers.checkpoints import make_checkpoint, read_weights
from tests.helpers.synthetic import Driver

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
F32, BF16 = np.dtype(np.float32), np.dtype(jnp.bfloat16)

# Of numbers that are spread evenly over a binade: e4m3's steps are 1/8 of the binade's first number, and an error is uniform
# within half a step, sqrt(1/12) of one in the mean square.
ROUNDING = 1 / 8 * 12**-0.5 / 1.44


def numpy_quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The quantized numbers in float64, and the scale of each of them."""
    columns = x.shape[1]
    padded = np.pad(x, ((0, 0), (0, -columns % 128))).astype(np.float32)
    blocks = padded.reshape(len(x), -1, 128)
    largest = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(1e-30))
    q = (blocks * (np.float32(448) / largest)).astype(E4M3).astype(np.float64)
    scale = np.broadcast_to(largest / np.float32(448), blocks.shape).astype(np.float64)
    return tuple(a.reshape(len(x), -1)[:, :columns] for a in (q * scale, scale))  # type: ignore[return-value]


def random_matrices(count: int, n: int, k: int, dtype: np.dtype = F32) -> tuple[ScaledMatrices, np.ndarray]:
    """Matrices in FP8, and their values in float64."""
    rng = np.random.default_rng(7)
    q = rng.normal(size=(count, n, k), scale=60).clip(-448, 448).astype(E4M3)
    scale = rng.uniform(0.5, 2, (count, -(-n // 128), -(-k // 128))).astype(np.float32) / 60
    wide = np.repeat(np.repeat(scale, 128, axis=1), 128, axis=2)[:, :n, :k].astype(np.float64)
    matrices = ScaledMatrices(jnp.asarray(q.view(np.uint8)), jnp.asarray(scale), (128, 128), dtype)
    return matrices, q.astype(np.float64) * wide


@given(st.integers(1, 5), st.integers(1, 300), st.integers(-30, 30), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_each_number_keeps_its_size(m: int, k: int, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(m, k)) * 2.0 ** (exponent + rng.integers(-9, 9, (m, k)))).astype(np.float32)
    rows = quantize_rows(jnp.asarray(x))
    assert rows.q.shape == (m, k) and rows.scale.shape == (m, -(-k // 128))
    want, scale = numpy_quantized(x)
    got = np.asarray(dequantize_rows(rows), np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (np.abs(got - x) <= np.maximum(np.abs(x) / 16, 2.0**-10 * scale) * (1 + 1e-5)).all(), "half a step of e4m3"


def test_zeros_and_nan() -> None:
    x = np.zeros((3, 256), np.float32)
    x[1, 130], x[2, 0] = 5, np.nan
    got = np.asarray(dequantize_rows(quantize_rows(jnp.asarray(x))))
    np.testing.assert_array_equal(got[:2], x[:2])
    assert np.isnan(got[2, 0]), "NaN stays, and does not become a number"


@pytest.mark.parametrize("implementation", ["blocks", "ragged", "pallas"])
@pytest.mark.parametrize("sizes", [[90, 0, 200], [1, 1, 1], None])
@pytest.mark.parametrize(("n", "k"), [(136, 144), (256, 384)])
def test_product(implementation: GroupedMatmul, sizes: list[int] | None, n: int, k: int) -> None:
    """Against float64 of the numbers that are in FP8, from a stack of layers."""
    matrices, exact = random_matrices(6, n, k)
    x = np.random.default_rng(8).normal(size=(300, k)).astype(np.float32)
    groups = None if sizes is None else jnp.array(sizes, jnp.int32)
    multiply = jax.jit(functools.partial(grouped_matmul, implementation=implementation))
    got = np.asarray(multiply(quantize_rows(jnp.asarray(x)), matrices, groups, 2))
    assert got.dtype == matrices.dtype
    quantized, _ = numpy_quantized(x)
    ends = np.cumsum(sizes or [300])
    for e, end in enumerate(ends):
        part = slice(end - (sizes or [300])[e], end)
        want, plain = (rows[part] @ exact[2 + e].T for rows in (quantized, x.astype(np.float64)))
        np.testing.assert_allclose(got[part], want, atol=1e-5 * k**0.5)
        if len(want) > 50:
            error = np.linalg.norm(got[part] - plain) / np.linalg.norm(plain)
            assert 0.8 * ROUNDING < error < 1.2 * ROUNDING, "of the rows that were not rounded"


@pytest.mark.parametrize("windows", [False, True])
def test_experts(windows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both products in FP8, against float64 that quantizes at the same two places; windows change no bit."""
    tokens, experts, k = 150, 4, 3
    gate_up, exact_gate_up = random_matrices(experts, 256, 160)
    down, exact_down = random_matrices(experts, 160, 128)
    rng = np.random.default_rng(9)
    x = rng.normal(size=(tokens, 160)).astype(np.float32)
    expert = np.sort([rng.permutation(6)[:k] for _ in range(tokens)], -1).astype(np.int32) - 1  # -1, 4: other devices'
    weight = rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)
    if windows:
        monkeypatch.setattr("jax_mla_cp.model.experts.window_rows", lambda *_: 48)

    def run(rows: Any) -> np.ndarray:
        how: dict[str, Any] = {"num_experts": experts, "first": 0, "ep_size": 1, "implementation": "blocks"}
        return np.asarray(jax.jit(functools.partial(apply_experts, **how))(rows, expert, weight, gate_up, down))

    got = run(quantize_rows(jnp.asarray(x)))
    quantized, _ = numpy_quantized(x)

    def reference(round_rows: bool) -> np.ndarray:
        want = np.zeros((tokens, 160))
        for t, j in np.argwhere((expert >= 0) & (expert < experts)):
            e = expert[t, j]
            gate, up = np.split((quantized if round_rows else x)[t] @ exact_gate_up[e].T, 2)
            hidden = gate / (1 + np.exp(-gate)) * up * weight[t, j]
            want[t] += (numpy_quantized(hidden[None])[0][0] if round_rows else hidden) @ exact_down[e].T
        return want

    want, plain = reference(True), reference(False)
    # A float32 sum near the middle of two numbers of e4m3 may be rounded to the other one: rarely, and by 1/8.
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 0.1 * ROUNDING
    assert ROUNDING < np.linalg.norm(got - plain) / np.linalg.norm(plain) < 3 * ROUNDING
    assert np.linalg.norm(run(jnp.asarray(x)) - plain) < 1e-4 * np.linalg.norm(plain), "rows that are not in FP8"
    if windows:
        monkeypatch.undo()
        np.testing.assert_array_equal(run(quantize_rows(jnp.asarray(x))), got)


def matrices(n: int, k: int, block: tuple[int, int] | None = (128, 128), scale: Any = jnp.float32) -> Matrices:
    if block is None:
        return jnp.zeros((2, n, k), jnp.bfloat16)
    scales = jnp.ones((2, -(-n // block[0]), -(-k // block[1])), scale)
    return ScaledMatrices(jnp.zeros((2, n, k), jnp.uint8), scales, block, BF16)


def test_which_matrices_fit() -> None:
    assert fits(matrices(576, 7168)) and fits(matrices(8, 16))
    assert not fits(matrices(576, 7168, None)) and not fits(matrices(576, 7168, (1, 32), jnp.bfloat16))
    assert not fits(matrices(576, 7168, (64, 128))) and not fits(matrices(576, 7168, scale=jnp.bfloat16))
    assert not fits(matrices(570, 7168)) and not fits(matrices(576, 7160))


def test_few_rows_stay_as_they_are() -> None:
    """Those of a decode step: its time is that of reading the matrices."""
    m = matrices(256, 256)
    assert [quantizes_rows(m, rows, 8, "w8a8") for rows in (8, 8 * 32, 8 * 32 + 1, 8192)] == [False, False, True, True]
    assert [quantizes_rows(m, rows, 1, "w8a8") for rows in (32, 128, 129)] == [False, False, True]
    assert not quantizes_rows(m, 8192, 8, "w8a16") and not quantizes_rows(matrices(256, 256, None), 8192, 8, "w8a8")


def test_kernels_are_taken_on_hopper() -> None:
    """And under shard_map their results vary as their operands do."""
    pytest.importorskip("jax_mla_cp._ffi", reason="the extension is not built")
    types = []

    def device(x: jax.Array, weight: jax.Array, sizes: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
        weights = ScaledMatrices(q, scale, (128, 128), BF16)
        out = grouped_matmul(quantize(x, kernels=True), weights, sizes, implementation="hopper")
        out = grouped_matmul(quantize_gated(out, weight, kernels=True), weights, sizes, implementation="hopper")
        types.append(jax.typeof(out).manual_axis_type.varying)
        return out

    tp = P("tp")
    sharded = jax.shard_map(device, mesh=make_mesh("tp=2"), in_specs=(P(), P(), tp, tp, tp), out_specs=tp)
    shapes = [
        ((512, 256), jnp.bfloat16),
        ((512,), jnp.float32),
        ((4,), jnp.int32),
        ((4, 512, 256), jnp.uint8),
        ((4, 4, 2), jnp.float32),
    ]
    jaxpr = str(jax.make_jaxpr(sharded)(*(jax.ShapeDtypeStruct(*s) for s in shapes)))
    assert types == [{"tp"}]
    found = re.findall(r"target_name=(\w+)", jaxpr)
    assert found == ["quantize_rows", "w8a8", "quantize_gated", "w8a8"]
    assert "dot_general" not in jaxpr and "bf16[2,512,256]" not in jaxpr, "no matrix is dequantized"
    # Without the kernel, or in another dtype, XLA does the same.
    for x, kernels in ((jnp.zeros((64, 256)), True), (jnp.zeros((64, 256), jnp.bfloat16), False)):
        assert "ffi_call" not in str(jax.make_jaxpr(lambda x, k=kernels: quantize(x, kernels=k))(x))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("w8a8")
    _, plain = make_checkpoint(base / "plain", **checkpoint_format.ALIGNED_SIZES)
    stored = checkpoint_format.to_fp8(read_weights(plain))
    return checkpoint_format.write(base / "fp8", plain, stored, checkpoint_format.FP8_CONFIG)


def play(checkpoint: Path, compute: Any, mesh: str | None = None, ep_axes: Any = "auto") -> np.ndarray:
    """Logits of a long prompt, beside a short one that is absorbed."""
    on = mla.make_mesh(mesh) if mesh else None
    how: dict[str, Any] = {"dtype": "float32", "weights": "fp8", "fp8_compute": compute, "ep_axes": ep_axes}
    driver = Driver(mla.load(checkpoint, mesh=on, **how)[0], chunk=512)
    tokens = np.random.default_rng(0).integers(0, 300, 240).tolist()
    return driver.step([(driver.request(), tokens), (driver.request(), tokens[:40])])


def test_model(checkpoint: Path) -> None:
    """Logits are as far from those of w8a16 as rounding must bring them, on any mesh.

    What a layer adds has gone through at most four products with rounded rows in a row (q_a, q_b; o; gate and up, down), each with
    an error of ROUNDING, independent of the others': sqrt(4) times that. Each of three layers adds its own to those that it passes
    on: sqrt(3) times as much at most, and hardly less than a single product's.
    """

    def error(got: np.ndarray, want: np.ndarray) -> np.ndarray:
        return np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want - want.mean(-1, keepdims=True), axis=-1)

    exact, one = play(checkpoint, "w8a16"), play(checkpoint, "w8a8")
    most = 12**0.5 * ROUNDING
    assert (error(one, exact) > 0.5 * ROUNDING).all() and (error(one, exact) < most).all()
    for mesh, ep_axes in (("tp=2", "none"), ("cp=2", "tp,cp"), ("tp=2,cp=2", "tp,cp")):
        long, short = error(play(checkpoint, "w8a8", mesh, ep_axes), one)
        # A sum in another order may be rounded to the neighboring number of e4m3, and change all that follows. Among the
        # activations of 40 tokens none is; among those of 240 some are, on some meshes.
        assert short < 1e-5 and long < most, mesh


def test_what_auto_takes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(compute: Any = "auto", weights: Any = "fp8", path: Path = checkpoint) -> str:
        config = mla.ModelConfig.from_dir(path)
        how: dict[str, Any] = {"dtype": "float32", "ep_axes": "auto", "attention": "xla"}
        return plan_build(config, None, weights=weights, fp8_compute=compute, **how).fp8_compute

    assert resolved() == "w8a16", "no device here has the kernel"
    assert resolved("w8a8") == "w8a8"
    monkeypatch.setattr("jax_mla_cp.launch.model.resolve_grouped_matmul", lambda: "hopper")
    assert resolved() == "w8a8" and resolved("w8a16") == "w8a16"
    assert resolved(weights="bf16") == "w8a16"
    with pytest.raises(ConfigError, match=r"fp8_compute: 'w8a8' needs weights that stay in FP8.*Add weights='fp8'"):
        resolved("w8a8", "bf16")
    with pytest.raises(ConfigError, match=r"fp8_compute: must be one of auto \| w8a16 \| w8a8, got 'fp8'"):
        resolved("fp8")
    with pytest.raises(
        ConfigError, match=r"fp8_compute: 'w8a8' needs a checkpoint in FP8 .* this one is not quantized"
    ):
        resolved("w8a8", "auto", checkpoint.parent / "plain")


def test_rows_are_a_pytree() -> None:
    rows = quantize_rows(jnp.ones((6, 200)))
    taken = jax.tree.map(lambda a: a[jnp.array([4, 4])], rows)
    assert isinstance(taken, ScaledRows) and taken.shape == (2, 200) and taken.scale.shape == (2, 2)
