"""A step's inputs as a message: a JSON header that names the program and the arrays, then the arrays' bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt32

from jax_mla_cp.batch.packing import DeviceBatch, pack
from jax_mla_cp.batch.shapes import StepShape
from jax_mla_cp.distributed.wire import CorruptMessage
from jax_mla_cp.mesh import mesh_shape
from jax_mla_cp.step.inputs import StepInputs
from jax_mla_cp.step.logit_bias import HostBias
from jax_mla_cp.step.planner import Planner

ECHO = struct.Struct("<QIId")
"""A follower's answer to a step: its number, the CRC of the received payload, `crc_of` its page table's checksums, seconds that it took."""
_LENGTH = struct.Struct("<I")
_ALIGNMENT = 64
_DTYPES = ("int32", "uint32", "bool")
_BATCH, _BIAS, _TABLE = ("rank_words", "group_words"), ("biased", "mask", "entries"), ("page_table", "table_checksum")


@dataclasses.dataclass(frozen=True)
class StepMessage:
    """A step of a cluster."""

    number: int
    """Counts from 1."""
    program: str
    """`Runner.fingerprint` of the leader's program."""
    inputs: StepInputs


def encode(message: StepMessage) -> bytes:
    """The message's payload.

    Raises:
      ValueError: inputs that a step of a cluster can't have: embeddings.
    """
    inputs = message.inputs
    if inputs.batch.embeds is not None:
        raise ValueError("embeds: input embeddings are not sent to other processes.")
    given = [(inputs.batch, _BATCH), (inputs, _TABLE), *([] if inputs.bias is None else [(inputs.bias, _BIAS)])]
    named = {name: getattr(owner, name) for owner, names in given for name in names}
    arrays = {name: array for name, array in named.items() if array is not None}
    fixed = _fixed_header(inputs.shape, tuple((name, array.dtype, array.shape) for name, array in arrays.items()))
    text = f'{{"step": {message.number}, "program": {json.dumps(message.program)}, {fixed}}}'.encode()
    parts: list[Any] = [_LENGTH.pack(len(text)), text]
    filled = sum(map(len, parts))
    for array in arrays.values():
        padding = -filled % _ALIGNMENT
        parts += [bytes(padding), array]  # joined by its bytes
        filled += padding + array.nbytes
    return b"".join(parts)


@functools.lru_cache
def _fixed_header(shape: StepShape, arrays: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]) -> str:
    """The part of the header that most steps share, without its braces: writing it would take half of a message's time."""
    fields = {"shape": dataclasses.asdict(shape), "arrays": {name: [dtype.name, dims] for name, dtype, dims in arrays}}
    return json.dumps(fields)[1:-1]


def crc_of(table_checksum: UInt32[np.ndarray, " dp"]) -> int:
    """One number for the checksums of all dp groups' page tables."""
    return zlib.crc32(np.ascontiguousarray(table_checksum, np.uint32))


def encode_shape(shape: StepShape) -> bytes:
    """The payload of a `Kind.COMPILE` message."""
    return json.dumps(dataclasses.asdict(shape)).encode()


class StepDecoder:
    """Reads messages of `encode` and `encode_shape` for one planner."""

    def __init__(self, planner: Planner):
        self._planner = planner
        self._shapes = {*planner.step_shapes, *planner.prompt_logprobs_shapes}
        self._templates: dict[StepShape, DeviceBatch] = {}

    def decode(self, payload: memoryview) -> StepMessage:
        """Reads a message's payload, whose arrays it keeps.

        Raises:
          CorruptMessage: the payload is no message of this planner's steps.
        """
        with _corrupt("step"):
            return self._decode(payload)

    def decode_shape(self, payload: memoryview) -> StepShape:
        """Reads a shape.

        Raises:
          CorruptMessage: the payload is no shape of this planner's programs.
        """
        with _corrupt("shape"):
            return self._shape(json.loads(bytes(payload)))

    def _decode(self, payload: memoryview) -> StepMessage:
        (length,) = _LENGTH.unpack(payload[: _LENGTH.size])
        at = _LENGTH.size + length
        header: dict[str, Any] = json.loads(bytes(payload[_LENGTH.size : at]))
        shape = self._shape(header["shape"])
        arrays: dict[str, np.ndarray] = {}
        for name, (dtype, dims) in header["arrays"].items():
            if dtype not in _DTYPES:
                raise ValueError(f"{name} has the dtype {dtype}")
            at += -at % _ALIGNMENT
            size = int(np.prod(dims)) * np.dtype(dtype).itemsize
            arrays[name] = np.frombuffer(payload[at : at + size], dtype).reshape(dims)
            at += size
        if at != len(payload):
            raise ValueError(f"{len(payload)} bytes, expected {at}")
        template, batch_shape = self._template(shape), self._planner.shape
        expected = {name: getattr(template, name).shape for name in _BATCH}
        expected["table_checksum"] = (batch_shape.dp,)
        if "page_table" in arrays:
            expected["page_table"] = (batch_shape.dp * batch_shape.max_requests, batch_shape.max_pages)
        for name, dims in expected.items():
            if arrays[name].shape != dims:
                raise ValueError(f"{name} has the shape {arrays[name].shape}")
        batch = dataclasses.replace(template, rank_words=arrays["rank_words"], group_words=arrays["group_words"])
        bias = HostBias(arrays["biased"], arrays.get("mask"), arrays.get("entries")) if "biased" in arrays else None
        inputs = StepInputs(shape, batch, bias, arrays.get("page_table"), arrays["table_checksum"])
        return StepMessage(header["step"], header["program"], inputs)

    def _shape(self, fields: dict[str, Any]) -> StepShape:
        shape = StepShape(**fields)
        if shape not in self._shapes:
            raise ValueError(f"no program has the shape {shape}")
        return shape

    def _template(self, shape: StepShape) -> DeviceBatch:
        """A batch of the shape: its fields are not sent."""
        if shape not in self._templates:
            mesh = mesh_shape(self._planner.model.mesh)
            self._templates[shape] = pack(self._planner.dummy_batch(shape, keeps_table=True), mesh)
        return self._templates[shape]


@contextlib.contextmanager
def _corrupt(what: str) -> Iterator[None]:
    """Turns errors of reading into `CorruptMessage`."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CorruptMessage(f"a {what} that can't be read ({error}).") from error
