"""FP8 and INT4 checkpoints against the same ones dequantized by NumPy (tests/helpers/quantize.py) and loaded as plain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jax_mla_cp.checkpoint import CheckpointError, load_params
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import make_mesh, mesh_shape
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.fp8 import unpack_int4
from tests.helpers import quantize
from tests.helpers.array_source import ArraySource
from tests.helpers.checkpoints import BASE

# Nothing is a multiple of 128. Heads of 56 query rows and 72 rows of keys and values straddle blocks, and so do the 16 roped
# rows behind 120 latents.
RAGGED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    **BASE,
    "vocab_size": 300,
    "num_hidden_layers": 2,
    "hidden_size": 160,
    "intermediate_size": 280,
    "moe_intermediate_size": 96,
    "num_attention_heads": 4,
    "n_routed_experts": 6,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 136,
    "kv_lora_rank": 120,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 40,
    "v_head_dim": 32,
}
WHOLE = RAGGED | {"moe_intermediate_size": 128}
"""Gate's columns end with a block, so that scales of gate and up stay one per block both ways."""
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
    ],
    ids=["ragged", "int4", "int4 of Kimi K2.5", "whole", "no q_lora"],
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
    in_fp8 = {path.removesuffix(".q") for path in kept if path.endswith(".q")} - {"dense.mla", "moe.mla"}
    assert in_fp8 == {path for path in want if may_be_fp8(path, kind)} != set()
    for path, value in want.items():
        for i, shard in enumerate(value.addressable_shards):
            message = f"{path} on {shard.device}"
            np.testing.assert_array_equal(at_load[path].addressable_shards[i].data, shard.data, err_msg=message)
            if path in in_fp8:
                q, scale = (kept[f"{path}.{part}"].addressable_shards[i].data for part in ("q", "scale"))
                got = by_numpy(q, scale, 128 if kind == "fp8" else 32)
            else:
                got = kept[path].addressable_shards[i].data
            np.testing.assert_array_equal(got, shard.data, err_msg=message)


def may_be_fp8(path: str, kind: str) -> bool:
    if path in ("moe.mlp.gate_up", "moe.mlp.down"):
        return True
    stack, _, rest = path.partition(".")
    return kind == "fp8" and stack in ("dense", "moe") and not any(word in rest for word in ("norm", "router", "bias"))


def by_numpy(q: Any, scale: Any, block: int) -> np.ndarray:
    scale = np.asarray(scale).astype(np.float32)
    for dim, size in enumerate(q.shape):
        if scale.shape[dim] != size:
            scale = np.repeat(scale, block, axis=dim).take(range(size), axis=dim)
    assert q.dtype == np.uint8
    return np.asarray(q).view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def test_scales_of_experts_stay_one_per_block() -> None:
    """The bulk of the memory: 4 bytes for 128 x 128 numbers. Of the others, 4 bytes for 128."""
    kept = load(*reversed(quantized(WHOLE, "fp8")), fp8=True)
    assert kept["moe.mlp.gate_up.scale"].shape == (1, 6, 2, 2)
    assert kept["moe.mlp.down.scale"].shape == (1, 6, 1, 2)
    assert kept["moe.mla.q_b.scale"].shape == (1, 2, 4, 56)
    assert kept["moe.mla.o.scale"].shape == (1, 4, 32, 2)


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
    np.testing.assert_array_equal(unpack_int4(jnp.asarray(packed.view(np.int32)), 1), values)
    np.testing.assert_array_equal(unpack_int4(jnp.asarray(packed.view(np.int32)).T, 0), values.T)


def test_fp8_needs_a_quantized_checkpoint() -> None:
    with pytest.raises(ConfigError, match="weights: 'fp8' needs a quantized checkpoint; this one is not"):
        Build(ModelConfig.from_hf(RAGGED), fp8=True)
