"""`ServedModel`: the model that the routes serve, and its limits."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence

from jax_mla_cp.engine import Engine, Finished
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.grammar import Grammars
from jax_mla_cp.serve.token_texts import TokenTexts
from jax_mla_cp.tokenizer import Tokenizer, TokenizerError, require_tokenizer


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
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)

    @functools.cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.vocab_size, self.eos_token_ids)

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

    def stop_reason(self, finished: Finished) -> int | str | None:
        """vLLM's `stop_reason`: the requested stop string or token id; None if the model's own EOS ended the answer."""
        return None if finished.stop in self.eos_token_ids else finished.stop

    def require_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer. Raises 400 if the model has none."""
        try:
            return require_tokenizer(self.tokenizer)
        except TokenizerError as error:
            raise ApiError(400, f"{param}: {error.message}", param=param) from error
