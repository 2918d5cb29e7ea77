"""The step: one `shard_map` around the model, followed by the head and the sampler.

`forward` is what a notebook jits, `forward_and_sample` what the server runs. Both are plain functions of (model, pages, batch).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.packing import DeviceBatch, pack
from jax_mla_cp.batch.page_table import apply_changes, device_checksum
from jax_mla_cp.cache import PAGES_SPEC
from jax_mla_cp.mesh import CP, DP, TOKENS, declared_specs, mesh_shape, on_devices
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.loaded_model import Model, param_specs
from jax_mla_cp.step.logit_bias import LogitBiasArrays
from jax_mla_cp.step.sampling import SamplerOutput, TokenLogprobsArrays, gather_logprobs, sample
from jax_mla_cp.step.speculation import propose

SLOTS_SPEC = PartitionSpec(DP)
"""The sharding of what `forward_from_slots` keeps for each request slot: `last_tokens` and `page_table`."""
_LOGPROBS_BLOCK = 256
"""Tokens whose logits `_prompt_logprobs` holds in memory at a time: with a vocabulary of 129K, 132 MB."""


def forward(
    model: Model, pages: Float[Array, "pages page_size C"], batch: DeviceBatch
) -> tuple[Float[Array, "J Vp"], jax.Array]:
    """Runs a batch: logits after each request's last token, and the cache with the step's latents.

    With `draft_tokens` d, a request has 1 + d rows: after its last token before the drafts, and after each of them.

    Jit it with the cache donated, `jax.jit(forward, donate_argnums=1)`, or every call copies the cache.

    Returns:
      float32 logits, one row per place of the batch in its own order (see `Planner.batch`), padded vocabulary at -inf,
      sharded P(("dp", "cp")); and the cache, sharded as before.
    """

    def run(decoder: Decoder, pages: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden, pages = decoder(pages, batch)
        return _last_logits(decoder, hidden, batch), pages

    return _run(run, (PartitionSpec(TOKENS), PAGES_SPEC), model, pages, batch)


def forward_and_sample(
    model: Model,
    pages: jax.Array,
    batch: DeviceBatch,
    bias: LogitBiasArrays | None = None,
    *,
    prompt_logprobs: bool = False,
) -> tuple[SamplerOutput, jax.Array]:
    """`forward`, and a token sampled for each row of it; with speculation also the next drafts of each request.

    Args:
      bias: changes to the logits that tokens are sampled by.
      prompt_logprobs: also return the log-probability of the token after each token.

    Returns:
      The sampler's output, sharded P(("dp", "cp")), and the cache. On a mesh of several processes the output is replicated,
      so that each process can read all of it.
    """

    def run(
        decoder: Decoder, pages: jax.Array, batch: Batch, *bias: LogitBiasArrays
    ) -> tuple[SamplerOutput, jax.Array]:
        return _sample(decoder, pages, batch, *bias, prompt_logprobs=prompt_logprobs)

    output, pages = _run(
        run,
        (PartitionSpec(TOKENS), PAGES_SPEC),
        model,
        pages,
        batch,
        [] if bias is None else [(bias, PartitionSpec(TOKENS))],
    )
    return _readable(model, output), pages


def forward_from_slots(
    model: Model,
    pages: jax.Array,
    batch: DeviceBatch,
    bias: LogitBiasArrays,
    last_tokens: Int32[Array, " dp*I"],
    page_table: Int32[Array, "dp*I W"],
    *,
    prompt_logprobs: bool = False,
) -> tuple[SamplerOutput, jax.Array, jax.Array, jax.Array]:
    """`forward_and_sample` for steps whose state stays on the devices, in request slots.

    They may be dispatched before the one before has been read: tokens may be named by their slots, and sampled ones are kept
    there. With speculation, tokens are not. The batch brings changes of the page table in place of a table.

    Args:
      last_tokens: the token that was sampled last for each of a dp group's request slots, sharded P("dp").
      page_table: the pages of each of a dp group's request slots, sharded P("dp"). Donate it.

    Returns:
      As `forward_and_sample`, and the new `last_tokens` and `page_table`, equal on all cp ranks: a request's next row may be on
      another one. The output has the checksum of the new `page_table`.
    """

    def run(
        decoder: Decoder,
        pages: jax.Array,
        batch: Batch,
        bias: LogitBiasArrays,
        last_tokens: jax.Array,
        page_table: jax.Array,
    ) -> tuple[SamplerOutput, jax.Array, jax.Array, jax.Array, jax.Array]:
        assert batch.table_changes is not None, "the batch brings a page table of its own"
        with jax.named_scope("page_table"):
            page_table = apply_changes(page_table, batch.table_changes)
            checksum = device_checksum(page_table)
        batch = dataclasses.replace(batch, page_table=page_table)
        if batch.slots is None:
            sampled, pages = _sample(decoder, pages, batch, bias, prompt_logprobs=prompt_logprobs)
            return sampled, checksum, pages, last_tokens, page_table
        sampled, pages = _sample(
            decoder, pages, _with_last_tokens(batch, last_tokens), bias, prompt_logprobs=prompt_logprobs
        )
        drawn = decoder.build.axes.all_gather(sampled.token, CP)
        return sampled, checksum, pages, last_tokens.at[batch.slots].set(drawn, mode="drop"), page_table

    specs = (PartitionSpec(TOKENS), SLOTS_SPEC, PAGES_SPEC, SLOTS_SPEC, SLOTS_SPEC)
    per_device = ((bias, PartitionSpec(TOKENS)), (last_tokens, SLOTS_SPEC), (page_table, SLOTS_SPEC))
    output, checksum, *kept = _run(run, specs, model, pages, batch, per_device)
    return _readable(model, dataclasses.replace(output, table_checksum=checksum)), *kept


def to_devices(model: Model, batch: Batch) -> DeviceBatch:
    """Packs a host batch and places it on this process's devices of the model's mesh."""
    return place(model, pack(batch, mesh_shape(model.mesh)))


def place(model: Model, packed: DeviceBatch) -> DeviceBatch:
    """Places a packed host batch on this process's devices of the model's mesh. Every process must pass the same one."""
    return on_devices(packed, declared_specs(packed), model.mesh)


def _run(
    per_device: Callable[..., Any],
    out_specs: Any,
    model: Model,
    pages: jax.Array,
    batch: DeviceBatch,
    more: Sequence[tuple[Any, PartitionSpec]] = (),
) -> Any:
    """Calls `per_device(decoder, pages, batch, *more)` on each device; each of `more` with its spec."""
    arrays = [array for array, _ in more]

    def run(params: Any, pages: jax.Array, batch: DeviceBatch, *arrays: Any) -> Any:
        return per_device(model.decoder(params), pages, batch.unpack(), *arrays)

    if model.mesh is None:
        return run(model.params, pages, batch, *arrays)
    in_specs = (param_specs(model.params), PAGES_SPEC, declared_specs(batch), *(spec for _, spec in more))
    mapped = jax.shard_map(run, mesh=model.mesh, in_specs=in_specs, out_specs=out_specs)
    return mapped(model.params, pages, batch, *arrays)


def _sample(
    decoder: Decoder, pages: jax.Array, batch: Batch, *bias: LogitBiasArrays, prompt_logprobs: bool
) -> tuple[SamplerOutput, jax.Array]:
    """The model, the head and the sampler, per device; with speculation the next drafts too."""
    hidden, pages = decoder(pages, batch)
    logits = _last_logits(decoder, hidden, batch)
    with jax.named_scope("sample"):
        sampled = sample(logits[:, : decoder.build.config.vocab_size], batch.sampling, *bias)
    if batch.speculation is not None:
        with jax.named_scope("propose"):
            drafts, pages = propose(decoder, hidden, pages, batch, sampled.token)
            sampled = dataclasses.replace(sampled, drafts=drafts)
    if prompt_logprobs:
        sampled = dataclasses.replace(sampled, prompt_logprobs=_prompt_logprobs(decoder, hidden, batch))
    return sampled, pages


def _readable(model: Model, output: SamplerOutput) -> SamplerOutput:
    """On a mesh of several processes, the output replicated."""
    if model.mesh is None or not model.mesh.is_multi_process:
        return output
    return lax.with_sharding_constraint(output, NamedSharding(model.mesh, PartitionSpec()))


def _with_last_tokens(batch: Batch, last_tokens: jax.Array) -> Batch:
    """The batch with the tokens that it names by their slots (`jax_mla_cp.batch.step_request.last_sampled`)."""
    named = last_tokens.at[-1 - batch.tokens].get(mode="clip")
    return dataclasses.replace(batch, tokens=jnp.where(batch.tokens < 0, named, batch.tokens))


def _last_logits(decoder: Decoder, hidden: jax.Array, batch: Batch) -> jax.Array:
    """Logits after each request's last tokens, per device: each cp rank brings the tokens that it has, and gets the sum for
    its share of the requests."""
    with jax.named_scope("head"):
        last = hidden.at[batch.last_index].get(mode="fill", fill_value=0)
        return decoder.logits(decoder.build.axes.psum_scatter(last, CP))


def _prompt_logprobs(decoder: Decoder, hidden: jax.Array, batch: Batch) -> TokenLogprobsArrays:
    """The log-probability of the token after each token of the buffer, per device, block by block."""
    tokens = hidden.shape[0]
    size = min(_LOGPROBS_BLOCK, tokens)

    def block(inputs: tuple[jax.Array, jax.Array]) -> TokenLogprobsArrays:
        hidden, next_token = inputs
        logits = decoder.logits(hidden)[:, : decoder.build.config.vocab_size]
        return TokenLogprobsArrays(*gather_logprobs(jax.nn.log_softmax(logits), next_token))

    with jax.named_scope("prompt_logprobs"):
        hidden = jnp.pad(hidden, ((0, -tokens % size), (0, 0))).reshape(-1, size, hidden.shape[1])
        next_tokens = jnp.pad(batch.next_tokens, (0, -tokens % size)).reshape(-1, size)
        return jax.tree.map(lambda x: lax.collapse(x, 0, 2)[:tokens], lax.map(block, (hidden, next_tokens)))
