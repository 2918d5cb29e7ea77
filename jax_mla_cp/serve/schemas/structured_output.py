"""Fields that constrain the output's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from jax_mla_cp.serve.schemas.base import ENCODABLE, FailFastList, FieldError, JsonObject, RequestBody, Text
from jax_mla_cp.serve.structured_output import MAX_CHOICES


class JsonSchema(RequestBody):
    MEANINGFUL_EMPTY: ClassVar[frozenset[str]] = frozenset({"schema"})

    name: Annotated[str, Field(min_length=1, max_length=64), ENCODABLE] = Field(
        description="Name of the schema. Accepted and ignored."
    )
    description: Text | None = Field(default=None, description="Accepted and ignored.")
    schema_: JsonObject = Field(
        alias="schema", description="The JSON Schema, limited to the features that llguidance supports."
    )
    strict: bool | None = Field(
        default=None, description="Accepted and ignored: the output always conforms to the schema."
    )


class TextFormat(RequestBody):
    type: Literal["text"]


class JsonFormat(RequestBody):
    type: Literal["json_object"]


class SchemaFormat(RequestBody):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]

JsonSchemaOrText = JsonObject | Text
Choices = Annotated[FailFastList[Text], Field(max_length=MAX_CHOICES)]


class StructuredOutputs(RequestBody):
    """vLLM's `structured_outputs`: one constraint."""

    MEANINGFUL_EMPTY: ClassVar[frozenset[str]] = frozenset({"json"})
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "disable_fallback": (False, True),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
    }

    json_: JsonSchemaOrText | None = Field(default=None, alias="json", description="A JSON Schema, or its text.")
    regex: Text | None = Field(default=None, description="A regular expression that the whole output matches.")
    choice: Choices | None = Field(default=None, description="The texts that are allowed.")
    grammar: Text | None = Field(default=None, description="A context-free grammar, in Lark or GBNF.")
    json_object: bool | None = Field(default=None, description="True: any JSON object.")

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        found = self.constraints()
        if len(found) > 1:
            raise FieldError(
                list(found)[1], f"an output has one constraint, got {' and '.join(found)}. Send one of them"
            )
        return self

    def constraints(self) -> dict[str, Any]:
        """The constraints by field name."""
        values = {
            "json": self.json_,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
            "json_object": self.json_object or None,
        }
        return {name: value for name, value in values.items() if value is not None}
