"""Steps that are dispatched before the one before has been read: the devices know a request's last token by its slot."""

from __future__ import annotations

import functools

import pytest

from jax_mla_cp.batch.step_request import SamplingParams, StepRequest, last_sampled
from jax_mla_cp.step.results import RunnerOutput
from tests.helpers.speculative import PAGE, OneBucket, model

PROMPTS = ([1, 2, 3, 4, 5], [7, 8, 9], [2, 2])
SLOTS = (4, 0, 3)
SAMPLING = (SamplingParams(temperature=0), SamplingParams(seed=5), SamplingParams(seed=6, top_k=4))
STEPS = 6


@functools.cache
def runner(mesh: str | None) -> OneBucket:
    return OneBucket(model(mesh), 0)


def step(steps: OneBucket, tokens: list[list[int]], computed: list[int], slots: tuple[int, ...]) -> list[StepRequest]:
    pages = steps.pages_per_group // len(PROMPTS)
    return [
        StepRequest(new, computed[i], range(i * pages, i * pages + 64 // PAGE), SAMPLING[i], slot=slots[i])
        for i, new in enumerate(tokens)
    ]


def tokens_of(output: RunnerOutput) -> list[list[list[int]]]:
    return [[[s.token for s in result.sampled] for result in group] for group in output.results]


def run(mesh: str | None, *, ahead: bool, read_slots: tuple[int, ...] = SLOTS) -> list[list[list[list[int]]]]:
    """The tokens of each step, per dp group and request. The order of the requests changes from step to step, and so does the cp
    rank that a request is on."""
    steps = runner(mesh)
    steps.reset()
    lengths = [len(prompt) for prompt in PROMPTS]
    pending = [steps.dispatch([step(steps, list(map(list, PROMPTS)), [0, 0, 0], SLOTS)] * steps.dp)]
    orders = [list(range(len(PROMPTS)))]
    for n in range(STEPS):
        known = None if ahead else tokens_of(pending[-1].result())
        order = orders[-1][1:] + orders[-1][:1]
        groups = []
        for g in range(steps.dp):
            last = [
                [last_sampled(read_slots[i])] if known is None else known[g][orders[-1].index(i)]
                for i in range(len(PROMPTS))
            ]
            requests = step(steps, last, [length + n for length in lengths], SLOTS)
            groups.append([requests[i] for i in order])
        pending.append(steps.dispatch(groups))
        orders.append(order)
    outputs = [tokens_of(each.result()) for each in pending]
    return [
        [[group[order.index(i)] for i in range(len(PROMPTS))] for group in output]
        for output, order in zip(outputs, orders, strict=True)
    ]


@pytest.mark.parametrize("mesh", [None, "tp=2,cp=2", "dp=2,cp=3"])
def test_steps_ahead_give_the_same_tokens(mesh: str | None) -> None:
    want = run(mesh, ahead=False)
    assert run(mesh, ahead=True) == want
    assert run(mesh, ahead=True, read_slots=(0, 4, 3)) != want, "another slot's token is another token"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (StepRequest([last_sampled(12)], 3, [0]), "token id -13 is not in the vocabulary"),
        (StepRequest([1, last_sampled(0)], 3, [0, 1]), "token id -1 is not in the vocabulary"),
        (StepRequest([1], 3, [0], SAMPLING[0], slot=12), "slot must be 0 to 11, got 12"),
        (StepRequest([1], 3, [0], SAMPLING[0], slot=-1), "slot must be 0 to 11, got -1"),
    ],
    ids=["no slot", "beside another token", "too large", "negative"],
)
def test_slots_that_are_none(request_: StepRequest, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runner(None).check(request_)


def test_a_slot_for_two_requests() -> None:
    requests = [StepRequest([1], 0, [page], SAMPLING[0], slot=2) for page in (0, 1)]
    with pytest.raises(ValueError, match="slot 2 is given to two requests"):
        runner(None).dispatch([requests])


def test_speculation_names_no_slots() -> None:
    with pytest.raises(ValueError, match="token id -1 is not in the vocabulary"):
        OneBucket(model(), 1).check(StepRequest([last_sampled(0)], 3, [0], SAMPLING[0]))
