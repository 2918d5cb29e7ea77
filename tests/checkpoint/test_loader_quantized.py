"""FP8 and INT4 checkpoints against the same ones dequantized by NumPy (tests/helpers/quantize.py) and loaded as plain."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jax_mla_cp.checkpoint import CheckpointError, load_params
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import make_mesh, mesh_shape
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.fp8 import unpack_int4
from jax_mla_cp.model.fp8_blocks import why_dequantized
from tests.helpers import quantize
from tests.helpers.array_source import ArraySource
from tests.helpers.checkpoints import BASE

RAGGED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    **BASE,
    **quantize.RAGGED_SIZES,
    "num_hidden_layers": 2,
    "n_routed_experts": 6,
    "n_group": 2,
    "topk_group": 1,
}
WHOLE = RAGGED | {"moe_intermediate_size": 128}
"""Gate ends with a block, so that gate and up stay in FP8."""
ALIGNED = RAGGED | quantize.ALIGNED_SIZES
NO_Q_LORA = RAGGED | {"q_lora_rank": None, "rope_interleave": False}
K25 = {"model_type": "kimi_k25", "text_config": RAGGED}
"""Its tensors' names have a prefix."""

Quantize = Callable[[quantize.Tensors], quantize.Tensors]
KINDS: dict[str, tuple[dict[str, Any], Quantize, Quantize]] = {
    "fp8": (quantize.FP8_CONFIG, quantize.to_fp8, quantize.from_fp8),
    "int4": (quantize.INT4_CONFIG, quantize.to_int4, quantize.from_int4),
}


def quantized(raw: dict[str, Any], kind: str) -> tuple[ModelConfig, quantize.Tensors]:
    config = ModelConfig.from_hf(raw | {"quantization_config": KINDS[kind][0]})
    return config, KINDS[kind][1](quantize.random_tensors(config))


def load(
    tensors: quantize.Tensors, config: ModelConfig, mesh: str | None = None, ep: tuple[str, ...] = ("tp",), **build: Any
) -> dict[str, jax.Array]:
    """The parameters by path; of those that stay in FP8, q and scale."""
    on = make_mesh(mesh) if mesh else None
    built = Build(config, mesh_shape(on) if on else None, ep, **build)
    state = load_params(ArraySource(tensors), nnx.state(Decoder(built)), config, on)
    return {".".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}


@pytest.mark.parametrize(
    ("raw", "mesh", "ep", "kind"),
    [
        (RAGGED, "tp=4,cp=2", ("cp", "tp"), "fp8"),  # 6 experts, and 2 of padding
        (RAGGED, "tp=4,cp=2", ("cp", "tp"), "int4"),
        (K25, None, ("tp",), "int4"),
        (WHOLE, "tp=2,cp=2", ("tp",), "fp8"),
        (NO_Q_LORA, None, ("tp",), "fp8"),
        (ALIGNED, "tp=2,cp=2", ("tp",), "fp8"),
        (ALIGNED, "tp=4", ("tp",), "fp8"),
    ],
    ids=["ragged", "int4", "int4 of Kimi K2.5", "whole", "no q_lora", "aligned", "cut"],
)
def test_every_device_has_the_numbers_of_the_dequantized_checkpoint(
    raw: dict[str, Any], mesh: str | None, ep: tuple[str, ...], kind: str
) -> None:
    """Bit by bit, dequantized while loading or later."""
    config, tensors = quantized(raw, kind)
    want = load(KINDS[kind][2](tensors), dataclasses.replace(config, quantization=None), mesh, ep)
    at_load = load(tensors, config, mesh, ep)
    kept = load(tensors, config, mesh, ep, fp8=True)
    assert at_load.keys() == want.keys()
    in_fp8 = {path.removesuffix(".scale") for path in kept if path.endswith(".scale")}
    ways = {path: value.addressable_shards[0].data.shape for path, value in want.items()}
    assert in_fp8 == {path for path in want if stays_fp8(path, want[path].shape, ways[path], kind, config)} != set()
    for path, value in want.items():
        for i, shard in enumerate(value.addressable_shards):
            message = f"{path} on {shard.device}"
            np.testing.assert_array_equal(at_load[path].addressable_shards[i].data, shard.data, err_msg=message)
            if path in in_fp8:
                q, scale = (kept[f"{path}.{part}"].addressable_shards[i].data for part in ("q", "scale"))
                got = by_numpy(q, scale, (128, 128) if kind == "fp8" else (1, 32))
            else:
                got = kept[path].addressable_shards[i].data
            np.testing.assert_array_equal(got, shard.data, err_msg=message)


def stays_fp8(path: str, shape: tuple[int, ...], shard: tuple[int, ...], kind: str, c: ModelConfig) -> bool:
    """The rule, by looking at every block: it is neither cut nor are rows moved to another."""
    if kind == "int4":
        return path in ("moe.mlp.gate_up", "moe.mlp.down")
    if not path.startswith(("dense.ml", "moe.ml")) or any(word in path for word in ("norm", "router", "bias", "w_u")):
        return False
    name, block_of = path.rpartition(".")[2], np.arange(shape[-2]) // 128
    if any(parts < size and parts % 128 for parts, size in zip(shard[-2:], shape[-2:], strict=True)):
        return False
    if name == "gate_up" and shape[-2] % 128:
        return False
    r = c.qk_rope_head_dim
    head = {"kv_a": shape[-2], "q": c.qk_nope_head_dim + r, "q_b": c.qk_nope_head_dim + r}.get(name)
    if head is None or not c.rope.interleaved:
        return True
    return all(len(set(block_of[end - r : end])) == 1 for end in range(head, shape[-2] + 1, head))


def by_numpy(q: Any, scale: Any, block: tuple[int, int]) -> np.ndarray:
    scale = np.asarray(scale).astype(np.float32)
    for dim, size in zip((-2, -1), block, strict=True):
        assert scale.shape[dim] == -(-q.shape[dim] // size), "one scale for each block"
        scale = np.repeat(scale, size, axis=dim).take(range(q.shape[dim]), axis=dim)
    assert q.dtype == np.uint8
    return np.asarray(q).view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def test_scales_are_one_per_block() -> None:
    """4 bytes for 128 x 128 numbers."""
    kept = load(*reversed(quantized(WHOLE, "fp8")), fp8=True)
    assert kept["moe.mlp.gate_up.scale"].shape == (1, 6, 2, 1, 2)
    assert kept["moe.mlp.down.scale"].shape == (1, 6, 2, 1)
    assert kept["moe.mla.q_a.scale"].shape == (1, 2, 2)
    assert kept["moe.mla.o.scale"].shape == (1, 2, 1)


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    unit=st.tuples(st.sampled_from([4, 12, 16]), st.sampled_from([4, 12, 16])),
    ways=st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3])),
    block=st.tuples(st.sampled_from([1, 4, 8, 16]), st.sampled_from([1, 4, 8, 16])),
    halves=st.booleans(),
    reordered=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 16)), max_size=3),
)
def test_which_matrices_stay_in_fp8(
    size: tuple[int, int],
    unit: tuple[int, int],
    ways: tuple[int, int],
    block: tuple[int, int],
    halves: bool,
    reordered: list[tuple[int, int]],
) -> None:
    """True for those that every device can dequantize with its own part of the scales, with the rows in the model's order."""
    n, k = (a * b * w for a, b, w in zip(size, unit, ways, strict=True))
    shape, parts = ((2, n, k), (1, *ways)) if halves else ((n, k), ways)
    ranges = [range(first, min(first + count, n)) for first, count in reordered if first < n]
    row_block, column_block = np.arange(n) // block[0], np.arange(k) // block[1]

    def whole(blocks: np.ndarray, devices: int) -> bool:
        """No block is on two devices."""
        shards = np.split(blocks, devices)
        return all(not set(a) & set(b) for a, b in itertools.combinations(shards, 2))

    can = whole(row_block, ways[0]) and whole(column_block, ways[1])
    if halves:  # the two matrices as one: no block holds rows of both
        can &= n % block[0] == 0
    can &= all(len({row_block[i] for i in rows}) == 1 for rows in ranges)
    assert (why_dequantized(shape, parts, block, ranges) is None) == can


def test_a_nan_among_the_values_is_refused() -> None:
    """By the tensor's name, whether it stays in FP8 or not; the neighbors of the two NaN are numbers."""
    config, tensors = quantized(RAGGED, "fp8")
    for name in (Q_A, EXPERT, "model.layers.0.self_attn.kv_b_proj.weight"):
        for byte in (0x7F, 0xFF, 0x7E, 0xFE, 0x80):
            changed = tensors[name].copy()
            changed.view(np.uint8)[-1, -1] = byte
            for fp8 in (False, True):
                if byte & 0x7F != 0x7F:
                    load(tensors | {name: changed}, config, fp8=fp8)
                    continue
                with pytest.raises(CheckpointError, match=rf"^{re.escape(name)}: a value is NaN"):
                    load(tensors | {name: changed}, config, fp8=fp8)


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_once(kind: str) -> None:
    """q * scale in float32, and then bfloat16."""
    config, tensors = quantized(RAGGED, kind)
    plain = dataclasses.replace(config, quantization=None)
    want = load(KINDS[kind][2](tensors), plain, dtype=jnp.dtype(jnp.bfloat16))
    got = load(tensors, config, dtype=jnp.dtype(jnp.bfloat16))
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)


def test_a_scale_the_wrong_way_round_is_another_matrix() -> None:
    """Negative control: scales of 2 x 2 blocks, transposed."""
    config, tensors = quantized(RAGGED, "fp8")
    name = "model.layers.0.self_attn.q_a_proj.weight_scale_inv"
    assert tensors[name].shape == (2, 2)
    want = load(tensors, config)["dense.mla.q_a"]
    got = load(tensors | {name: tensors[name].T.copy()}, config)["dense.mla.q_a"]
    assert np.abs(got - want).max() > 0.02 * np.abs(want).max()


def test_layers_may_differ_when_dequantized() -> None:
    """`modules_to_not_convert` names one layer: it is plain there, which FP8 in memory can't be."""
    config, tensors = quantized(RAGGED, "fp8")
    plain = quantize.from_fp8(tensors)
    name = "model.layers.1.self_attn.o_proj.weight"
    mixed = {k: v for k, v in tensors.items() if k != f"{name}_scale_inv"} | {name: plain[name]}
    np.testing.assert_array_equal(load(mixed, config)["moe.mla.o"], load(tensors, config)["moe.mla.o"])
    with pytest.raises(CheckpointError, match=rf"1 not quantized, which weights='fp8' asks for .*\n  {name}"):
        load(mixed, config, fp8=True)


def change(kind: str, edit: Callable[[quantize.Tensors], Any]) -> str:
    config, tensors = quantized(RAGGED, kind)
    tensors = {name: value.copy() for name, value in tensors.items()}
    edit(tensors)
    with pytest.raises(CheckpointError) as caught:
        load(tensors, config)
    return str(caught.value)


Q_A = "model.layers.0.self_attn.q_a_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_errors_name_the_tensor() -> None:
    assert f"{Q_A}: float8_e4m3fn, not bfloat16" in change("fp8", lambda t: t.pop(f"{Q_A}_scale_inv"))
    message = change("fp8", lambda t: t.update({Q_A: t[Q_A].astype(np.float32)}))
    assert f"{Q_A}: float32, not float8_e4m3fn" in message
    message = change("fp8", lambda t: t.update({Q_A: t[Q_A].astype(ml_dtypes.float8_e5m2)}))
    assert f"{Q_A}: float8_e5m2, not float8_e4m3fn" in message
    message = change("fp8", lambda t: t.update({f"{Q_A}_scale_inv": np.ones((1, 1), np.float32)}))
    assert f"{Q_A}_scale_inv: expected [2, 2], got [1, 1]" in message
    norm = "model.layers.0.input_layernorm.weight_scale_inv"
    assert f"1 unexpected:\n  {norm}" in change("fp8", lambda t: t.update({norm: np.ones((2, 1), np.float32)}))
    message = change("fp8", lambda t: t[f"{Q_A}_scale_inv"].fill(np.nan))
    assert message.startswith(f"{Q_A}_scale_inv: a scale is NaN")
    message = change("fp8", lambda t: t.update({EXPERT: t.pop(f"{EXPERT}_scale_inv") @ np.ones((2, 160), np.float32)}))
    assert "quantized for only some experts of a layer:\n  model.layers.1.mlp.experts.*.up_proj.weight" in message

    assert f"1 missing:\n  {EXPERT}_scale" in change("int4", lambda t: t.pop(f"{EXPERT}_scale"))
    assert f"1 missing:\n  {EXPERT}_packed" in change("int4", lambda t: t.pop(f"{EXPERT}_packed"))
    message = change("int4", lambda t: t.update({f"{EXPERT}_shape": np.array([96, 152])}))
    assert message == f"{EXPERT}_shape: expected [96, 160], got [96, 152]."


def test_unpacked_as_packed() -> None:
    """All sixteen numbers, in all eight places, with the sign bit of the int32 set and not."""
    values = np.random.default_rng(0).permutation(np.repeat(np.arange(-8, 8), 8)).reshape(2, 64)
    packed = np.zeros((2, 8), np.uint32)
    for i in range(64):
        packed[:, i // 8] |= ((values[:, i] + 8).astype(np.uint32)) << np.uint32(4 * (i % 8))
    np.testing.assert_array_equal(unpack_int4(jnp.asarray(packed.view(np.int32))), values)


def test_fp8_needs_a_quantized_checkpoint() -> None:
    with pytest.raises(ConfigError, match="weights: 'fp8' needs a quantized checkpoint; this one is not"):
        Build(ModelConfig.from_hf(RAGGED), fp8=True)
