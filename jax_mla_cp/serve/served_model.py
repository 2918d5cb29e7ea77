"""`ServedModel`: the model that the routes serve, and its limits."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence

from jax_mla_cp.engine import Engine, Finished
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.reasoning import ReasoningFormat, is_reasoning_model
from jax_mla_cp.serve.schemas.generation import GenerationRequest
from jax_mla_cp.serve.structured_output import Grammars
from jax_mla_cp.serve.token_texts import TokenTexts
from jax_mla_cp.serve.tool_calls import FORMATS, ToolFormat, detect
from jax_mla_cp.serve.workers import Workers
from jax_mla_cp.tokenizer import Tokenizer, TokenizerError, require_tokenizer

_MAX_QUEUED_GRAMMARS = 1024


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """One model behind one engine. Its checks raise `ApiError`."""

    name: str
    engine: Engine
    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    default_seed: int | None
    """Seed of requests without one. None: each gets a random seed."""
    queue_timeout: float | None = None
    """Maximum seconds in the waiting queue; None: no limit."""
    request_timeout: float | None = None
    """Maximum seconds from arrival to the end; None: no limit."""
    tool_parser: str = "auto"
    """Name of a format in `jax_mla_cp.serve.tool_calls.FORMATS`; auto: by the chat template; none."""
    reasoning_parser: ReasoningFormat = "auto"
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)

    @functools.cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.vocab_size, self.eos_token_ids)

    @functools.cached_property
    def grammar_workers(self) -> Workers:
        """The threads that prepare requests with a grammar. One may take seconds to compile."""
        return Workers("their grammars", threads=2, max_queued=_MAX_QUEUED_GRAMMARS)

    @functools.cached_property
    def tool_format(self) -> ToolFormat | None:
        """The model's format of tool calls; None if it has none."""
        if self.tool_parser != "auto":
            return FORMATS.get(self.tool_parser)
        template = None if self.tokenizer is None else self.tokenizer.chat_template
        return None if template is None else detect(template.source)

    @functools.cached_property
    def is_reasoning(self) -> bool:
        """True if the model's answers may begin with reasoning."""
        if self.reasoning_parser != "auto":
            return self.reasoning_parser == "think"
        return self.tokenizer is not None and is_reasoning_model(self.tokenizer)

    def check_model_name(self, name: str) -> None:
        """Raises 404 for the name of another model."""
        if name != self.name:
            message = f"The model {ascii(name)[:100]} does not exist. This server serves {self.name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_token_ids(self, tokens: Sequence[int], param: str) -> None:
        """Raises 400 for ids outside the model's embedding, which may be smaller than the tokenizer's vocabulary."""
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= token < self.vocab_size:
                message = f"{param}: token id {token} is not in the vocabulary (0 to {self.vocab_size - 1})."
                raise ApiError(400, message, param=param)

    def stop_reason(self, finished: Finished, body: GenerationRequest) -> int | str | None:
        """vLLM's `stop_reason`: the requested stop string or token id; None if the model's own EOS ended the answer."""
        # With `ignore_eos`, an EOS token that ends the answer nonetheless is one of the `stop_token_ids`.
        return None if finished.stop in self.eos_token_ids and not body.ignore_eos else finished.stop

    def require_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer. Raises 400 if the model has none."""
        try:
            return require_tokenizer(self.tokenizer)
        except TokenizerError as error:
            raise ApiError(400, f"{param}: {error.message}", param=param) from error
