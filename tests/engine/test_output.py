"""Wishes of a request for its output, and their fulfilment."""

from __future__ import annotations

import numpy as np
import pytest

from jax_mla_cp.engine import (
    Engine,
    Failed,
    Finished,
    GrammarError,
    PromptLogprobs,
    Token,
)
from jax_mla_cp.engine.text import TextStream
from jax_mla_cp.tokenizer import JsonVocabulary, Tokenizer
from tests.helpers.byte_tokenizer import byte_backend, byte_tokenizer
from tests.helpers.engine_requests import RecordedRequest, ended, is_idle
from tests.helpers.standin import VOCAB, PageModel, continuation, logprob
from tests.helpers.waiting import until


def test_what_follows_an_end_within_a_run_is_dropped() -> None:
    """Stop tokens, stop strings and max_tokens end a request wherever they fall among the drafts that hold."""
    model = PageModel(draft_tokens=4)
    engine = Engine(model)
    engine.start()
    for i in range(12):
        prompt = [i, 2, 3] * (1 + i % 9)
        want = continuation(prompt, 20)
        bytes_only = [t for t in want[3:] if 32 <= t < 127]
        stop = chr(bytes_only[-1])
        asked = [
            *(RecordedRequest(prompt, most) for most in range(1, 9)),
            *(RecordedRequest(prompt, 20, frozenset({token})) for token in want[:8]),
            RecordedRequest(prompt, 20, text=TextStream(byte_tokenizer(), [stop])),
        ]
        for a in asked:
            engine.submit(a.request)
        for most, a in enumerate(asked[:8], 1):
            assert ended(a) == (want[:most], "length", None)
        for token, a in zip(want, asked[8:16], strict=False):
            assert ended(a) == (want[: want.index(token) + 1], "stop", token)
        assert ended(asked[-1]) == (want[: want.index(ord(stop)) + 1], "stop", stop)
    until(lambda: is_idle(engine))
    stats = engine.status().speculation
    assert stats is not None
    assert stats.num_drafts == sum(drafts * times for (drafts, _), times in model.accepted.items())
    assert stats.num_accepted == sum(accepted * times for (_, accepted), times in model.accepted.items())
    assert {(4, accepted) for accepted in range(5)} < set(model.accepted), "every number of drafts was accepted"
    engine.stop(5)


def test_text_that_was_held_back_comes_with_the_end(engine: Engine) -> None:
    """ "ab" may begin "abc"; it is the answer's if a stop token, or the last of `max_tokens`, follows."""
    prompt = next([n] for n in range(VOCAB) if all(32 <= t < 127 for t in continuation([n], 3)))
    a, b, third = continuation(prompt, 3)
    held = chr(a) + chr(b)
    for most, stop in ((2, frozenset[int]()), (9, frozenset({third}))):
        asked = RecordedRequest(prompt, most, stop, TextStream(byte_tokenizer(), [held + "\n"]))
        engine.submit(asked.request)
        end = asked.result()[1]
        assert isinstance(end, Finished) and end.text == held
        assert [e.text for e in asked.all if isinstance(e, Token)] == [""] * len(asked.all[:-1]) != []


@pytest.mark.parametrize("include_stop", [True, False])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("is_special", [True, False])
def test_the_text_of_a_stop_token(
    engine: Engine, include_stop: bool, skip_special_tokens: bool, is_special: bool
) -> None:
    """As in vLLM: left out like a stop string, whatever is shown of special tokens; and shown like any token if included."""
    prompt = next([n] for n in range(VOCAB) if all(32 <= t < 127 for t in continuation([n], 2)))
    first, second = continuation(prompt, 2)
    backend = byte_backend()
    backend.add_special_tokens([chr(second)] if is_special else [])
    tokenizer = Tokenizer(JsonVocabulary(backend))
    text = TextStream(tokenizer, include_stop=include_stop, skip_special_tokens=skip_special_tokens)
    asked = RecordedRequest(prompt, 9, frozenset({second}), text)
    engine.submit(asked.request)
    assert ended(asked) == ([first, second], "stop", second)
    shown = include_stop and not (is_special and skip_special_tokens)
    assert text_of(asked) == chr(first) + (chr(second) if shown else "")


def test_a_stop_string_within_an_included_stop_token(engine: Engine) -> None:
    """As in vLLM: the text ends with the stop string, which is then the reason."""
    prompt = next([n] for n in range(VOCAB) if all(32 <= t < 127 for t in continuation([n], 2)))
    first, second = continuation(prompt, 2)
    for include_stop, reason in ((True, chr(second)), (False, second)):
        text = TextStream(byte_tokenizer(), [chr(second)], include_stop=include_stop)
        asked = RecordedRequest(prompt, 9, frozenset({second}), text)
        engine.submit(asked.request)
        assert ended(asked) == ([first, second], "stop", reason)
        assert text_of(asked) == chr(first) + (chr(second) if include_stop else "")


def text_of(asked: RecordedRequest) -> str:
    return "".join(event.text for event in asked.all if isinstance(event, Token | Finished))


class Digits:
    """Three digits, written as their characters' codes."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self) -> np.ndarray:
        words = np.zeros(-(-VOCAB // 32), np.uint32)
        for token in range(48, 58):
            words[token // 32] |= np.uint32(1 << token % 32)
        return words

    def accept(self, token: int) -> None:
        self.taken.append(token)

    @property
    def finished(self) -> bool:
        return len(self.taken) == 3


def test_a_grammar_leads_and_ends_its_request() -> None:
    engine = Engine(PageModel(draft_tokens=2))
    engine.start()
    grammar = Digits()
    asked, other = RecordedRequest([1, 2], 20, grammar=grammar), RecordedRequest([3], 20)
    engine.submit_all([asked.request, other.request])
    tokens, reason, stop = ended(asked)
    assert (
        (reason, stop) == ("stop", None)
        and tokens == grammar.taken
        and len(tokens) == 3
        and all(48 <= t < 58 for t in tokens)
    )
    assert ended(other)[0] == continuation([3], 20)

    class Breaks(Digits):
        def mask(self) -> np.ndarray:
            if len(self.taken) == 1:
                raise ValueError("no way on")
            return super().mask()

    broken, other = RecordedRequest([1, 2], 20, grammar=Breaks()), RecordedRequest([4], 20)
    engine.submit_all([broken.request, other.request])
    assert broken.result()[1] == Failed("The request's next token could not be prepared.", "internal")
    assert ended(other)[0] == continuation([4], 20)

    class Refuses(Digits):
        def accept(self, token: int) -> None:
            raise GrammarError("too hard")

    refused, other = RecordedRequest([1, 2], 20, grammar=Refuses()), RecordedRequest([5], 20)
    engine.submit_all([refused.request, other.request])
    assert refused.result()[1] == Failed("too hard", "grammar")
    assert ended(other)[0] == continuation([5], 20)
    engine.stop(5)
    assert is_idle(engine)


def test_no_end_before_min_tokens(engine: Engine) -> None:
    free = continuation([5], 12)
    even = frozenset(range(0, VOCAB, 2))
    asked = RecordedRequest([5], 40, even, min_tokens=4)
    engine.submit(asked.request)
    tokens, reason, stop = ended(asked)
    assert reason == "stop" and len(tokens) >= 5 and tokens[-1] == stop
    assert not set(tokens[:-1]) & even and set(free[:4]) & even, "the bans changed something"
    text = TextStream(byte_tokenizer(), [chr(t) for t in free if 32 <= t < 127])
    asked = RecordedRequest([5], 12, text=text, min_tokens=11)
    engine.submit(asked.request)
    assert len(ended(asked)[0]) >= 11


def test_scored_prompts(engine: Engine) -> None:
    prompt = [7, 1, 7] * 8
    engine.submit(first := RecordedRequest(prompt, 1).request)
    scored = RecordedRequest(prompt, 0, prompt_logprobs=True)
    engine.submit(scored.request)
    assert ended(scored) == ([], "length", None)
    [event, _] = scored.all
    assert isinstance(event, PromptLogprobs) and np.isnan(event.logprobs[0])
    assert event.logprobs[1:].tolist() == [logprob(prompt[:n], prompt[n]) for n in range(1, 24)]
    assert event.top_tokens.shape == event.top_logprobs.shape == (24, 20)
    after = RecordedRequest(prompt, 1)
    engine.submit(after.request)
    end = after.result()[1]
    assert isinstance(end, Finished) and end.cached_tokens == 20 and first.cached_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "most", "options", "message"),
    [
        ([], 1, {}, "prompt"),
        ([1], 0, {}, "max_tokens: must be at least 1, got 0"),
        ([1], -1, {"prompt_logprobs": True}, "max_tokens: must be at least 0"),
        ([1], 3, {"min_tokens": 4}, "min_tokens: must be 0 to max_tokens=3, got 4"),
    ],
)
def test_requests_that_can_not_be(prompt: list[int], most: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecordedRequest(prompt, most, **options)
