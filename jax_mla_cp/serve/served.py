"""The model as requests see it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence

from jax_mla_cp.engine import Engine, Finished
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.grammar import Grammars
from jax_mla_cp.serve.names import TokenNames
from jax_mla_cp.tokenizer import Tokenizer, TokenizerError, require_tokenizer


@dataclasses.dataclass(frozen=True)
class Served:
    """One model behind one engine. Its methods refuse what it can't do with an `ApiError`."""

    name: str
    engine: Engine
    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    seed: int | None
    queue_timeout: float | None = None
    """Seconds that a request may wait to run; None: no limit. So too for all of its time, `request_timeout`."""
    request_timeout: float | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def names(self) -> TokenNames:
        return TokenNames(self.tokenizer)

    @functools.cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.vocab_size, self.eos_token_ids)

    def check_name(self, name: str) -> None:
        """Refuses another model's name with 404."""
        if name != self.name:
            message = f"The model {ascii(name)[:100]} does not exist; this server has {self.name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Refuses ids that are not rows of the model's embedding: whatever the tokenizer says, these are all there are."""
        for bad in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= bad < self.vocab_size:
                message = f"{param}: token id {bad} is not in the vocabulary (0 to {self.vocab_size - 1})."
                raise ApiError(400, message, param=param)

    def stop_reason(self, end: Finished) -> int | str | None:
        """vLLM's field: the stop string or token that was asked for; None for the model's own end."""
        return None if end.stop in self.eos_token_ids else end.stop

    def need_tokenizer(self, param: str) -> Tokenizer:
        """Refuses what needs text if the model has no tokenizer."""
        try:
            return require_tokenizer(self.tokenizer)
        except TokenizerError as error:
            raise ApiError(400, f"{param}: {error.message}", param=param) from error
