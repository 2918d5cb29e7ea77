"""The extension: what it registers, why it says that it can't run, and programs for CUDA made without a GPU."""

from __future__ import annotations

import collections
import dataclasses
import re
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_mla_cp
from jax_mla_cp import extension
from jax_mla_cp.attention import fa3
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.model.experts import apply_experts
from jax_mla_cp.model.few_rows import few_rows_matmul
from jax_mla_cp.model.fp8 import ScaledMatrices
from jax_mla_cp.model.grouped_matmul import GroupedMatmul
from jax_mla_cp.model.quantize import quantize
from jax_mla_cp.step.forward import forward, to_devices
from tests.helpers.attention_cases import LATENT, QUERY, ROPE, TARGETS, VALUE
from tests.helpers.synthetic import CONFIG, REAL_DIMS_CONFIG, Driver, random_model

_ffi = pytest.importorskip("jax_mla_cp._ffi", reason="the extension is not built")

OURS = {"few_rows", "few_rows_scaled", "w8a8", "quantize_rows", "quantize_gated", "route", "sort_pairs", "add_norm"}
"""Targets that are for CUDA alone: XLA code of the same meaning runs elsewhere."""
FITS = dataclasses.replace(CONFIG, kv_lora_rank=LATENT, qk_rope_head_dim=ROPE, qk_nope_head_dim=128, v_head_dim=VALUE)


def test_registrations() -> None:
    registrations = _ffi.registrations()
    assert set(registrations) == ({"cpu", "CUDA"} if _ffi.built_for_cuda() else {"cpu"})
    for platform, targets in registrations.items():
        assert set(targets) == {*TARGETS, "schedule_splits"} | (OURS if platform == "CUDA" else set())
        assert {type(handler).__name__ for handler in targets.values()} == {"PyCapsule"}


def test_cuda_versions() -> None:
    built, driver = _ffi.built_for_cuda(), _ffi.driver_cuda()
    assert built == 0 or 12030 <= built < 20000
    assert driver == 0 or 10000 <= driver < 20000
    if jax.default_backend() == "cpu" and not built:
        assert driver == 0, "nothing of CUDA is in it, so that it can't know"


@pytest.mark.parametrize("name", ["kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"])
def test_missing_dims(name: str) -> None:
    config = dataclasses.replace(FITS, **{name: 32})
    assert (
        fa3.unsupported_reason(config, jnp.bfloat16)
        == f"its kernels are for {name}={getattr(FITS, name)}, the model has 32"
    )


def test_missing_dtype() -> None:
    text = fa3.unsupported_reason(FITS, jnp.float32)
    assert text is not None and "for bfloat16, the model runs in float32. Use dtype='bfloat16'" in text


def test_missing_gpu() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("JAX runs on an accelerator")
    text = fa3.unsupported_reason(FITS, jnp.bfloat16)
    assert text is not None and "need a Hopper GPU, JAX runs on cpu. Install with the extra cuda13 or cuda12" in text


def pretend(monkeypatch: pytest.MonkeyPatch, capability: str, built: int = 13000, driver: int = 13010) -> None:
    """A GPU of that capability, and an extension built for CUDA `built` on a machine whose driver runs `driver`."""
    device = SimpleNamespace(platform="gpu", compute_capability=capability, device_kind=f"GPU {capability}")
    module = SimpleNamespace(built_for_cuda=lambda: built, driver_cuda=lambda: driver)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(extension, "load", lambda: module)


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.0"])
def test_missing_capability(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    pretend(monkeypatch, capability)
    text: Any = fa3.unsupported_reason(FITS, jnp.bfloat16)
    if capability == "9.0":
        assert text is None
    else:
        assert f"for compute capability 9.0 (Hopper), GPU {capability} has {capability}" in text


def test_missing_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "9.0", built=0, driver=0)
    text: Any = fa3.unsupported_reason(FITS, jnp.bfloat16)
    assert "built without CUDA" in text and "nvcc (CUDA 12.3 or newer)" in text and "JAX_MLA_CP_CUDA=1" in text


def test_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "9.0", built=13000, driver=12080)
    text: Any = fa3.unsupported_reason(FITS, jnp.bfloat16)
    assert "built for CUDA 13.0, this machine's NVIDIA driver runs CUDA 12.8" in text
    assert "Update the driver, or install again with the nvcc of CUDA 12" in text


@pytest.mark.parametrize(
    "built, driver, runs",
    [
        (13000, 13000, True),
        (13020, 13000, True),
        (12040, 13010, True),
        (12090, 12030, True),
        (13000, 12090, False),
        (13000, 0, False),
    ],
)
def test_drivers(built: int, driver: int, runs: bool) -> None:
    """Within a major version an older driver runs a newer build; any driver runs builds of older versions."""
    assert (extension.driver_problem(built, driver) is None) == runs


def test_missing_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a C++ compiler: the package works, and both the call and the question say what to do."""
    monkeypatch.setattr(extension, "load", extension.load.__wrapped__)
    monkeypatch.setitem(sys.modules, "jax_mla_cp._ffi", None)
    monkeypatch.delattr(jax_mla_cp, "_ffi")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu", compute_capability="9.0")])
    text: Any = fa3.unsupported_reason(FITS, jnp.bfloat16)
    assert "the extension jax_mla_cp._ffi can't be loaded" in text and "C++ compiler" in text
    with pytest.raises(ConfigError, match="can't be loaded"):
        fa3.mla_prefill_expanded(jnp.zeros((1, 1, QUERY)), jnp.zeros((1, 1, QUERY + VALUE)), rows_of(1), scale=1.0)


def rows_of(count: int) -> Rows:
    return Rows(*(np.zeros(count + (i == 0), np.int32) for i in range(4)))


def abstract(target: str, tokens: int = 300, heads: int = 16, rows: int = 4) -> tuple[Any, ...]:
    shapes: tuple[tuple[int, ...], ...] = ((tokens, heads, QUERY), (700, heads, QUERY + VALUE))
    if target != "mla_prefill_expanded":
        shapes = ((heads, tokens, LATENT), (tokens, heads, ROPE), (40, 64, LATENT + ROPE))
    operands: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    if target != "mla_prefill_expanded":
        operands.append(jax.ShapeDtypeStruct((rows, 9), jnp.int32))
    return *operands, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows_of(rows))


@pytest.mark.skipif(not _ffi.built_for_cuda(), reason="the extension was built without CUDA")
@pytest.mark.parametrize("target", TARGETS)
def test_lowers_for_cuda_without_a_gpu(target: str) -> None:
    operands = abstract(target)
    text = TARGETS[target].trace(*operands, scale=0.1).lower(lowering_platforms=("cuda",)).as_text()
    assert f"stablehlo.custom_call @{target}" in text
    # JAX can't promise that a custom call's meaning stays, so an export must say that this one is known.
    known = [export.DisabledSafetyCheck.custom_call(target)]
    call = jax.jit(lambda *args: TARGETS[target](*args, scale=0.1))
    program = export.export(call, platforms=["cuda"], disabled_checks=known)(*operands)
    assert program.platforms == ("cuda",) and target in program.mlir_module()


@pytest.mark.skipif(not _ffi.built_for_cuda(), reason="the extension was built without CUDA")
@pytest.mark.parametrize("scaled", [False, True])
def test_few_rows_lower_for_cuda_without_a_gpu(scaled: bool) -> None:
    """DeepSeek-V3's gate and up of a rank's experts, of two layers."""
    weights: Any = jax.ShapeDtypeStruct((64, 4096, 7168), jnp.uint8 if scaled else jnp.bfloat16)
    if scaled:
        scales = jax.ShapeDtypeStruct((64, 32, 56), jnp.float32)
        weights = ScaledMatrices(weights, scales, (128, 128), np.dtype(jnp.bfloat16))
    rows, sizes = jax.ShapeDtypeStruct((1024, 7168), jnp.bfloat16), jax.ShapeDtypeStruct((32,), jnp.int32)
    call = jax.jit(few_rows_matmul, static_argnums=4)
    text = call.trace(rows, weights, sizes, 32, 128).lower(lowering_platforms=("cuda",)).as_text()
    assert f"stablehlo.custom_call @{'few_rows_scaled' if scaled else 'few_rows'}(" in text
    assert "tensor<1024x4096xbf16>" in text and "max_rows = 32 : i64" in text


@pytest.mark.skipif(not _ffi.built_for_cuda(), reason="the extension was built without CUDA")
def test_experts_in_fp8_lower_for_cuda_without_a_gpu() -> None:
    """DeepSeek-V3's sizes, of a rank at tp=8 and two layers. No matrix becomes bfloat16; without w8a8 all of a layer's do."""
    scaled = [
        ScaledMatrices(
            jax.ShapeDtypeStruct((64, n, k), jnp.uint8),
            jax.ShapeDtypeStruct((64, n // 128, k // 128), jnp.float32),
            (128, 128),
            np.dtype(jnp.bfloat16),
        )
        for n, k in ((4096, 7168), (7168, 2048))
    ]
    chosen = [jax.ShapeDtypeStruct((32768, 8), dtype) for dtype in (jnp.int32, jnp.float32)]
    texts = {}
    for compute in ("w8a8", "w8a16"):

        def run(x: jax.Array, *operands: Any, compute: str = compute) -> jax.Array:
            rows = quantize(x, kernels=True) if compute == "w8a8" else x
            how: dict[str, Any] = {"num_experts": 32, "first": 32, "ep_size": 8, "implementation": "hopper"}
            return apply_experts(rows, *operands, **how)

        x = jax.ShapeDtypeStruct((32768, 7168), jnp.bfloat16)
        texts[compute] = jax.jit(run).trace(x, *chosen, *scaled).lower(lowering_platforms=("cuda",)).as_text()
    for target in ("w8a8", "quantize_rows", "quantize_gated"):
        assert f"stablehlo.custom_call @{target}(" in texts["w8a8"] and f"@{target}(" not in texts["w8a16"]
    dequantized = ("tensor<32x4096x7168xbf16>", "tensor<32x7168x2048xbf16>")
    assert not any(tensor in texts["w8a8"] for tensor in dequantized)
    assert all(tensor in texts["w8a16"] for tensor in dequantized)


@pytest.mark.skipif(not _ffi.built_for_cuda(), reason="the extension was built without CUDA")
@pytest.mark.parametrize(("mesh", "products"), [(None, 6 + 8), ("tp=2,cp=2,dp=2", 6 + 7)])
def test_a_decode_step_lowers_to_few_kernels_for_cuda(mesh: str | None, products: int) -> None:
    """Each stack's layer has one call for each of its parts, splits are scheduled once for all, and nothing is sorted. The same step
    without the kernels sorts."""

    def lowered(grouped_matmul: GroupedMatmul) -> str:
        model = random_model(
            mesh, config=REAL_DIMS_CONFIG, dtype=jnp.dtype(jnp.bfloat16), attention="fa3", grouped_matmul=grouped_matmul
        )
        driver = Driver(model, page_size=64, max_model_len=512)
        requests: list[StepRequest] = [StepRequest([1], 100, [0, 1])]
        batch = to_devices(model, driver.planner.host_batch([requests, *[[]] * (driver.planner.shape.dp - 1)]))
        return jax.jit(forward).trace(model, driver.pages, batch).lower(lowering_platforms=("cuda",)).as_text()

    def calls(text: str) -> dict[str, int]:
        return dict(collections.Counter(re.findall(r"stablehlo\.custom_call @(\w+)\(", text)))

    hopper, ragged = lowered("hopper"), lowered("ragged")
    # q_a, q_b, kv_a, o, and the two of an MLP, or of the shared and of the routed experts. tp=2 leaves the shared ones' down 32 inputs:
    # too few for the kernel.
    assert calls(hopper) == {
        "schedule_splits": 1,
        "mla_decode": 2,
        "add_norm": 4,
        "few_rows": products,
        "route": 1,
        "sort_pairs": 1,
    }
    assert "stablehlo.sort" not in hopper and "stablehlo.sort" in ragged
    assert calls(ragged) == {"schedule_splits": 1, "mla_decode": 2}
