"""Models whose weights stay in FP8: their logits, their memory, and what the compiled step makes of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_mla_cp as mla
from jax_mla_cp.config import presets
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.quantization import Quantization
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.model import moe
from jax_mla_cp.model.build import EP_CHOICES, Build
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.loaded_model import Model, expert_bytes, weight_bytes
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.runner import compile_step
from tests.helpers import quantize
from tests.helpers.checkpoints import BASE, make_checkpoint, read_weights
from tests.helpers.synthetic import Driver

PROMPT = np.random.default_rng(0).integers(0, 300, 240).tolist()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models: as they were, quantized, and dequantized again by NumPy."""
    base = tmp_path_factory.mktemp("quantized")
    _, original = make_checkpoint(base / "original", **quantize.RAGGED_SIZES)
    paths = {"original": original}
    for kind, to, back, config in (
        ("fp8", quantize.to_fp8, quantize.from_fp8, quantize.FP8_CONFIG),
        ("int4", quantize.to_int4, quantize.from_int4, quantize.INT4_CONFIG),
        ("aligned", quantize.to_fp8, quantize.from_fp8, quantize.FP8_CONFIG),
    ):
        if kind == "aligned":
            _, original = make_checkpoint(base / "original aligned", **quantize.ALIGNED_SIZES)
        stored = to(read_weights(original))
        paths[kind] = quantize.write(base / kind, original, stored, config)
        paths[f"{kind} dequantized"] = quantize.write(base / f"{kind}_plain", original, back(stored), None)
    return paths


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """The choices of each layer's router, step after step."""
    seen: list[np.ndarray] = []
    real = moe.route

    def route(*args: Any, **how: Any) -> Any:
        chosen = real(*args, **how)
        jax.debug.callback(lambda expert: seen.append(np.asarray(expert)), chosen[0], ordered=True)
        return chosen

    monkeypatch.setattr(moe, "route", route)
    jax.clear_caches()
    yield seen
    jax.clear_caches()


def play(model: Model) -> np.ndarray:
    """A long prompt, which expands, beside a short one, which is absorbed; in one program."""
    driver = Driver(model, chunk=512)
    return driver.step([(driver.request(), PROMPT), (driver.request(), PROMPT[:40])])


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, np.ndarray]:
    """The logits of the checkpoints that NumPy dequantized."""
    return {
        kind: play(mla.load(checkpoints[f"{kind} dequantized"], dtype="float32", weights="bf16")[0])
        for kind in ("fp8", "int4", "aligned")
    }


@pytest.mark.parametrize(
    ("kind", "mesh", "weights"),
    [
        ("fp8", None, "fp8"),
        ("fp8", "tp=2,cp=2", "fp8"),
        ("fp8", "tp=2,cp=2", "bf16"),
        ("int4", "tp=2,cp=2", "fp8"),
        ("int4", None, "bf16"),
        ("aligned", None, "fp8"),
        ("aligned", "tp=2,cp=2", "fp8"),
        ("aligned", "tp=4", "fp8"),
    ],
)
def test_logits_are_those_of_the_dequantized_checkpoint(
    kind: str,
    mesh: str | None,
    weights: Any,
    checkpoints: dict[str, Path],
    expected: dict[str, np.ndarray],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At tp=2 blocks of the ragged one are cut, at tp=4 the shared experts' of the aligned one: these are dequantized while loading."""
    on = mla.make_mesh(mesh) if mesh else None
    with caplog.at_level("INFO"):
        model, _ = mla.load(checkpoints[kind], dtype="float32", mesh=on, weights=weights)
    assert model.build.fp8 == (weights == "fp8")
    told = [record.message for record in caplog.records if "can't stay in FP8" in record.message]
    if kind == "aligned":
        assert isinstance(model.params["moe"]["mlp"]["shared"]["down"], nnx.State) == (mesh != "tp=4"), "of q and scale"
        cut = "these can't stay in FP8 and are dequantized, because the mesh cuts blocks: "
        assert told == ([] if mesh != "tp=4" else [cut + "moe.mlp.shared.down, moe.mlp.shared.gate_up"])
    elif weights == "bf16" or kind == "int4":
        assert not told
    want = expected[kind]
    np.testing.assert_allclose(play(model), want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_routing(checkpoints: dict[str, Path], routes: list[np.ndarray]) -> None:
    """FP8 and the dequantized checkpoint choose the same experts; the original, other numbers, not always."""

    def chosen(name: str, weights: Any = "auto") -> np.ndarray:
        routes.clear()
        model, _ = mla.load(checkpoints[name], dtype="float32", weights=weights)
        driver = Driver(model)
        jax.block_until_ready(driver.step([(driver.request(), PROMPT)]))
        jax.effects_barrier()
        return np.stack(routes)[:, : len(PROMPT)]

    want = chosen("fp8 dequantized")
    assert want.shape == (2, len(PROMPT), 2)
    np.testing.assert_array_equal(chosen("fp8", "fp8"), want)
    for kind in ("fp8", "int4"):
        same = (chosen(f"{kind} dequantized") == chosen("original")).all(-1).mean()
        print(f"{kind}: {same:.1%} of (layer, token) pairs have the experts of the unquantized model")
        assert 0.6 < same < 1


def test_wrong_scales_are_noticed(
    checkpoints: dict[str, Path], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Negative control: the scales of one matrix the wrong way round."""
    tensors = quantize.to_fp8(read_weights(checkpoints["original"]))
    name = "model.layers.1.self_attn.q_a_proj.weight_scale_inv"
    assert tensors[name].shape == (2, 2)
    tensors[name] = tensors[name].T
    path = quantize.write(tmp_path / "wrong", checkpoints["original"], tensors, quantize.FP8_CONFIG)
    wrong, _ = mla.load(path, dtype="float32", weights="fp8")
    assert np.abs(play(wrong) - expected["fp8"]).max() > 1e-3 * np.abs(expected["fp8"]).max()


def test_what_weights_auto_takes(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(name: str, weights: Any = "auto") -> bool:
        from jax_mla_cp.launch import plan_build

        config = mla.ModelConfig.from_dir(checkpoints[name])
        return plan_build(config, None, dtype="float32", weights=weights, ep_axes="auto", attention="xla").fp8

    assert [kept(name) for name in ("original", "fp8", "int4")] == [False, False, False]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [kept(name) for name in ("original", "fp8", "int4")] == [False, True, True]
    assert not kept("fp8", "bf16")
    with pytest.raises(ConfigError, match="weights: 'fp8' needs a quantized checkpoint; this one is not"):
        kept("original", "fp8")
    with pytest.raises(ConfigError, match=r"weights: must be one of auto \| bf16 \| fp8, got 'int8'"):
        kept("fp8", "int8")


def test_a_missing_kernel_is_warned_of(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a Hopper GPU without the extension FP8 runs, slowly; the log says why."""

    def warnings(implementation: str, weights: Any) -> list[str]:
        monkeypatch.setattr("jax_mla_cp.launch.model.resolve_grouped_matmul", lambda: implementation)
        caplog.clear()
        mla.load(checkpoints["fp8"], dtype="float32", weights=weights)
        return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    monkeypatch.setattr("jax_mla_cp.extension.cuda_problem", lambda: "built without CUDA")
    told = "FP8 is dequantized before every product, and decoding slow: built without CUDA"
    assert warnings("pallas", "fp8") == [told]
    assert warnings("pallas", "bf16") == warnings("hopper", "fp8") == warnings("blocks", "fp8") == []


def test_weight_bytes_are_those_of_the_arrays(checkpoints: dict[str, Path]) -> None:
    mesh = mla.make_mesh("tp=2,cp=2")
    for weights, small in (("fp8", {"uint8", "float32"}), ("bf16", {"float32"})):
        model, _ = mla.load(checkpoints["fp8"], dtype="float32", mesh=mesh, weights=weights)  # type: ignore[arg-type]
        leaves = jax.tree.leaves(model.params)
        assert {leaf.dtype.name for leaf in leaves} == small
        assert weight_bytes(model.build) == sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        mlp = model.params["moe"]["mlp"]
        experts = jax.tree.leaves((mlp["gate_up"], mlp["down"]))
        assert expert_bytes(model.build) == sum(leaf.addressable_shards[0].data.nbytes for leaf in experts)


def test_memory_of_deepseek_v3() -> None:
    """The table of docs/checkpoints.md, in GB of a device."""

    def size(name: str, quantization: Quantization | None, fp8: bool, cp: int = 1) -> float:
        config = dataclasses.replace(presets.model_config(name), quantization=quantization)
        ep = EP_CHOICES["tp" if cp == 1 else "tp,cp"]
        return weight_bytes(Build(config, MeshShape(cp=cp, tp=8), ep, dtype=jnp.dtype(jnp.bfloat16), fp8=fp8)) / 1e9

    blocks, groups = Quantization("fp8", (128, 128)), Quantization("int4", (1, 32))
    assert size("deepseek_v3", blocks, True) == pytest.approx(85.5, abs=0.05)
    assert size("deepseek_v3", blocks, False) == size("deepseek_v3", None, False) == pytest.approx(169.8, abs=0.05)
    assert size("kimi_k2", groups, True) == pytest.approx(139.9, abs=0.05)
    assert size("kimi_k2", groups, False) == pytest.approx(258.8, abs=0.05)
    assert size("kimi_k2", blocks, True) == pytest.approx(130.1, abs=0.05)
    assert size("deepseek_v3", blocks, True, cp=4) == pytest.approx(24.2, abs=0.05)
    assert size("deepseek_v3", blocks, False, cp=4) == pytest.approx(47.2, abs=0.05)
    assert size("kimi_k2", groups, True, cp=4) == pytest.approx(38.9, abs=0.05)
    assert size("kimi_k2", groups, False, cp=4) == pytest.approx(68.6, abs=0.05)


def test_the_step_dequantizes_a_matrix_at_a_time() -> None:
    """Temporaries are smaller than a layer's experts, and no float array has the size of them; with another product one has."""
    raw = {
        "model_type": "deepseek_v3",
        **BASE,
        **quantize.RAGGED_SIZES,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 9,
        "quantization_config": quantize.FP8_CONFIG,
    }
    c = mla.ModelConfig.from_hf(raw)
    experts = 4 * c.n_routed_experts * 3 * c.hidden_size * c.moe_intermediate_size  # of a layer, in float32
    temporaries = {}
    for implementation in ("blocks", "ragged"):
        build = Build(c, fp8=True, grouped_matmul=implementation)
        model = Model(nnx.state(Decoder(build)), build, None)  # shapes are enough to compile for
        planner = Planner.create(model, cache_tokens=32, page_size=16)
        program = compile_step(planner, planner.step_shapes[-1])
        stats: Any = program.memory_analysis()
        temporaries[implementation] = stats.temp_size_in_bytes
        text = program.as_text()
        assert re.search(r"u8\[8,8,2,256,160\]", text), "the stack of gate_up is there, in bytes"
        assert not re.search(r"(f32|f16|bf16|f8e4m3fn)\[(8,8|64),(2,256|512),160\]", text)
        layer = re.search(r"(f32|f16|bf16|f8e4m3fn)\[8,(2,256|512),160\]", text)
        assert bool(layer) == (implementation == "ragged")
    assert temporaries["blocks"] < experts < temporaries["ragged"]
