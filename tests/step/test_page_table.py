"""The runner's page table stays on the devices: a decode step sends next to nothing, and another table is noticed."""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jax_mla_cp.batch.form import Form
from jax_mla_cp.batch.layout import build_batch
from jax_mla_cp.batch.packing import pack
from jax_mla_cp.batch.page_table import TableMirror
from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.bench.bench_options import make
from jax_mla_cp.bench.host_step import make_planner
from jax_mla_cp.config.presets import model_config
from jax_mla_cp.mesh import AXES, MeshShape
from jax_mla_cp.step.errors import PageTableLost
from jax_mla_cp.step.results import RunnerOutput
from tests.helpers.speculative import CONFIG, PAGE, OneBucket, model

GREEDY = SamplingParams(temperature=0)
PROMPT = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 9).tolist()


@functools.cache
def runner(mesh: str | None = None, draft_tokens: int = 0, form: Form = "absorbed") -> OneBucket:
    return OneBucket(model(mesh), draft_tokens, form=form)


def tokens_of(output: RunnerOutput) -> list[list[int]]:
    return [[s.token for result in group for s in result.sampled] for group in output.results]


def prompt(steps: OneBucket, pages: Sequence[int] = range(3), slot: int = 1) -> RunnerOutput:
    """The prompt in every dp group."""
    return steps.step([[StepRequest(PROMPT, 0, pages, GREEDY, slot=slot)]] * steps.dp)


def damage(steps: OneBucket, group: int) -> None:
    """Changes one entry on the devices, which no request uses."""
    row = (group + 1) * steps.planner.shape.max_requests - 1
    steps._page_table = jax.jit(lambda table: table.at[row, -1].add(1), donate_argnums=0)(steps._page_table)


@pytest.mark.parametrize(
    ("mesh", "draft_tokens", "group"), [(None, 0, 0), ("tp=2,cp=2", 0, 0), ("dp=2,cp=3", 0, 1), ("dp=2", 1, 0)]
)
def test_another_table_on_the_devices_is_noticed(mesh: str | None, draft_tokens: int, group: int) -> None:
    steps = runner(mesh, draft_tokens)
    steps.reset()
    want = tokens_of(prompt(steps))
    damage(steps, group)
    for _ in range(2):  # it does not heal by itself
        with pytest.raises(PageTableLost, match=rf"the page table of dp group {group} is not the host's: its checksum"):
            prompt(steps)
    steps.reset()
    assert tokens_of(prompt(steps)) == want


def test_a_step_that_is_prepared_and_not_run_is_noticed() -> None:
    steps = runner()
    steps.reset()
    steps.prepare([[StepRequest(PROMPT, 0, [5, 6, 7], GREEDY, slot=0)]])
    with pytest.raises(PageTableLost):
        prompt(steps)


def test_a_step_that_is_refused_changes_nothing() -> None:
    steps = runner()
    steps.reset()
    prompt(steps)
    good = StepRequest(PROMPT, 0, [7, 8, 9], GREEDY, slot=0)
    for bad in (
        StepRequest([CONFIG.vocab_size], 0, [5], GREEDY, slot=1),
        StepRequest([1], 0, [5], GREEDY, slot=1, embeds=np.zeros((1, CONFIG.hidden_size), np.float32)),
    ):
        with pytest.raises(ValueError, match=r"token id|embeds: give them for all"):
            steps.step([[good, bad]])
    prompt(steps)


def test_pages_that_a_request_gets_in_place_of_others_are_sent() -> None:
    """As the engine commits a page that another request has computed too: the same tokens from the other page."""
    steps = runner()
    steps.reset()
    first = tokens_of(prompt(steps, [0, 1, 2], slot=1))[0]
    prompt(steps, [3, 4, 5], slot=2)
    steps._pages = jax.jit(lambda pages: pages.at[:2].set(np.nan), donate_argnums=0)(steps._pages)
    follow = [StepRequest(first, len(PROMPT), pages, GREEDY, slot=1) for pages in ([3, 4, 2], [0, 1, 2])]
    good, bad = (steps.step([[request]]).results[0][0].sampled[0] for request in follow)
    assert np.isfinite(good.logprob) and np.isnan(bad.logprob), "negative control: the old ones are not what they were"


@pytest.mark.parametrize(("mesh", "draft_tokens"), [(None, 0), ("cp=2", 0), (None, 3)])
def test_what_an_earlier_request_left_in_a_slot_is_not_seen(mesh: str | None, draft_tokens: int) -> None:
    """The table still names its pages, which are NaN; attention's blocks of keys reach as far as them."""
    steps = runner(mesh, draft_tokens)
    steps.reset()
    want = prompt(steps, [20, 21, 22]).results[0][0]
    steps.reset()
    pages = range(14)
    steps.step([[StepRequest([1], len(pages) * PAGE - 1, pages, slot=1)]])
    steps.poison()
    table = np.asarray(steps._page_table)[1]
    assert table[:14].tolist() == list(pages)
    got = prompt(steps, [20, 21, 22]).results[0][0]
    assert [s.token for s in got.sampled] == [s.token for s in want.sampled] and got.drafts == want.drafts
    np.testing.assert_array_equal(got.sampled[0].logprob, want.sampled[0].logprob)


@pytest.mark.parametrize("mesh", [None, "cp=3", "dp=2,cp=2"])
def test_recycled_drafts_are_the_same_in_any_slot(mesh: str | None) -> None:
    """Their passes read the table by themselves: the drafts are those of a batch that brings its own, and so is the MTP layer's cache."""
    steps = runner(mesh, 3)
    pages = [range(4), range(8, 12)]
    requests = [StepRequest(PROMPT[: 9 - 4 * i], 0, pages[i], GREEDY, slot=4 - 3 * i) for i in range(2)]
    steps.reset()
    want = steps.propose(steps.planner.host_batch([requests] * steps.dp))[:, :2].tolist()
    latents = steps.pages()
    steps.reset()
    got = steps.step([requests] * steps.dp)
    assert [[result.drafts for result in group] for group in got.results] == want
    np.testing.assert_array_equal(steps.pages(), latents)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_the_compiled_step_copies_no_table(draft_tokens: int, form: Form) -> None:
    steps = runner("tp=2,cp=2", draft_tokens, form)
    shape = steps.planner.shape
    rows, width = shape.max_requests, shape.max_pages
    text = steps.program.as_text()
    assert re.search(rf"s32\[{rows},{width}\]", text)
    assert not re.search(rf"= s32\[(?:{rows},{width}|{rows * width})\]\S* copy(?:-start)?\(", text)
    before = steps._page_table
    prompt(steps)
    assert before.is_deleted(), "it was donated"


STEPS, CONTEXT, DECODING = 96, 128 * 1024, 64


@pytest.mark.parametrize("cp", [1, 4, 8])
def test_a_decode_step_of_long_requests_sends_little(cp: int) -> None:
    """64 requests at 128K: at most 64 KB in the median step, in fact in every one but the first. Each begins a page now and then."""
    mesh = MeshShape(tp=8, cp=cp)
    planner = make_planner(
        make("host", mesh=mesh, shapes=((DECODING, CONTEXT),)),
        model_config("deepseek_v3"),
        AbstractMesh((1, cp, 8), AXES),
    )
    page, shape = planner.shape.cache.page_size, planner.shape
    pages = np.random.default_rng(0).permutation(shape.cache.pages_per_layer).reshape(DECODING, -1)
    assert (shape.max_requests, shape.max_pages, pages.shape[1]) == (64, 2048, 2048)
    mirror, sent, entries = TableMirror(shape), [], []
    for n in range(STEPS):
        ends = [CONTEXT - 2 * STEPS - 3 * i + n for i in range(DECODING)]
        requests = [
            StepRequest([1], end - 1, mine[: -(-end // page)], SamplingParams(), slot=i)
            for i, (end, mine) in enumerate(zip(ends, pages, strict=True))
        ]
        layout = planner.lay_out([requests[n % DECODING :] + requests[: n % DECODING]])
        update = mirror.update(layout.columns, layout.step)
        mirror.apply(update)
        packed = pack(build_batch(layout, shape, update), mesh)
        whole = 0 if update.whole is None else update.whole.nbytes
        sent.append(sum(array.nbytes for array in jax.tree.leaves(packed)) + update.checksum.nbytes + whole)
        entries.append(len(update.entries[0][0]))
    assert statistics.median(sent) <= 64 * 1024
    assert sent[0] > 2**19 and max(sent[1:]) <= 64 * 1024
    assert sum(entries[1:]) >= DECODING and max(entries[1:]) < DECODING
