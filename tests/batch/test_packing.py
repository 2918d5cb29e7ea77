"""Packing is undone exactly: every array of any step, on every device."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.columns import RequestColumns
from jax_mla_cp.batch.layout import build_batch, lay_out
from jax_mla_cp.batch.packing import DeviceBatch, pack
from jax_mla_cp.batch.shapes import BatchShape, CacheShape, StepShape
from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.mesh import MeshShape, declared_specs, make_mesh, on_devices
from tests.helpers.synthetic import CONFIG, step_layout


def batch(dp: int, cp: int, drafts: int, seed: int) -> Batch:
    """A step's arrays, filled with random bits: NaNs, infinities and negative zeros too."""
    shape = BatchShape(dp, cp, 2 * cp, 3, 16, CacheShape(2, 9, 8), draft_tokens=drafts)
    columns = RequestColumns.of([StepRequest([1, 2, 3], 4, [5], SamplingParams(seed=7))], shape)
    made = build_batch(step_layout([lay_out(columns, shape, CONFIG)] * dp, StepShape(5, 5, 0)), shape)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.integers(0, 2**32, x.shape, np.uint32).view(x.dtype), made)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_each_device_unpacks_its_own(dp: int, cp: int, drafts: int, seed: int) -> None:
    """Rank by rank, by the words that its device would have."""
    host = batch(dp, cp, drafts, seed)
    packed = pack(host, MeshShape(dp=dp, cp=cp))
    assert len({jax.tree.structure(pack(batch(dp, cp, drafts, s), MeshShape(dp=dp, cp=cp))) for s in (1, 2)}) == 1
    ranks, groups = packed.rank_words.reshape(dp * cp, -1), packed.group_words.reshape(dp, -1)
    starts = [4 * field.start for field in packed.fields] + [4 * ranks.shape[1], 4 * groups.shape[1]]
    assert not any(start % 16 for start in starts), "a kernel that is handed a slice refuses any other address"
    for rank in range(dp * cp):
        got = dataclasses.replace(packed, rank_words=ranks[rank], group_words=groups[rank // cp]).unpack()
        for ours, whole, spec in zip(
            jax.tree.leaves(got), jax.tree.leaves(host), jax.tree.leaves(declared_specs(host)), strict=True
        ):
            ways, number = (dp, rank // cp) if spec == declared_specs(host).slot_mapping else (dp * cp, rank)
            want = np.split(whole, ways)[number]
            assert ours.dtype == want.dtype
            np.testing.assert_array_equal(np.asarray(ours).view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("embeds", [False, True])
def test_on_a_mesh_it_is_the_identity(embeds: bool) -> None:
    host = batch(2, 2, 1, 0)
    if embeds:
        host = dataclasses.replace(host, embeds=np.random.default_rng(0).normal(size=(20, 3)))
    mesh = make_mesh("dp=2,cp=2,tp=2")
    packed = pack(host, MeshShape(2, 2, 2))
    on = on_devices(packed, declared_specs(packed), mesh)
    run = jax.shard_map(
        DeviceBatch.unpack, mesh=mesh, in_specs=(declared_specs(packed),), out_specs=declared_specs(host)
    )
    for ours, want in zip(jax.tree.leaves(jax.jit(run)(on)), jax.tree.leaves(host), strict=True):
        np.testing.assert_array_equal(np.asarray(ours).view(np.int32), want.astype(ours.dtype).view(np.int32))
    assert len(jax.tree.leaves(packed)) == 2 + embeds


def test_other_dtypes_are_refused() -> None:
    host = dataclasses.replace(batch(1, 1, 0, 0), tokens=np.zeros(5, np.int64))
    with pytest.raises(TypeError, match="must be int32, uint32 or float32, got int64"):
        pack(host, MeshShape())


def test_its_repr_lists_the_arrays_of_a_device() -> None:
    packed = pack(batch(2, 3, 1, 0), MeshShape(dp=2, cp=3))
    lines = {line.split()[0]: line for line in repr(packed).splitlines()[1:]}
    assert len(lines) == len(packed.fields) == len(jax.tree.leaves(packed.unpack()))
    assert "int32[5]" in lines["tokens"] and "'dp', 'cp'" in lines["tokens"]
    assert "int32[6, 3]" in lines["page_table"] and "'cp'" not in lines["page_table"]
    assert "uint32[4, 2]" in lines["sampling.seed"], "2 requests of 6 a rank, and a place more for each one's draft"


def test_a_field_without_a_spec_is_an_error() -> None:
    """A renamed or new field can't fall to a default."""
    declared = {field.name: field.metadata for field in dataclasses.fields(Batch)}
    assert all("spec" in metadata or metadata["static"] for metadata in declared.values())

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Undeclared(Batch):
        more: np.ndarray | None = None

    host = batch(1, 1, 0, 0)
    arrays = {field.name: getattr(host, field.name) for field in dataclasses.fields(Batch)}
    with pytest.raises(KeyError, match="spec"):
        declared_specs(Undeclared(**arrays, more=np.zeros(1, np.int32)))
