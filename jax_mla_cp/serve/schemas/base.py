"""The rules that all request bodies keep, and the types of their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_FIELDS = 256
"""Fields of an object, known or not."""


class FieldError(ValueError):
    """A field that is invalid beside another one. `jax_mla_cp.serve.errors` reports it under its own name."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


def _encodable(text: str) -> str:
    """Rejects lone surrogates, which JSON can carry and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without lone surrogates") from None
    return text


def _encodable_parts(value: dict[str, Any]) -> dict[str, Any]:
    _encodable(json.dumps(value, ensure_ascii=False))
    return value


def _whole(value: object) -> object:
    """Converts a whole number that is written as 8.0: JSON does not tell it from 8, and some serializers write it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_bias_count(biases: object) -> object:
    """Checks the number of entries first: pydantic would build an error of a few hundred bytes for each bad entry."""
    if isinstance(biases, dict) and len(biases) > MAX_LOGIT_BIASES:
        raise ValueError(f"must have at most {MAX_LOGIT_BIASES} entries, not {len(biases)}")
    return biases


T = TypeVar("T")
FailFastList = Annotated[list[T], Field(fail_fast=True)]
"""A list whose validation stops at the first bad element: otherwise a body of a few megabytes with a million bad elements
would produce a kilobyte of errors for each."""
ENCODABLE = AfterValidator(_encodable)
Text = Annotated[str, ENCODABLE]
JsonObject = Annotated[dict[str, Any], AfterValidator(_encodable_parts)]
"""A JSON object of any form."""
Whole = Annotated[int, BeforeValidator(_whole)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
StopString = Annotated[str, Field(min_length=1, max_length=1024), ENCODABLE]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")], Bias],
    Field(max_length=MAX_LOGIT_BIASES),
    BeforeValidator(_check_bias_count),
]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenCount = Annotated[Whole, Field(ge=0, lt=2**31)]


def asks_nothing(value: object) -> bool:
    """True for null and for an empty list, object or string."""
    return value is None or value == [] or value == {} or value == ""


class RequestBody(BaseModel):
    """A JSON object of a request, at any depth. Unknown fields are rejected, and values are not coerced to another type.

    A field that asks for nothing is as good as absent, even an unknown one: clients serialize every field of their types.
    null asks for nothing; so does an empty list, object or string, except in the fields of `MEANINGFUL_EMPTY`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    MEANINGFUL_NULL: ClassVar[frozenset[str]] = frozenset()
    MEANINGFUL_EMPTY: ClassVar[frozenset[str]] = frozenset()
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values by which clients say that they don't want a feature that this server lacks."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise ValueError(f"must have at most {MAX_FIELDS} fields, not {len(value)}")
        fields = {field.alias or name: field.is_required() for name, field in cls.model_fields.items()}
        kept: dict[Any, Any] = {}
        unknown = False
        for name, part in value.items():
            required = fields.get(name)
            if required is None:
                # One unknown field is enough to reject the request; a million would each add an error.
                if unknown or asks_nothing(part) or _is_all_null(part) or _is_one_of(part, cls.NEUTRAL.get(name, ())):
                    continue
                unknown = True
            elif (not required and part is None and name not in cls.MEANINGFUL_NULL) or (
                not required and part is not None and name not in cls.MEANINGFUL_EMPTY and asks_nothing(part)
            ):
                continue
            kept[name] = part
        return kept


def _is_all_null(value: object) -> bool:
    return isinstance(value, dict) and all(part is None for part in value.values())


def _is_one_of(value: object, neutral: tuple[Any, ...]) -> bool:
    """Membership that tells 1 from true, and not from 1.0."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)
