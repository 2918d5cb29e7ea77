"""Speculation with the MTP layer: against a float64 reference on every rank, and token for token against plain decoding."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from jax_mla_cp.batch.form import Form
from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.results import StepResult
from tests.helpers import reference
from tests.helpers.speculative import CONFIG, PAGE, OneBucket, Watched, generate, model, weights
from tests.test_cache import copies_of

GREEDY = SamplingParams(temperature=0)
PROMPTS = [
    np.random.default_rng(i).integers(0, CONFIG.vocab_size, n).tolist() for i, n in enumerate((23, 7, 1, 4, 12, 2, 9))
]
COUNTS = [24, 30, 1, 2, 27, 30, 19]
MESHES = [
    ("dp=2", "tp", 1, "absorbed"),
    (None, "tp", 2, "absorbed"),
    ("tp=2,cp=2", "tp,cp", 3, "expanded"),  # a request with 3 drafts is divided over the cp ranks
    ("cp=3", "tp", 4, "absorbed"),
]
PARAMETERS = ("mesh", "ep", "draft_tokens", "form")


@functools.cache
def runner(mesh: str | None = None, ep: str = "tp", draft_tokens: int = 0, form: Form = "absorbed") -> OneBucket:
    return OneBucket(model(mesh, ep), draft_tokens, form=form)


greedily = functools.cache(lambda: generate(runner(), PROMPTS, COUNTS))


@pytest.mark.parametrize(PARAMETERS, MESHES)
def test_greedy_tokens_are_the_same(mesh: str | None, ep: str, draft_tokens: int, form: Form) -> None:
    """Prompts in chunks beside decoding, page borders inside of drafts, requests that end within a run of them."""
    steps = runner(mesh, ep, draft_tokens, form)
    held: collections.Counter[int] = collections.Counter()

    def count(request: StepRequest, result: StepResult) -> None:
        if request.drafts == draft_tokens:
            held[len(result.sampled) - 1] += 1

    want, got = greedily(), generate(Watched(steps, count), PROMPTS, COUNTS)
    assert got.tokens == want.tokens
    for ours, theirs in zip(got.logprobs, want.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert got.idle and want.idle and want.speculation is None
    assert set(held) == set(range(draft_tokens + 1)), "no draft held, some did, all did"
    assert got.speculation is not None
    assert 0.2 < got.speculation.acceptance_rate < 0.9


@functools.cache
def expected(tokens: tuple[int, ...], count: int) -> tuple[list[int], np.ndarray]:
    """Guesses at what follows, and the latents [layers + 1, .., R + r]: those of all layers but for the last token, and, in
    the MTP layer, of the guesses that came from guesses."""
    drafts, result = reference.propose(CONFIG, weights(), tokens, count)
    layers = reference.forward(CONFIG, weights(), tokens[:-1]).latents
    beyond = np.full((len(layers), count - 1, layers.shape[-1]), np.nan)
    return drafts, np.concatenate([np.concatenate([layers, beyond], 1), result.latents[None]])


def compare(steps: OneBucket, group: int, pages: Sequence[int], tokens: Sequence[int], drafts: Sequence[int]) -> None:
    """`tokens` and their successor have been seen; `drafts` proposed."""
    follows = int(reference.forward(CONFIG, weights(), tokens).logits[-1].argmax())
    want, latents = expected((*tokens, follows), len(drafts))
    assert list(drafts) == want
    for device in steps.latents(group, pages):
        got = device[:, : latents.shape[1]]
        known = ~np.isnan(latents)
        np.testing.assert_allclose(got[known], latents[known], atol=2e-5)


def chunks(steps: OneBucket, *, shift: int = 0) -> tuple[np.ndarray, list[list[int]]]:
    """A prompt in two chunks, the second beside another prompt; the last step's drafts, and each one's pages."""
    steps.reset()
    long, short = PROMPTS[0][:15], PROMPTS[1]
    pages = [[3, 0, 5, 2, 9], [1, 4, 8, 7]]
    first = StepRequest(long[:9], 0, pages[0], next_token=long[9])
    second = [StepRequest(short, 0, pages[1], GREEDY), StepRequest(long[9:], 9, pages[0], GREEDY)]
    others: list[list[StepRequest]] = [[] for _ in range(steps.dp - 1)]
    for requests in ([first], second):
        batch = steps.planner.host_batch([*others, requests])
        batch = dataclasses.replace(batch, next_tokens=np.roll(batch.next_tokens, shift))
        drafts = steps.propose(batch)
    return drafts[-1], pages


@pytest.mark.parametrize(PARAMETERS, MESHES)
def test_latents_and_drafts_are_the_references(mesh: str | None, ep: str, draft_tokens: int, form: Form) -> None:
    """On every device. The latents of recycled states follow from the layer's whole output."""
    steps = runner(mesh, ep, draft_tokens, form)
    assert (steps.planner.step_shapes[-1].expanded_keys > 0) == (form == "expanded")
    drafts, pages = chunks(steps)
    compare(steps, steps.dp - 1, pages[1], PROMPTS[1], drafts[0])
    compare(steps, steps.dp - 1, pages[0], PROMPTS[0][:15], drafts[1])


def test_verified_tokens_leave_the_same_as_a_prompt() -> None:
    """A draft that holds and one that doesn't: what is proposed next is what would be for the tokens alone."""
    steps = runner(*MESHES[1])
    _, pages = chunks(steps)
    true = list(PROMPTS[1])
    for _ in range(3):
        true.append(int(reference.forward(CONFIG, weights(), true).logits[-1].argmax()))
    length = len(PROMPTS[1])
    tokens = [true[length], true[length + 1], (true[length + 2] + 1) % CONFIG.vocab_size]
    batch = steps.planner.host_batch([[StepRequest(tokens, length, pages[1], GREEDY, drafts=2)]])
    compare(steps, 0, pages[1], true[: length + 2], steps.propose(batch)[0, 0])


@pytest.mark.parametrize(PARAMETERS, MESHES[2:])
def test_stale_memory_reaches_no_output(mesh: str, ep: str, draft_tokens: int, form: Form) -> None:
    """NaN in every page at first. Whoever writes the first token of a page, drafts that don't hold and recycled ones too,
    leaves no NaN in it: kernels may read a tile that reaches past a row's end."""
    steps = runner(mesh, ep, draft_tokens, form)
    steps.poison()

    def look(request: StepRequest, result: StepResult) -> None:
        stale = np.isnan(steps.pages()).reshape(len(steps.pages()), -1)
        assert stale.all(1).any() and not stale.all()
        assert (stale.all(1) == stale.any(1)).all()

    assert generate(Watched(steps, look), PROMPTS, COUNTS).tokens == greedily().tokens
    steps.reset()


def test_a_wrong_next_token_is_noticed() -> None:
    """Negative control: every token's next one is its neighbor's."""
    steps = runner(*MESHES[2])
    drafts, pages = chunks(steps, shift=1)
    with pytest.raises(AssertionError):
        compare(steps, 0, pages[1], PROMPTS[1], drafts[0])
    right = steps.latents(0, pages[1])[0][: CONFIG.num_layers, : len(PROMPTS[1])]
    np.testing.assert_allclose(right, expected((*PROMPTS[1], 0), 1)[1][: CONFIG.num_layers], atol=2e-5)


SEEDS = 2000
PROMPT = PROMPTS[1][:4]


@functools.cache
def sampled(draft_tokens: int) -> np.ndarray:
    """[seeds, 3] tokens after one prompt."""
    steps = runner(None, "tp", draft_tokens)
    return np.array(generate(steps, [PROMPT] * SEEDS, 3, [SamplingParams(seed=seed) for seed in range(SEEDS)]).tokens)


def probabilities() -> np.ndarray:
    """[V, V, V]: of the three tokens after the prompt, in float64."""
    size = CONFIG.vocab_size

    def after(tokens: list[int]) -> np.ndarray:
        logits = reference.forward(CONFIG, weights(), PROMPT + tokens).logits[-1]
        p = np.exp(logits - logits.max())
        return np.asarray(p / p.sum())

    joint = np.zeros((size, size, size))
    for a, p in enumerate(after([])):
        for b, q in enumerate(after([a])):
            joint[a, b] = p * q * after([a, b])
    return joint


def p_value(tokens: np.ndarray) -> float:
    """The p-value of a chi-square test of the last two tokens, which drafts stood for; rare pairs count as one."""
    expect = probabilities().sum(0).reshape(-1) * len(tokens)
    counts = np.bincount(tokens[:, 1] * CONFIG.vocab_size + tokens[:, 2], minlength=len(expect))
    rare = expect < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    return float(stats.chisquare(counts, np.append(expect[~rare], expect[rare].sum())).pvalue)


def test_sampled_tokens_have_the_models_distribution() -> None:
    assert p_value(sampled(2)) > 0.01


def test_sampled_tokens_are_the_same_for_the_same_seeds() -> None:
    np.testing.assert_array_equal(sampled(2), sampled(0))
    assert len(np.unique(sampled(0), axis=0)) > 100


def test_accepting_every_draft_is_noticed() -> None:
    """Negative control of the statistical test."""
    steps = runner(*MESHES[1])

    def believe(request: StepRequest, result: StepResult) -> None:
        if request.drafts:
            last = result.sampled[-1]
            guesses = list(request.tokens)[-request.drafts :]
            result.sampled[:] = [*(dataclasses.replace(last, token=guess) for guess in guesses), last]

    how = [SamplingParams(seed=seed) for seed in range(600)]
    run = generate(Watched(steps, believe), [PROMPT] * len(how), 3, how)
    assert p_value(np.array(run.tokens)) < 1e-9


def test_the_compiled_step_copies_no_cache() -> None:
    for mesh, ep, draft_tokens, form in MESHES:
        steps = runner(mesh, ep, draft_tokens, form)
        assert not copies_of(steps.program.as_text(), (steps.planner.shape.cache.total_pages, PAGE, CONFIG.latent_dim))


def test_next_tokens_need_no_collective() -> None:
    """The gathers over cp: the model's latents, the MTP layer's twice (of the step, of recycled drafts), and what was
    sampled; over tp: logits. What is scattered: states, where tokens are sampled after and where drafts come from."""
    steps = runner(*MESHES[3])
    shape, c = steps.planner.shape, CONFIG
    text = steps.program.as_text()
    gathers = re.findall(r"= (\w+\[[\d,]*\])\S* all-gather(?:-start)?\(", text)
    tokens = 3 * steps.planner.buckets[-1]
    latents = [f"f32[{tokens},{c.latent_dim}]"] * 2 + [f"f32[{shape.max_requests},{c.latent_dim}]"]
    share = shape.max_requests // 3
    logits = [f"f32[{n},{c.vocab_size}]" for n in (share * shape.samples_per_request, share, share)]
    assert sorted(gathers) == sorted([*latents, *logits, f"s32[{shape.max_requests},{shape.samples_per_request}]"])
    scatters = re.findall(r"= (\w+\[[\d,]*\])\S* reduce-scatter\(", text)
    assert sorted(scatters) == sorted([f"f32[{n},{c.hidden_size}]" for n in (share, share * shape.samples_per_request)])
    assert not re.search(r"all-to-all|collective-permute", text)


def test_drafts_need_the_layer() -> None:
    without = dataclasses.replace(model().build, mtp=False)
    with pytest.raises(
        ConfigError, match=r"draft_tokens: 1 needs the MTP layer, got a model without it\. Load it with mtp=True"
    ):
        Planner.create(dataclasses.replace(model(), build=without), cache_tokens=64, draft_tokens=1)
    with pytest.raises(ConfigError, match="draft_tokens: must be 0 to 4, got 5"):
        Planner.create(model(), cache_tokens=64, draft_tokens=5)
    with pytest.raises(ConfigError, match=r"mtp: the model has no layer for multi-token prediction"):
        model(config=dataclasses.replace(CONFIG, num_mtp_layers=0))
