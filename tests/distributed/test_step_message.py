"""A step's inputs arrive as they were, in a message that is hardly larger than they are; others are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp.batch.logit_bias import LogitBias
from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.distributed.step_message import StepDecoder, StepMessage, encode, encode_shape
from jax_mla_cp.distributed.wire import CorruptMessage
from jax_mla_cp.mesh import declared_specs
from jax_mla_cp.step.inputs import StepInputs
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.runner import Runner
from tests.helpers.synthetic import CONFIG, random_model

WORDS = -(-CONFIG.vocab_size // 32)
GREEDY = SamplingParams(temperature=0)
GROUP = [StepRequest([1, 2, 3, 4, 5], 0, range(2), GREEDY), StepRequest([7], 20, range(2, 5), GREEDY)]


def bias(tokens: list[int], *, mask: bool) -> LogitBias:
    count = len(tokens)
    allowed = np.arange(WORDS, dtype=np.uint32) if mask else None
    return LogitBias(np.array(tokens, np.int32), np.ones(count, np.float32), np.full(count, 0.5, np.float32), allowed)


STEPS: dict[str, list[StepRequest]] = {
    "plain": GROUP,
    "nobody": [],
    "long": [StepRequest(list(range(60)), 0, range(5))],
    "listed tokens": [dataclasses.replace(GROUP[0], logit_bias=bias([3, 9], mask=False)), GROUP[1]],
    "many listed tokens": [dataclasses.replace(r, logit_bias=bias(list(range(200)), mask=False)) for r in GROUP],
    "a mask": [dataclasses.replace(GROUP[0], logit_bias=bias([], mask=True)), GROUP[1]],
    "both": [dataclasses.replace(r, logit_bias=bias([1], mask=True)) for r in GROUP],
    "prompt logprobs": [dataclasses.replace(GROUP[0], prompt_logprobs=True), GROUP[1]],
    "a new page table": [StepRequest([7], 100, range(7), GREEDY)],
}


@pytest.fixture(scope="module")
def runner() -> Runner:
    planner = Planner.create(
        random_model("tp=2,cp=2,dp=2"), cache_tokens=256, page_size=16, max_requests=2, max_model_len=128
    )
    return Runner(planner, prefill_chunk=128, max_running=2, max_model_len=128)


def inputs_of(runner: Runner, step: str) -> StepInputs:
    """The first step after a reset."""
    runner.reset()
    return runner.prepare([STEPS[step], GROUP])[1]


ALWAYS = {"rank_words", "group_words", "table_checksum"}


def arrays_of(inputs: StepInputs) -> dict[str, np.ndarray]:
    found: dict[str, Any] = {"rank_words": inputs.batch.rank_words, "group_words": inputs.batch.group_words}
    found |= {"page_table": inputs.page_table, "table_checksum": inputs.table_checksum}
    if inputs.bias is not None:
        found |= {field.name: getattr(inputs.bias, field.name) for field in dataclasses.fields(inputs.bias)}
    return {name: array for name, array in found.items() if array is not None}


@pytest.mark.parametrize("step", STEPS)
def test_inputs_arrive_as_they_were(runner: Runner, step: str) -> None:
    inputs = inputs_of(runner, step)
    got = StepDecoder(runner.planner).decode(memoryview(encode(StepMessage(7, "0123456789abcdef", inputs))))
    assert (got.number, got.program, got.inputs.shape) == (7, "0123456789abcdef", inputs.shape)
    want = arrays_of(inputs)
    assert arrays_of(got.inputs).keys() == want.keys()
    for name, array in arrays_of(got.inputs).items():
        assert array.dtype == want[name].dtype
        np.testing.assert_array_equal(array, want[name], err_msg=name)
    # What is not sent comes from the shape: the compiled program compares it.
    structures: list[Any] = [jax.tree.structure(batch) for batch in (got.inputs.batch, inputs.batch)]
    assert structures[0] == structures[1]
    assert jax.tree.leaves(declared_specs(got.inputs.batch)) == jax.tree.leaves(declared_specs(inputs.batch))


def test_the_steps_are_of_every_kind(runner: Runner) -> None:
    """The test above is not of one kind of step alone."""
    made = {step: inputs_of(runner, step) for step in STEPS}
    assert made["prompt logprobs"].shape.prompt_logprobs and not made["plain"].shape.prompt_logprobs
    assert made["long"].shape.tokens > made["plain"].shape.tokens
    assert made["plain"].bias is None
    kinds = {step: arrays_of(each).keys() - ALWAYS for step, each in made.items()}
    assert kinds["plain"] == set() and kinds["a new page table"] == {"page_table"}
    assert kinds["listed tokens"] == {"biased", "entries"} and kinds["a mask"] == {"biased", "mask"}
    assert kinds["both"] == {"biased", "entries", "mask"}
    entries = [made[step].bias.entries for step in ("listed tokens", "many listed tokens")]  # type: ignore[union-attr]
    assert entries[0].shape < entries[1].shape  # type: ignore[union-attr]


@pytest.mark.parametrize("step", STEPS)
def test_a_message_is_its_arrays_and_little_more(runner: Runner, step: str) -> None:
    inputs = inputs_of(runner, step)
    size = sum(array.nbytes for array in arrays_of(inputs).values())
    assert size < len(encode(StepMessage(1 << 60, "f" * 16, inputs))) <= size + 4096


def test_embeddings_are_not_sent(runner: Runner) -> None:
    inputs = inputs_of(runner, "plain")
    batch = dataclasses.replace(inputs.batch, embeds=np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match="embeds: input embeddings are not sent"):
        encode(StepMessage(1, "", dataclasses.replace(inputs, batch=batch)))


def test_shapes_arrive_as_they_were(runner: Runner) -> None:
    decoder = StepDecoder(runner.planner)
    shapes = runner.planner.step_shapes + runner.planner.prompt_logprobs_shapes
    assert len(set(shapes)) == len(shapes) > 4
    assert tuple(decoder.decode_shape(memoryview(encode_shape(shape))) for shape in shapes) == shapes


def test_a_shape_that_no_program_has_is_refused(runner: Runner) -> None:
    decoder = StepDecoder(runner.planner)
    other = dataclasses.replace(runner.planner.step_shapes[0], tokens=12345)
    with pytest.raises(
        CorruptMessage, match=r"a shape that can't be read \(no program has the shape StepShape\(tokens=1"
    ):
        decoder.decode_shape(memoryview(encode_shape(other)))
    inputs = dataclasses.replace(inputs_of(runner, "plain"), shape=other)
    with pytest.raises(CorruptMessage, match=r"a step that can't be read \(no program has the shape"):
        decoder.decode(memoryview(encode(StepMessage(1, "", inputs))))


def test_arrays_of_another_program_are_refused(runner: Runner) -> None:
    inputs = dataclasses.replace(inputs_of(runner, "long"), shape=inputs_of(runner, "plain").shape)
    with pytest.raises(CorruptMessage, match="group_words has the shape"):
        StepDecoder(runner.planner).decode(memoryview(encode(StepMessage(1, "", inputs))))


@pytest.mark.parametrize("name", ["page_table", "table_checksum"])
def test_a_page_table_of_another_planner_is_refused(runner: Runner, name: str) -> None:
    inputs = inputs_of(runner, "a new page table")
    inputs = dataclasses.replace(inputs, **{name: getattr(inputs, name)[:1]})
    with pytest.raises(CorruptMessage, match=f"{name} has the shape"):
        StepDecoder(runner.planner).decode(memoryview(encode(StepMessage(1, "", inputs))))


@pytest.mark.parametrize("payload", [b"", b"[]", b"{}", b"7", b"null", b'{"tokens": [1]}', b"\xff\xfe", b'{"x":'])
def test_what_is_no_shape_is_refused(runner: Runner, payload: bytes) -> None:
    with pytest.raises(CorruptMessage):
        StepDecoder(runner.planner).decode_shape(memoryview(payload))


def changed_header(payload: bytes, **change: Any) -> bytes:
    (length,) = struct.unpack_from("<I", payload)
    text = json.dumps(json.loads(payload[4 : 4 + length]) | change).encode()
    start, begin = 4 + len(text), 4 + length
    return struct.pack("<I", len(text)) + text + bytes(-start % 64) + payload[begin + -begin % 64 :]


def test_a_changed_header_is_refused(runner: Runner) -> None:
    payload = encode(StepMessage(1, "0123456789abcdef", inputs_of(runner, "both")))
    decoder = StepDecoder(runner.planner)
    decoder.decode(memoryview(changed_header(payload)))  # negative control
    arrays = json.loads(payload[4 : 4 + struct.unpack_from("<I", payload)[0]])["arrays"]
    dtype, (words,) = arrays["rank_words"]
    changes: tuple[dict[str, Any], ...] = (
        {"arrays": {}},
        {"arrays": []},
        {"shape": {}},
        {"shape": None},
        {"arrays": arrays | {"rank_words": ["|O", [words]]}},
        {"arrays": arrays | {"rank_words": [dtype, [words + 1]]}},
        {"arrays": arrays | {"rank_words": [dtype, [1, words]]}},
        {"arrays": arrays | {"rank_words": [dtype, [-1]]}},
        {"arrays": arrays | {"rank_words": [dtype, ["1"]]}},
        {"arrays": {name: array for name, array in arrays.items() if name != "table_checksum"}},
    )
    for change in changes:
        with pytest.raises(CorruptMessage):
            decoder.decode(memoryview(changed_header(payload, **change)))


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_a_cut_message_is_refused(runner: Runner, data: st.DataObject) -> None:
    payload = encode(StepMessage(1, "0123456789abcdef", inputs_of(runner, "both")))
    cut = payload[: data.draw(st.integers(0, len(payload) - 1))]
    for wrong in (cut, payload + b"\0"):
        with pytest.raises(CorruptMessage):
            StepDecoder(runner.planner).decode(memoryview(wrong))


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_no_change_of_the_header_does_more_than_be_refused(runner: Runner, data: st.DataObject) -> None:
    """The wire's CRC is there for a change of the arrays: their words could be anything."""
    payload = bytearray(encode(StepMessage(1, "0123456789abcdef", inputs_of(runner, "both"))))
    length = 4 + struct.unpack_from("<I", payload)[0]
    for at in data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=3)):
        payload[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CorruptMessage):
        StepDecoder(runner.planner).decode(memoryview(payload))
