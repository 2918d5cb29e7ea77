"""`ChatRequest`: the body of POST /v1/chat/completions, and its messages and tools."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from jax_mla_cp.serve.schemas.base import (
    ENCODABLE,
    MAX_LOGPROBS,
    FailFastList,
    FieldError,
    JsonObject,
    RequestBody,
    Text,
    TokenCount,
    Whole,
)
from jax_mla_cp.serve.schemas.generation import GenerationRequest

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_PARTS = 1024
"""Parts or calls of a message. Each is validated on the event loop."""
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
"""OpenAI's rule, and dots, which MCP servers' tools have."""
CacheControl = Annotated[
    dict[str, Any] | None, Field(description="Anthropic's. Accepted and ignored: prefixes are found by content.")
]


class TextPart(RequestBody):
    MEANINGFUL_EMPTY: ClassVar[frozenset[str]] = frozenset({"text"})

    type: Literal["text"]
    text: Text
    cache_control: CacheControl = None


class CalledFunction(RequestBody):
    name: Annotated[str, Field(min_length=1, max_length=512), ENCODABLE] = Field(
        description="As the model wrote it, which need not be the name of a tool."
    )
    arguments: Text = Field(default="{}", description="The arguments as the text of a JSON object.")
    parsed_arguments: Any = Field(default=None, description="Accepted and ignored: OpenAI's Python client adds it.")


class ToolCall(RequestBody):
    """A call in an earlier assistant message."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Whole | None = Field(default=None, description="Accepted and ignored: streamed calls have it.")


class Message(RequestBody):
    MEANINGFUL_EMPTY: ClassVar[frozenset[str]] = frozenset({"content"})
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {"prefix": (False,), "partial": (False,), "type": ("text",)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[FailFastList[TextPart], Field(max_length=MAX_PARTS)] | None = Field(
        default=None, description="Text. May be absent from an assistant message."
    )
    name: Annotated[str, Field(max_length=256), ENCODABLE] | None = Field(
        default=None, description="Name of the speaker or tool, for chat templates that write it."
    )
    tool_calls: Annotated[FailFastList[ToolCall], Field(max_length=MAX_PARTS)] | None = Field(
        default=None, description="Calls of an assistant message."
    )
    tool_call_id: Text | None = Field(default=None, description="The call that a tool message answers.")
    reasoning_content: Text | None = Field(
        default=None,
        description="Reasoning of an earlier assistant message. The chat template decides what becomes of it.",
    )
    reasoning: Text | None = Field(default=None, description="Alias of `reasoning_content`.")
    parsed: Any = Field(default=None, description="Accepted and ignored: OpenAI's Python client adds it.")
    cache_control: CacheControl = None

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise FieldError("content", f"is required in a message with role {self.role}")
        for name in ("tool_calls", "reasoning_content", "reasoning"):
            if self.role != "assistant" and getattr(self, name) is not None:
                raise FieldError(name, f"only an assistant message has it, got role {self.role}")
        if None not in (self.reasoning, self.reasoning_content) and self.reasoning != self.reasoning_content:
            raise FieldError("reasoning", "is an alias of reasoning_content; the two must not differ")
        if self.tool_call_id is not None and self.role != "tool":
            raise FieldError("tool_call_id", f"only a tool message has it, got role {self.role}")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it, without absent fields."""
        known = self.model_dump(include={"role", "content", "name", "tool_calls", "tool_call_id"}, exclude_none=True)
        for call in known.get("tool_calls", ()):
            call.pop("index", None)
            call["function"].pop("parsed_arguments", None)
        if isinstance(self.content, list):
            known["content"] = [{"type": "text", "text": part.text} for part in self.content]
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        return known if reasoning is None else known | {"reasoning_content": reasoning}


class Function(RequestBody):
    MEANINGFUL_EMPTY: ClassVar[frozenset[str]] = frozenset({"parameters"})

    name: FunctionName
    description: Text | None = None
    parameters: JsonObject | None = Field(
        default=None, description="JSON Schema of the arguments. Absent: a function without arguments."
    )
    strict: bool | None = Field(
        default=None, description="True: arguments always conform to `parameters`, also with tool_choice auto."
    )
    cache_control: CacheControl = None

    @model_validator(mode="after")
    def _check_parameters(self) -> Function:
        kind = (self.parameters or {}).get("type", "object")
        if kind != "object":
            raise FieldError("parameters.type", "must be object: a call's arguments are one")
        return self


class Tool(RequestBody):
    type: Literal["function"]
    function: Function
    cache_control: CacheControl = None

    def plain(self) -> dict[str, Any]:
        """The tool as chat templates and tool-call formats know it, without absent fields."""
        return self.model_dump(
            include={"type": True, "function": {"name", "description", "parameters", "strict"}}, exclude_none=True
        )


class NamedFunction(RequestBody):
    name: FunctionName


class NamedTool(RequestBody):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationRequest.NEUTRAL,
        "verbosity": ("medium",),
        "function_call": ("none", "auto"),
        "include_reasoning": (True,),
    }

    messages: Annotated[FailFastList[Message], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The conversation so far."
    )
    max_completion_tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = Field(
        default=None,
        description="Maximum number of tokens to generate. Defaults to the rest of the maximum context length.",
    )
    max_tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = Field(
        default=None, description="Deprecated alias of `max_completion_tokens`."
    )
    logprobs: bool | None = Field(default=False, description="Return the log-probability of each generated token.")
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        default=None, description="Number of most likely tokens to return at each position. Requires `logprobs`."
    )
    tools: Annotated[FailFastList[Tool], Field(max_length=MAX_TOOLS)] | None = Field(
        default=None, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(
        default=None,
        description="`auto` (default with tools): the model decides. `none`: no calls. `required`: at least one call. A named "
        "function: a call of it.",
    )
    parallel_tool_calls: bool | None = Field(default=True, description="False: at most one call in an answer.")
    chat_template_kwargs: JsonObject | None = Field(
        default=None, description="Further variables of the chat template, such as `thinking`; JSON values."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="Variable `reasoning_effort` of the chat template, for templates that know it."
    )
    thinking_token_budget: TokenCount | None = Field(
        default=None, description="Maximum number of reasoning tokens; then </think> is forced."
    )
    add_generation_prompt: bool | None = Field(
        default=None,
        description="End the prompt with the chat template's start of an assistant message (default: true).",
    )
    continue_final_message: bool | None = Field(
        default=False, description="Continue the last message, an assistant's, instead of beginning another one."
    )
    add_special_tokens: bool | None = Field(
        default=False, description="Add BOS and EOS to the rendered prompt. Most chat templates write BOS themselves."
    )

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "requires logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise FieldError("max_tokens", "is an alias of max_completion_tokens; the two must not differ")
        if self.continue_final_message and self.add_generation_prompt:
            raise FieldError("continue_final_message", "can't be combined with add_generation_prompt=true")
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise FieldError("tools", "function names must be unique")
        if self.tool_choice in (None, "none", "auto"):
            return
        if not names:
            raise FieldError("tool_choice", "requires tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise FieldError("tool_choice.function.name", "must be the name of one of the tools")
        if given := next(iter(self.constraints()), None):
            raise FieldError(given, "can't be combined with a forced tool call. Use tool_choice auto or none")

    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def grammar_field(self) -> str | None:
        if field := super().grammar_field():
            return field
        if not self.holds_calls:
            return None
        return "tools" if self.tool_choice in (None, "auto") else "tool_choice"

    @property
    def holds_calls(self) -> bool:
        """True if a grammar holds the calls: the request forces one, or a function is `strict`. An output has one constraint, so not
        beside another."""
        if self.constraints() or self.tool_choice == "none":
            return False
        return self.tool_choice not in (None, "auto") or any(tool.function.strict for tool in self.tools or ())

    @functools.cached_property
    def plain_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call. They may be megabytes, so this is done once."""
        return [] if self.tool_choice == "none" else [tool.plain() for tool in self.tools or ()]
