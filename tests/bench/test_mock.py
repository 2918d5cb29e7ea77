"""Mocked collectives on CPU devices, where the real ones exist to compare with."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_mla_cp.bench import program
from jax_mla_cp.bench.bench_options import WeightsKind
from jax_mla_cp.bench.mock import MockAxes, mock_build, noise
from jax_mla_cp.bench.program import make_build, make_model
from jax_mla_cp.bench.random_weights import favor_first_rank
from jax_mla_cp.config.presets import model_config
from jax_mla_cp.config.quantization import Quantization
from jax_mla_cp.mesh import CP, TP, Axes, MeshShape, make_mesh
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.model.router import route
from tests.helpers.synthetic import Driver, random_model

MESH = MeshShape(cp=2, tp=4)


def test_stand_ins_have_the_types_of_the_collectives() -> None:
    real, mocked = Axes(MESH), MockAxes(MESH, MESH.devices)

    def check(x: jax.Array) -> jax.Array:
        x = lax.pcast(x, TP, to="varying")
        for name, arguments in (("psum", (TP,)), ("all_gather", (CP,)), ("psum_scatter", (CP,))):
            want, got = (getattr(axes, name)(x, *arguments) for axes in (real, mocked))
            assert jax.typeof(want) == jax.typeof(got)
        whole = mocked.all_gather(mocked.psum(x, TP), CP)
        return jnp.concatenate([whole, real.all_gather(real.psum(x, TP), CP)])

    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    mapped = jax.shard_map(check, mesh=make_mesh(MESH), in_specs=P(CP), out_specs=P())
    out = np.asarray(jax.jit(mapped)(x))
    np.testing.assert_allclose(out[8:], 4 * x, rtol=1e-6)
    # The first device's half of the gather is its own sum, here a stand-in too; the other half is the gather's.
    np.testing.assert_allclose(out[:4], noise((4, 3), jnp.float32), rtol=1e-6)
    np.testing.assert_allclose(out[4:8], noise((8, 3), jnp.float32)[4:], rtol=1e-6)


def test_noise_is_spread_out() -> None:
    values = np.asarray(jax.jit(lambda: noise((512, 576), jnp.bfloat16))()).astype(np.float32)
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.02
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize(("mesh", "ep"), [("tp=2,cp=2", "tp"), ("tp=2,cp=2", "tp,cp")])
def test_with_real_collectives_the_program_is_the_true_one(mesh: str, ep: str) -> None:
    model = random_model(mesh, ep)
    fields = {f.name: getattr(model.build, f.name) for f in dataclasses.fields(model.build)}

    def logits(built: Model) -> np.ndarray:
        driver = Driver(built)
        return driver.step([(driver.request(), list(range(70)))])

    want = logits(model)
    np.testing.assert_array_equal(logits(Model(model.params, mock_build(mocked=False, **fields), model.mesh)), want)
    mocked = logits(Model(model.params, mock_build(mocked=True, **fields), model.mesh))
    assert np.isfinite(mocked).all()
    assert np.abs(mocked - want).max() > 0.1 * np.abs(want).max(), "negative control: stand-ins are other numbers"


def test_weights_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same spread, in the range of e4m3, and no NaN."""
    monkeypatch.setattr(program, "FP8_FORMAT", Quantization("fp8", (16, 16)))  # blocks of which the model has several
    params = make_model(make_build(model_config("tiny"), MESH, "tp", "bfloat16", "xla", WeightsKind("fp8"))).params
    for path, fan_in in ((("mlp", "gate_up"), 128), (("mla", "q_b"), model_config("tiny").q_lora_rank)):
        kept = params["moe"][path[0]][path[1]]
        stored = np.asarray(kept["q"].get_value()).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        assert np.isfinite(stored).all() and 20 < np.abs(stored).max() <= 448
        values = stored * np.asarray(kept["scale"].get_value()).max()
        assert fan_in is not None and abs(values.std() * fan_in**0.5 - 1) < 0.03


def test_weights_and_the_worst_routing() -> None:
    config = model_config("tiny")
    model = make_model(make_build(config, MESH, "tp", "bfloat16", "xla"))
    gate_up = model.params["moe"]["mlp"]["gate_up"].get_value()
    assert gate_up.shape == (3, 16, 2, 64, 128) and gate_up.sharding.shard_shape(gate_up.shape) == (3, 4, 2, 64, 128)
    values = np.asarray(gate_up).astype(np.float32)
    assert abs(values.std() * 128**0.5 - 1) < 0.02
    assert np.abs(values[:, :4] - values[:, 4:8]).max() > 0.1, "shards differ"
    assert (np.asarray(model.params["moe"]["attn_norm"].get_value()) == 1).all()
    for leaf in jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        shards = {str(s.index): np.asarray(s.data) for s in leaf.get_value().addressable_shards}
        for shard in leaf.get_value().addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), shards[str(shard.index)])

    assert model.mesh is not None
    skewed = favor_first_rank(model.params, model.build, model.mesh)["moe"]["mlp"]
    x = jax.random.normal(jax.random.key(0), (50, 128), jnp.bfloat16)
    chosen, _ = route(x, skewed["router"].get_value()[0], skewed["bias"].get_value()[0], config)
    assert (np.asarray(chosen) < 4).all(), "all four of a token's experts are among the first rank's four"


def test_the_worst_routing_without_a_bias() -> None:
    """DeepSeek-V2's router has none: equal scores, of which the first are chosen."""
    config = dataclasses.replace(model_config("tiny"), topk_method="group_limited_greedy", norm_topk_prob=False)
    model = make_model(make_build(config, MESH, "tp", "bfloat16", "xla"))
    assert model.mesh is not None
    router = favor_first_rank(model.params, model.build, model.mesh)["moe"]["mlp"]["router"].get_value()
    x = jax.random.normal(jax.random.key(0), (50, 128), jnp.bfloat16)
    chosen, weight = route(x, router[0], None, config)
    np.testing.assert_array_equal(chosen, np.broadcast_to(np.arange(4), (50, 4)))
    np.testing.assert_allclose(weight, 2.5 / 16, rtol=1e-6)
