"""The echo of /v1/completions: the prompt's text, and the place of each of its tokens in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jax_mla_cp.serve.schemas.completions import CompletionRequest
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.tokenizer import Detokenizer

_REACH = 64  # characters around its expected place in which a token is looked for


class Echo:
    """An echoed prompt: the client's text, or the text of its token ids. A truncated prompt is echoed as it was used."""

    def __init__(self, served: ServedModel, body: CompletionRequest, prompt: str | list[int], ids: Sequence[int]):
        self._tokenizer = served.tokenizer
        self._ids = ids
        self._is_text = isinstance(prompt, str) and body.truncate_prompt_tokens is None
        self._adds_special = body.add_special_tokens is not False
        # Special tokens of a text are those that it spells.
        self._skips_special = not self._is_text and body.skip_special_tokens is not False
        if isinstance(prompt, str) and self._is_text:
            self.text = prompt
        else:
            self.text = (
                "" if self._tokenizer is None else self._tokenizer.decode(ids, skip_special_tokens=self._skips_special)
            )

    def offsets(self) -> list[int]:
        """The character offset at which each token's text begins; for a token without text, at which the next one's does."""
        if self._tokenizer is None:
            return [0] * len(self._ids)
        first, end = 0, len(self._ids)
        if self._is_text and self._adds_special:  # BOS and EOS, which the text does not have
            first, end = len(self._tokenizer.prefix), end - len(self._tokenizer.suffix)
        detokenizer = Detokenizer(self._tokenizer, skip_special_tokens=self._skips_special)
        pieces = (detokenizer.add(token) if first <= i < end else "" for i, token in enumerate(self._ids))
        return locate(self.text, pieces)


def locate(text: str, pieces: Iterable[str]) -> list[int]:
    """Returns the character offset of each piece in a text, in time linear in the number of pieces.

    The pieces usually add up to the text. They do not where a tokenizer adds or drops white space, normalizes, or has an unknown
    token. A piece that the text lacks near its place counts as one character, or as none if it is white space, but never reaches
    beyond the next piece that is found. A piece without text begins where the next one does.
    """
    offsets: list[int] = []
    end, lost = 0, 0  # where the last piece found ends; the characters of the pieces since
    for piece in pieces:
        found = _find(text, piece, end, lost) if piece else None
        if found is None:
            offsets.append(min(end + lost, len(text)))
            lost += bool(piece.strip())
            continue
        begin, length = found
        for i in range(len(offsets) - 1, -1, -1):
            if offsets[i] <= begin:
                break
            offsets[i] = begin
        offsets.append(begin)
        end, lost = begin + length, 0
    return offsets


def _find(text: str, piece: str, end: int, lost: int) -> tuple[int, int] | None:
    """The place of a piece, and its length there: at `end`, or after white space that belongs to no piece; near it only if pieces
    were lost, as a later occurrence is another piece's otherwise."""
    forms = [form for form in (piece, piece.strip()) if form]
    if lost:
        first = max(end, end + lost - _REACH)
        places = ((text.find(form, first, first + 2 * _REACH + len(form)), len(form)) for form in forms)
        return next((place for place in places if place[0] >= 0), None)
    near = text[end : end + _REACH]
    starts = (end, end + len(near) - len(near.lstrip()))
    return next(((at, len(form)) for at in starts for form in forms if text.startswith(form, at)), None)
