"""Steps that score and adjust, through the runner: against a float64 reference, and on every mesh the same."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from flax import nnx

from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.checkpoint import load_params
from jax_mla_cp.engine.logits_processor import LogitsProcessor
from jax_mla_cp.mesh import make_mesh, mesh_shape
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.results import StepResult
from jax_mla_cp.step.runner import Runner
from tests.helpers import reference
from tests.helpers.array_source import ArraySource
from tests.helpers.random_weights import random_weights
from tests.helpers.synthetic import CONFIG
from tests.step.test_logit_bias import words
from tests.test_cache import copies_of

PAGE, CHUNK, SAMPLES = 4, 40, 20
GREEDY = SamplingParams(temperature=0)
DRAWN = SamplingParams(seed=5, min_p=0.02)
PAGES = {"a": list(range(9)), "b": [20, 14, 12, 13], "c": [30, 31]}
PENALTIES = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 2.0}


@functools.cache
def weights() -> dict[str, np.ndarray]:
    return dict(random_weights(CONFIG, 0))


@functools.cache
def logprobs(tokens: tuple[int, ...]) -> np.ndarray:
    """[len, V] in float64."""
    logits = reference.forward(CONFIG, weights(), tokens).logits
    return np.asarray(
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def prompt(length: int, *likely: int) -> list[int]:
    """Random tokens, but at some places the likeliest one."""
    tokens: list[int] = np.random.default_rng(length).integers(0, CONFIG.vocab_size, length).tolist()
    for at in likely:
        tokens[at] = int(logprobs(tuple(tokens[:at]))[-1].argmax())
    return tokens


A, B, C = prompt(33, 4, 22, 30), prompt(9, 5), prompt(1)


class OneBucket(Runner):
    """Steps of one size: two programs."""

    def __init__(self, mesh: str | None):
        on = None if mesh is None else make_mesh(mesh)
        build = Build(CONFIG, None if on is None else mesh_shape(on))
        model = Model(load_params(ArraySource(weights()), nnx.state(Decoder(build)), CONFIG, on), build, on)
        made = Planner.create(
            model,
            cache_tokens=40 * PAGE,
            page_size=PAGE,
            max_requests=4,
            max_model_len=64,
            prefill_chunk=CHUNK,
            form="expanded",
        )
        made = dataclasses.replace(made, buckets=made.buckets[-1:])
        super().__init__(made, prefill_chunk=CHUNK, max_running=4, max_model_len=64)

    def run(self, **requests: StepRequest) -> dict[str, StepResult]:
        """One step. Request b runs in the last dp group, the others in the first."""
        groups: list[dict[str, StepRequest]] = [{} for _ in range(self.dp)]
        for name, request in requests.items():
            groups[-1 if name == "b" else 0][name] = dataclasses.replace(request, pages=PAGES[name])
        results = self.step([list(group.values()) for group in groups]).results
        return {
            name: outcome
            for group, outcomes in zip(groups, results, strict=True)
            for name, outcome in zip(group, outcomes, strict=True)
        }

    @property
    def programs(self) -> dict[bool, str]:
        return {shape.prompt_logprobs: program.as_text() or "" for shape, program in self._programs.items()}


runner = functools.cache(OneBucket)


@functools.cache
def played(mesh: str | None) -> list[dict[str, StepResult]]:
    """A long prompt in two chunks, scored, beside a short one and a sampled token; then decoding with adjusted logits."""
    steps = runner(mesh)
    out = [
        steps.run(
            c=StepRequest(C, 0, (), DRAWN),
            a=StepRequest(A[:21], 0, (), next_token=A[21], prompt_logprobs=True),
            b=StepRequest(B, 0, (), GREEDY, prompt_logprobs=True),
        )
    ]
    second = {name: out[0][name].sampled[0].token for name in ("b", "c")}
    penalised = LogitsProcessor(B, **PENALTIES, banned=[int(logprobs((*B, second["b"]))[-1].argmax())])
    penalised.push(second["b"])
    allowed = words(list(range(0, CONFIG.vocab_size, 7)), CONFIG.vocab_size)
    out.append(
        steps.run(
            b=StepRequest([second["b"]], len(B), (), GREEDY, logit_bias=penalised.bias(True)),
            a=StepRequest(A[21:], 21, (), GREEDY, prompt_logprobs=True),
            c=StepRequest([second["c"]], 1, (), DRAWN, logit_bias=LogitsProcessor(C).bias(False, allowed)),
        )
    )
    return out


MESHES = pytest.mark.parametrize("mesh", [None, "tp=2,cp=2", "dp=2"])


@MESHES
def test_scores_are_the_references(mesh: str | None) -> None:
    first, second = played(mesh)
    scored = [first["a"].prompt_logprobs, second["a"].prompt_logprobs]
    assert all(scored) and first["c"].prompt_logprobs is None and second["b"].prompt_logprobs is None
    whole = [
        np.concatenate([getattr(part, name) for part in scored]) for name in ("logprobs", "top_tokens", "top_logprobs")
    ]
    for prompt, (own, tokens, values) in (
        (A, whole),
        (B, [getattr(first["b"].prompt_logprobs, name) for name in ("logprobs", "top_tokens", "top_logprobs")]),
    ):
        want, following = logprobs(tuple(prompt)), np.array(prompt[1:])
        assert own.shape == (len(prompt),) and tokens.shape == values.shape == (len(prompt), SAMPLES)
        np.testing.assert_allclose(own[:-1], want[np.arange(len(following)), following], atol=2e-4)
        assert np.isnan(own[-1]), "what follows was sampled"
        np.testing.assert_allclose(values, -np.sort(-want, axis=1)[:, :SAMPLES], atol=2e-4)
        np.testing.assert_allclose(values, np.take_along_axis(want, tokens, axis=1), atol=2e-4)
        listed = tokens[:-1] == following[:, None]
        assert 1 <= listed[:, 0].sum() < len(listed), "some tokens are the likeliest ones"
        np.testing.assert_array_equal(values[:-1][listed], own[:-1][listed.any(1)])


def test_scores_of_a_wrong_order_are_noticed() -> None:
    """Negative control: the comparison tells neighbors apart."""
    want = logprobs(tuple(A))[np.arange(len(A) - 1), A[1:]]
    got = np.concatenate([step["a"].prompt_logprobs.logprobs for step in played(None)])  # type: ignore[union-attr]
    assert np.abs(got[:-1] - np.roll(want, 1)).min() > 1e-3


@MESHES
def test_adjusted_tokens_are_the_references(mesh: str | None) -> None:
    first, second = played(mesh)
    b = first["b"].sampled[0]
    assert b.token == logprobs(tuple(B))[-1].argmax()
    logits = reference.forward(CONFIG, weights(), [*B, b.token]).logits[-1]
    want = logits.copy()
    for token in {*B, b.token}:
        want[token] = want[token] / 2 if want[token] > 0 else want[token] * 2
    want[b.token] -= 2.0
    want[logits.argmax()] = -np.inf
    got = second["b"].sampled[0]
    assert got.token == want.argmax() != logits.argmax()
    np.testing.assert_allclose(
        got.logprob, logprobs((*B, b.token))[-1, got.token], atol=2e-4, err_msg="the model's own"
    )
    assert second["c"].sampled[0].token % 7 == 0
    assert second["c"].sampled[0].token == played(None)[1]["c"].sampled[0].token
    assert first["c"].sampled[0].token == played(None)[0]["c"].sampled[0].token


def test_a_step_without_scores_samples_the_same() -> None:
    """And neither program copies the cache."""
    played(None)
    steps = runner(None)
    plain = steps.run(
        c=StepRequest(C, 0, (), DRAWN), a=StepRequest(A[:21], 0, (), next_token=A[21]), b=StepRequest(B, 0, (), GREEDY)
    )
    for name, outcome in plain.items():
        assert outcome.prompt_logprobs is None
        assert [s.token for s in outcome.sampled] == [s.token for s in played(None)[0][name].sampled]
        for ours, theirs in zip(outcome.sampled, played(None)[0][name].sampled, strict=True):
            np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=1e-6)
    assert set(steps.programs) == {False, True}
    for text in steps.programs.values():
        assert not copies_of(text, steps._pages.shape)


def test_the_grid_has_a_scoring_program_for_each_bucket() -> None:
    planner = runner(None).planner
    (step,) = planner.prompt_logprobs_shapes
    assert (
        step.prompt_logprobs
        and step not in planner.step_shapes
        and dataclasses.replace(step, prompt_logprobs=False) == planner.step_shapes[-1]
    )
    assert runner(None).grid.startswith(f"{len(planner.step_shapes) + 1} programs")
