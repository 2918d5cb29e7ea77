"""Adjusted logits: penalties against vLLM's definitions, token by token, and the arrays that each device gets of them."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp.batch.check import check_requests
from jax_mla_cp.batch.columns import RequestColumns
from jax_mla_cp.batch.logit_bias import LogitBias
from jax_mla_cp.batch.shapes import BatchShape, CacheShape
from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.engine.logits_processor import LogitsProcessor
from jax_mla_cp.mesh import make_mesh, mesh_shape
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.step import logit_bias
from jax_mla_cp.step.sampling import sample
from tests.helpers.synthetic import CONFIG
from tests.step.test_sampling import how

VOCAB = CONFIG.vocab_size
SIZE = 40  # of the vocabulary in tests without a model
NONE = np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32)


def words(allowed: list[int], size: int = SIZE) -> np.ndarray:
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[allowed] = 1
    return np.packbits(bits, bitorder="little").view("<u4")


def penalised(
    logits: np.ndarray, prompt: list[int], answer: list[int], presence: float, frequency: float, repetition: float
) -> np.ndarray:
    """As vLLM's documentation and apply_penalties have it, in float64, one token at a time."""
    out, counts = logits.astype(np.float64), collections.Counter(answer)
    for token in set(prompt) | set(answer):
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
    for token, count in counts.items():
        out[token] -= frequency * count + presence
    return out


def applied(logits: np.ndarray, bias: LogitBias | None) -> np.ndarray:
    """A row of logits as the device changes it."""
    if bias is None:
        return logits
    add, scale = np.zeros_like(logits), np.ones_like(logits)
    add[bias.tokens], scale[bias.tokens] = bias.add, bias.scale
    mask = words(list(range(SIZE))) if bias.mask is None else bias.mask
    arrays = logit_bias.LogitBiasArrays(*(jnp.asarray(x)[None] for x in (add, scale, mask, True)))
    return np.asarray(logit_bias.apply_logit_bias(jnp.asarray(logits)[None], jnp.asarray(logits)[None], arrays))[0]


tokens = st.lists(st.integers(0, SIZE - 1), max_size=30)
penalty = st.sampled_from([0.0, 0.5, -1.25, 2.0])


@given(tokens, tokens, penalty, penalty, st.sampled_from([1.0, 1.3, 0.5]))
@settings(deadline=None, max_examples=40)
def test_penalties_are_vllms(
    prompt: list[int], answer: list[int], presence: float, frequency: float, repetition: float
) -> None:
    logits_processor = LogitsProcessor(
        prompt, presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition
    )
    for token in answer:
        logits_processor.push(token)
    logits = np.random.default_rng(len(prompt)).normal(0, 3, SIZE).astype(np.float32)
    want = penalised(logits, prompt, answer, presence, frequency, repetition)
    np.testing.assert_allclose(applied(logits, logits_processor.bias(False)), want, rtol=1e-5, atol=1e-5)


def test_biases_bans_and_masks() -> None:
    logits = np.arange(SIZE, dtype=np.float32) - 20
    logits_processor = LogitsProcessor([3], repetition_penalty=2.0, logit_bias={3: 5.0, 39: -100.0}, banned=[38, 37])
    got = applied(logits, logits_processor.bias(True))
    want = logits.copy()
    want[[3, 39, 38, 37]] = -17 * 2 + 5, 19 - 100, -np.inf, -np.inf
    np.testing.assert_array_equal(got, want)
    want[[38, 37]] = 18, 17
    np.testing.assert_array_equal(applied(logits, logits_processor.bias(False)), want)
    got = applied(logits, logits_processor.bias(True, words([0, 31, 32, 37])))
    assert np.flatnonzero(got > -np.inf).tolist() == [0, 31, 32]


def test_nothing_to_do_is_none() -> None:
    logits_processor = LogitsProcessor([1, 2], banned=[5])
    logits_processor.push(1)
    assert logits_processor.bias(False) is None and logits_processor.bias(True) is not None
    assert LogitsProcessor([1]).bias(True) is None
    assert LogitsProcessor([1], frequency_penalty=1.0).bias(False) is None, "nothing was sampled yet"


def test_a_ban_gives_way_to_a_grammar_at_its_end() -> None:
    bias = LogitsProcessor([1], banned=[5, 6]).bias(True, words([5]))
    assert bias is not None and bias.allows_any(SIZE) and len(bias.tokens) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"presence_penalty": float("nan")}, "presence_penalty must be a finite number, got nan"),
        ({"logit_bias": {3: float("inf")}}, r"logit_bias\[3\] must be a finite number, got inf"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a positive float32, got 0.0"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty must be a positive float32, got 1e-46"),
        ({"repetition_penalty": 1e39}, "repetition_penalty must be a positive float32, got 1e[+]39"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be a positive float32, got nan"),
    ],
)
def test_logits_processor_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogitsProcessor([1], **fields)


def listed(*tokens: int, add: float = 0.0, scale: float = 1.0) -> LogitBias:
    return LogitBias(np.array(tokens), np.full(len(tokens), add, np.float32), np.full(len(tokens), scale, np.float32))


GOOD = StepRequest([1, 2, 3], 0, [4], SamplingParams())
SHAPE = BatchShape(1, 1, 4, 8, 0, CacheShape(2, 9, 8), draft_tokens=2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            dataclasses.replace(GOOD, logit_bias=listed(3, VOCAB)),
            f"request 1: token id {VOCAB} is not in the vocabulary",
        ),
        (dataclasses.replace(GOOD, logit_bias=listed(-1)), "token id -1 is not in the vocabulary"),
        (dataclasses.replace(GOOD, logit_bias=listed(3, 3)), "must rise strictly"),
        (dataclasses.replace(GOOD, logit_bias=listed(3, add=np.inf)), "add must be finite or -inf .* got inf and 1.0"),
        (dataclasses.replace(GOOD, logit_bias=listed(3, add=np.nan)), "got nan"),
        (dataclasses.replace(GOOD, logit_bias=listed(3, scale=0)), "scale positive, got 0.0 and 0.0"),
        (dataclasses.replace(GOOD, logit_bias=dataclasses.replace(listed(3), add=NONE[1])), "equally long lists"),
        (
            dataclasses.replace(GOOD, logit_bias=LogitBias(*NONE, words([1]))),
            r"mask must be uint32 \[8\], got uint32 \[2\]",
        ),
        (dataclasses.replace(GOOD, logit_bias=LogitBias(*NONE, words([], VOCAB))), "leaves no token"),
        (dataclasses.replace(GOOD, logit_bias=LogitBias(*NONE, words([VOCAB, 255], VOCAB))), "leaves no token"),
        (dataclasses.replace(GOOD, logit_bias=listed(*range(VOCAB), add=-np.inf)), "leaves no token"),
        (
            dataclasses.replace(GOOD, logit_bias=dataclasses.replace(listed(7, add=-np.inf), mask=words([7], VOCAB))),
            "leaves no token",
        ),
        (dataclasses.replace(GOOD, drafts=1, logit_bias=listed(3)), "logit_bias can't be combined with drafts"),
        (
            dataclasses.replace(GOOD, sampling=None, logit_bias=listed(3)),
            "logit_bias is for tokens after which one is sampled",
        ),
    ],
)
def test_a_step_refuses(bad: StepRequest, message: str) -> None:
    columns = RequestColumns.of([dataclasses.replace(GOOD, pages=[5]), bad], SHAPE)
    with pytest.raises(ValueError, match=message):
        check_requests(columns, SHAPE, CONFIG)


def random_bias(rng: np.random.Generator, count: int, mask: bool) -> LogitBias:
    tokens = np.sort(rng.choice(VOCAB, count, replace=False)).astype(np.int32)
    add = np.where(rng.random(count) < 0.1, -np.inf, rng.normal(size=count))
    allowed = words(np.flatnonzero(rng.random(VOCAB) < 0.5).tolist(), VOCAB) if mask else None
    return LogitBias(tokens, add.astype(np.float32), (0.5 + rng.random(count)).astype(np.float32), allowed)


@pytest.mark.parametrize("mesh", [None, "dp=2,cp=2,tp=2"])
@pytest.mark.parametrize("drafts", [0, 2])
def test_each_device_gets_its_places(mesh: str | None, drafts: int) -> None:
    """The whole arrays, by NumPy; lists of several lengths; and a step without biases gets the same arrays each time."""
    on = None if mesh is None else make_mesh(mesh)
    model = Model({}, Build(CONFIG, None if on is None else mesh_shape(on)), on)
    at = mesh_shape(on)
    shape = BatchShape(at.dp, at.cp, 4, 8, 0, CacheShape(2, 64, 8), draft_tokens=drafts)
    builder, rng = logit_bias.LogitBiasBuilder(model, shape), np.random.default_rng(0)
    plain = [[GOOD] * 3] * at.dp
    assert builder.place(builder.collect(plain)) is builder.neutral
    for counts, masks in (((5, 200, 0), (False, True, True)), ((240, 40, 1), (False,) * 3), ((0, 0, 0), (True,) * 3)):
        biases = [[random_bias(rng, n, m) for n, m in zip(counts, masks, strict=True)] for _ in range(at.dp)]
        biases[-1][0] = None  # type: ignore[call-overload]
        groups = [[dataclasses.replace(GOOD, logit_bias=bias) for bias in group] for group in biases]
        got = builder.place(builder.collect(groups))
        want = [np.array(x) for x in jax.tree.leaves(builder.neutral)]
        for group, mine in enumerate(biases):
            for i, bias in enumerate(mine):
                if bias is None:
                    continue
                place = (group * 4 + i) * shape.samples_per_request
                want[0][place, bias.tokens], want[1][place, bias.tokens] = bias.add, bias.scale
                want[2][place] = 0xFFFFFFFF if bias.mask is None else bias.mask
                want[3][place] = True
        for ours, theirs, neutral in zip(jax.tree.leaves(got), want, jax.tree.leaves(builder.neutral), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.sharding == neutral.sharding and ours.dtype == neutral.dtype


def test_places_without_any_are_sampled_as_ever() -> None:
    """Bit for bit: beside others that have some, and when none has."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(0, 2, (6, SIZE)), jnp.float32)
    temperature = np.array([0, 0.7, 1, 0, 1.5, 1], np.float32)
    settings = how(
        6, temperature=temperature, top_p=np.array([1, 0.8] * 3, np.float32), min_p=np.full(6, 0.01, np.float32)
    )
    add = np.zeros((6, SIZE), np.float32)
    add[:, :20] = -np.inf
    full = np.tile(words(list(range(SIZE))), (6, 1))
    given = np.arange(6) % 2 == 1

    def arrays(given: np.ndarray) -> logit_bias.LogitBiasArrays:
        return logit_bias.LogitBiasArrays(*map(jnp.asarray, (add, np.full_like(add, 1.5), full, given)))

    run = jax.jit(sample)
    plain, neutral, some = (
        run(logits, settings),
        run(logits, settings, arrays(given & False)),
        run(logits, settings, arrays(given)),
    )
    for a, b, c in zip(jax.tree.leaves(plain), jax.tree.leaves(neutral), jax.tree.leaves(some), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(np.asarray(a)[~given], np.asarray(c)[~given])
    assert (np.asarray(some.token)[given] >= 20).all()
    assert (np.asarray(plain.token)[given] < 20).any(), "negative control"
    own = np.log(np.exp(np.asarray(logits, np.float64)) / np.exp(np.asarray(logits, np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(some.logprob, own[np.arange(6), some.token], rtol=1e-5, err_msg="the model's own")


def test_biased_distribution() -> None:
    """20,000 draws from penalised logits with a mask and a temperature: within 5 standard deviations of float64's."""
    count, logits = 20_000, np.array([2.0, 1.5, 1.0, -0.5, 0.3, 0.9] + [-9.0] * (SIZE - 6), np.float32)
    logits_processor = LogitsProcessor([3], presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.5)
    for token in (0, 0, 2):
        logits_processor.push(token)
    bias = logits_processor.bias(False, words([0, 1, 2, 3, 4]))
    assert bias is not None
    add, scale = np.zeros(SIZE, np.float32), np.ones(SIZE, np.float32)
    add[bias.tokens], scale[bias.tokens] = bias.add, bias.scale
    arrays = logit_bias.LogitBiasArrays(
        *(jnp.tile(x, (count, 1)) for x in (add, scale, bias.mask)), jnp.ones(count, bool)
    )
    settings = how(count, temperature=np.full(count, 0.8, np.float32))
    drawn = jax.jit(sample)(jnp.tile(logits, (count, 1)), settings, arrays).token
    got = np.bincount(drawn, minlength=SIZE) / count

    def furthest(want: np.ndarray) -> float:
        want = np.exp(want / 0.8)
        want[5:] = 0
        p = want / want.sum()
        return float((np.abs(got - p) / np.sqrt(np.maximum(p * (1 - p), 1e-12) / count)).max())

    assert furthest(penalised(logits, [3], [0, 0, 2], 0.4, 0.3, 1.5)) < 5
    assert furthest(penalised(logits, [3], [0, 2], 0.4, 0.3, 1.5)) > 5, "negative control: one token counted once less"
