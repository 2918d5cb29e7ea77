"""A model that says what a test wants, byte by byte, behind a chat template for all that templates may ask for."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jax_mla_cp.batch.logit_bias import LogitBias
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.engine import Engine
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.step.results import SampledToken, StepResult
from jax_mla_cp.tokenizer import ChatTemplate, JsonVocabulary, Tokenizer
from tests.helpers.byte_tokenizer import EOS, byte_backend
from tests.helpers.in_process import serving
from tests.helpers.standin import PageModel

# The answer follows \x02; who sends "open" gets a prompt that ends with <think>, as DeepSeek-R1's does.
TEMPLATE = """\
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}{{ m.content or '' }}{% if m.content == 'refuse' %}{{ raise_exception('no such talk') }}{% endif %}
{%- for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments }}]{% endfor %}
{%- if m.role == 'tool' %}={{ m.tool_call_id }}{% endif %}
{%- endfor %}{% if effort or reasoning_effort %}{{ reasoning_effort }}{% endif %}
{%- if add_generation_prompt %}{{ '\\x02' }}{% if messages[-1].content == 'open' %}{{ '<think>\\n' }}{% endif %}{% endif %}
{#- thoughts end with </think> #}"""


THINK_TOKENS = ("<think>", "</think>")
VOCAB_SIZE = EOS + 1 + len(THINK_TOKENS)
_INSTEAD = (EOS, *b'}]"<:,', *range(33, 127), *range(VOCAB_SIZE))
"""Tokens that the model says, the first that is allowed, where its script is forbidden: rather an end than more."""


def _is_allowed(token: int, bias: LogitBias | None) -> bool:
    if bias is None:
        return True
    banned = token in bias.tokens[bias.add == -np.inf]
    return not banned and (bias.mask is None or bool(int(bias.mask[token // 32]) >> token % 32 & 1))


class Script(PageModel):
    """Says `script`, and then EOS, from where the answer begins; what a grammar forbids it replaces by what it allows.

    Args:
      has_think_tokens: its vocabulary has <think> and </think>; otherwise they are text.
    """

    script = ""

    def __init__(self, *, has_think_tokens: bool = False, **sizes: int):
        super().__init__(**sizes)
        backend = byte_backend()
        if has_think_tokens:
            backend.add_special_tokens(list(THINK_TOKENS))
        self.vocabulary = JsonVocabulary(backend)

    def _run(self, group: int, work: StepRequest) -> StepResult:
        outcome = super()._run(group, dataclasses.replace(work, logit_bias=None))
        if not outcome.sampled:
            return outcome
        seen = self.slots[group][self.slots_of(work.pages, work.num_computed_tokens + len(work.tokens))].tolist()
        answer = max((at + 1 for at, token in enumerate(seen) if token == 2), default=0)
        said, opening = seen[answer:], self.vocabulary.encode("<think>\n")
        said = said[len(opening) :] if said[: len(opening)] == opening else said
        whole = [*self.vocabulary.encode(self.script), EOS]
        token, usual = whole[min(len(said), len(whole) - 1)], outcome.sampled[0]
        token = next(t for t in (token, *_INSTEAD) if _is_allowed(t, work.logit_bias))
        self.keep(group, work, token)
        return StepResult(
            [SampledToken(token, usual.logprob, usual.top_tokens, usual.top_logprobs)], [], outcome.prompt_logprobs
        )


@contextlib.contextmanager
def serving_script(
    model: Script, template: str = TEMPLATE, max_model_len: int = 600, prefix: Sequence[int] = (), **served: Any
) -> Iterator[str]:
    """The address of a server of the model.

    Args:
      prefix: special tokens before a text.
    """
    tokenizer = Tokenizer(model.vocabulary, prefix=prefix, chat_template=ChatTemplate(template, {}))
    one = ServedModel("tiny", Engine(model), tokenizer, VOCAB_SIZE, max_model_len, (EOS,), None, **served)
    with serving(one) as url:
        yield url
