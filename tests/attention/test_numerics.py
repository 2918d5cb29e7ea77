"""`einsum_float32` on the platform that a program is lowered for."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_mla_cp.attention.numerics import einsum_float32
from jax_mla_cp.mesh import make_mesh


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    return einsum_float32("td,dv->tv", a, b)


def test_bfloat16_products_are_summed_in_float32() -> None:
    """The same in plain calls and in `shard_map`, where it keeps its type; and no branch is left in the program."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((4, 512), (512, 6)))
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    mapped = jax.jit(
        jax.shard_map(product, mesh=make_mesh("tp=2,cp=2"), in_specs=(P("cp"), P(None, "tp")), out_specs=P("cp", "tp"))
    )
    for out in (product(a, b), mapped(a, b)):
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-4)
    assert "conditional" not in mapped.lower(a, b).compile().as_text()


def test_operands_are_widened_for_cpus_only() -> None:
    shapes = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in ((4, 8), (8, 6))]
    traced = jax.jit(product).trace(*shapes)

    def operands(platform: str) -> list[str]:
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return re.findall(r"dot_general.*\(tensor<4x8x(\w+)>", text)

    assert operands("cpu") == ["f32"]
    assert operands("cuda") == ["bf16"]
