"""Training sequences: documentation with hidden passkeys, and questions for them.

A batch depends only on (seed, step), so a resumed run sees the same data.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from default_model.vocabulary import ASSISTANT, BOS, EOS, USER
from jax_mla_cp.eval.passkey import Passkey

# Fractions of the sequences.
_CHAT = 0.3  # conversations
_UNNAMED = 0.15  # with a single passkey, which has no name
_NO_KEYS = 0.1  # text only


@dataclasses.dataclass(frozen=True)
class Batch:
    """[B, S + 1] tokens, and the kind of each token but the first as a target: 0 for none, 1 for text, 2 for an answer."""

    tokens: NDArray[np.int32]
    kind: NDArray[np.int8]


class Sequences:
    """Makes batches from the concatenated tokens of the documents, each of which begins with BOS."""

    def __init__(self, tokenizer: Tokenizer, stream: NDArray[np.uint16], seed: int):
        self._stream = stream
        self._seed = seed
        self._bos, self._eos, self._user, self._assistant = (
            tokenizer.token_to_id(name) for name in (BOS, EOS, USER, ASSISTANT)
        )

        @functools.lru_cache(maxsize=1 << 16)
        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

        self._encode = encode

    def batch(self, step: int, size: int, length: int) -> Batch:
        """Makes `size` sequences of `length` targets."""
        rng = random.Random(f"{self._seed} {step}")
        rows = [self._row(rng, length + 1) for _ in range(size)]
        return Batch(np.stack([tokens for tokens, _ in rows]), np.stack([kind[1:] for _, kind in rows]))

    def retrieval(self, seed: int, size: int, length: int) -> Batch:
        """Makes sequences for evaluation, each with one question at its end and the answer at any depth."""
        rng = random.Random(f"retrieval {seed}")
        rows = [self._row(rng, length + 1, chat=False, count=1) for _ in range(size)]
        return Batch(np.stack([tokens for tokens, _ in rows]), np.stack([kind[1:] for _, kind in rows]))

    def _row(
        self, rng: random.Random, length: int, *, chat: bool | None = None, count: int | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        chat = rng.random() < _CHAT if chat is None else chat
        if count is None:
            count = 0 if rng.random() < _NO_KEYS else rng.randint(1, max(2, min(24, length // 200)))
        named = count != 1 or rng.random() >= _UNNAMED
        keys: dict[str | None, Passkey] = {}
        for _ in range(count):
            key = Passkey.random(rng, named=named, digits=rng.choice((4, 5, 5, 5, 6, 7)))
            keys.setdefault(key.name, key)
        facts = [self._fact(key) for key in keys.values()]
        asked = (
            [*keys.values(), *rng.choices(list(keys.values()), k=rng.randint(0, 2))] if count > 1 else [*keys.values()]
        )
        rng.shuffle(asked)
        questions = [self._chat_turn(key, first=i == 0) if chat else self._question(key) for i, key in enumerate(asked)]
        head = [self._bos, self._user] if chat and questions else [self._bos]
        end = self._join(questions)
        text_length = length - len(head) - len(end[0]) - sum(len(tokens) for tokens, _ in facts)
        text = self._text(rng, max(text_length, 0))
        # Half of the texts have their passkeys anywhere, half in an early part, far from the question.
        within = rng.choice((1.0, 1.0, 0.5, 0.1))
        cuts = sorted(int(rng.random() * within * len(text)) for _ in facts)
        body = []
        for start, stop, fact in zip([0, *cuts], [*cuts, len(text)], [*facts, None], strict=True):
            body.append((text[start:stop], np.ones(stop - start, np.int8)))
            if fact:
                body.append(fact)
        middle = self._join(body)
        tokens = np.concatenate([head, middle[0], end[0]]).astype(np.int32)
        kind = np.concatenate([np.zeros(len(head), np.int8), middle[1], end[1]])
        return tokens[-length:], kind[-length:]

    def _text(self, rng: random.Random, length: int) -> NDArray[np.int32]:
        start = rng.randrange(max(1, len(self._stream) - length))
        return self._stream[start : start + length].astype(np.int32)

    def _fact(self, key: Passkey) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        """A fact is not a target: it is unpredictable, and the model must not learn to write passkeys into text."""
        return self._marked((f"\n{key.fact()}\n", 0))

    def _question(self, key: Passkey) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        return self._marked(("\n" + key.question(), 0), (f" {key.key}.\n", 2))

    def _chat_turn(self, key: Passkey, *, first: bool) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        question, mark, answer = key.question().partition("?")
        user = "\n" + question + mark if first else question + mark
        asked = [*([] if first else [self._user]), *self._encode(user), self._assistant]
        answered = [*self._encode(f"{answer[1:]} {key.key}."), self._eos]
        return self._join([self._as_kind(asked, 0), self._as_kind(answered, 2)])

    def _marked(self, *parts: tuple[str, int]) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        return self._join([self._as_kind(self._encode(text), kind) for text, kind in parts])

    @staticmethod
    def _as_kind(ids: Sequence[int], kind: int) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        return np.array(ids, np.int32), np.full(len(ids), kind, np.int8)

    @staticmethod
    def _join(
        parts: list[tuple[NDArray[np.int32], NDArray[np.int8]]],
    ) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        if not parts:
            return np.zeros(0, np.int32), np.zeros(0, np.int8)
        return np.concatenate([tokens for tokens, _ in parts]), np.concatenate([kind for _, kind in parts])
