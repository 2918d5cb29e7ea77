"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jax_mla_cp.tokenizer.chat import ChatTemplate
from jax_mla_cp.tokenizer.errors import TokenizerError
from jax_mla_cp.tokenizer.huggingface import JsonVocabulary
from jax_mla_cp.tokenizer.kimi import KimiVocabulary
from jax_mla_cp.tokenizer.settings import read_settings, special_tokens, token_text


class Vocabulary(Protocol):
    """The tokens of a tokenizer, whatever file they are from."""

    wrapping: tuple[tuple[int, ...], tuple[int, ...]]
    """What the file itself, without tokenizer_config.json, puts before and after a text."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; the name of a special token, written in the text, is that token."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens. Special tokens and unknown ids have none; bytes that are no UTF-8 are U+FFFD."""

    def token_id(self, token: str) -> int | None:
        """The id of a token, written as in the file; None if there is no such token."""

    def token_bytes(self, token: int) -> bytes | None:
        """What a token is in UTF-8 text, often no whole code points; None for special tokens and unknown ids."""

    def last(self) -> tuple[str, int]:
        """The token with the largest id."""


class Tokenizer:
    """A vocabulary, the special tokens that a text is wrapped in, and the form of conversations."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        chat_template: ChatTemplate | None = None,
        special_tokens: Mapping[str, str] = {},
    ):
        """
        Args:
          special_tokens: the text of `bos_token`, `eos_token` and their like.
        """
        self._vocabulary = vocabulary
        self.prefix, self.suffix = tuple(prefix), tuple(suffix)
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens)

    @classmethod
    def from_dir(cls, directory: str | Path, vocab_size: int) -> Tokenizer | None:
        """Reads tokenizer.json, else Kimi's tiktoken.model; tokenizer_config.json; and chat_template.jinja.

        None if there is neither of the first two. docs/tokenizers.md tells what is read and what is refused.

        Args:
          vocab_size: the model's; every token must be one that it knows.

        Raises:
          TokenizerError: a file that can't be read, a token beyond the vocabulary, a flag whose token is missing, a
            chat template that is no Jinja.
        """
        folder = Path(directory)
        path = folder / "tokenizer.json"
        vocabulary: Vocabulary
        if path.is_file():
            vocabulary = JsonVocabulary.parse(_read(path), path)
            settings = read_settings(folder / "tokenizer_config.json")
        elif (path := folder / "tiktoken.model").is_file():
            settings = read_settings(folder / "tokenizer_config.json")
            vocabulary = KimiVocabulary.read(path, settings)
        else:
            return None
        return cls._fitted(vocabulary, settings, vocab_size, ChatTemplate.from_dir(folder, settings), path)

    @classmethod
    def from_json(cls, contents: bytes, settings: Mapping[str, Any], vocab_size: int) -> Tokenizer:
        """From the contents of a tokenizer.json and of a tokenizer_config.json, which may have a `chat_template`.

        Raises:
          TokenizerError: as `from_dir`.
        """
        template = ChatTemplate.from_settings(settings)
        return cls._fitted(JsonVocabulary.parse(contents), settings, vocab_size, template, "tokenizer.json")

    @classmethod
    def _fitted(
        cls,
        vocabulary: Vocabulary,
        settings: Mapping[str, Any],
        vocab_size: int,
        template: ChatTemplate | None,
        source: str | Path,
    ) -> Tokenizer:
        """`add_bos_token` and `add_eos_token` decide when they are given; otherwise the vocabulary's file does."""
        token, largest = vocabulary.last()
        if largest >= vocab_size:
            raise TokenizerError(
                str(source),
                f"token {token!r} has id {largest}, but the model's vocab_size is {vocab_size}. "
                "Use the tokenizer that belongs to the model.",
            )
        prefix, suffix = (
            _wrapping(settings, which, vocabulary, default)
            for which, default in zip(("bos", "eos"), vocabulary.wrapping, strict=True)
        )
        return cls(
            vocabulary, prefix=prefix, suffix=suffix, chat_template=template, special_tokens=special_tokens(settings)
        )

    def encode(self, text: str, *, wrap: bool = True) -> list[int]:
        """Token ids, with the BOS and EOS tokens that the tokenizer's settings ask for, unless `wrap` is false.

        The name of a special token in the text becomes that token, as in transformers and vLLM.

        Raises:
          TokenizerError: half a surrogate pair, which is no text.
        """
        ids = self._encode(text)
        return [*self.prefix, *ids, *self.suffix] if wrap else ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of a conversation: `ChatTemplate.render`'s text. The template writes BOS, so none is added here.

        The name of a special token in a message's content becomes that token: a user who writes the tokens that end a
        turn and begin another speaks in another role. transformers (unless told otherwise), vLLM and SGLang do the same;
        what a message must not be able to say has to be removed before.

        Raises:
          TokenizerError: there is no template, it fails, or half a surrogate pair.
          ValueError: a message that is not of `render`'s form.
        """
        if self.chat_template is None:
            raise TokenizerError(
                "chat_template",
                "the model directory has no chat template, so messages can't be made a prompt. Send the prompt as text, "
                "or put the model's chat_template.jinja there.",
            )
        return self._encode(
            self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; ids that the tokenizer does not know are no text."""
        return self._vocabulary.decode(ids)

    def token_id(self, token: str) -> int | None:
        """The id of a token, written as in the file; None if there is no such token."""
        return self._vocabulary.token_id(token)

    def token_bytes(self, token: int) -> bytes | None:
        """What a token is in UTF-8 text, often no whole code points; None for special tokens and unknown ids."""
        return self._vocabulary.token_bytes(token)

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                "text", f"character {error.start} is {text[error.start]!r}, half a surrogate pair, which is no text."
            ) from error
        return self._vocabulary.encode(text)


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """For whatever needs text.

    Raises:
      TokenizerError: the model has none.
    """
    if tokenizer is None:
        raise TokenizerError(
            "tokenizer.json",
            "the model directory has no tokenizer.json (or Kimi's tiktoken.model), so text can't be tokenized. Send the "
            "prompt as token ids, or put a tokenizer.json there (transformers: "
            "AutoTokenizer.from_pretrained(..).save_pretrained(DIR)).",
        )
    return tokenizer


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(str(path), f"not readable: {error}") from error


def _wrapping(
    settings: Mapping[str, Any], which: str, vocabulary: Vocabulary, default: tuple[int, ...]
) -> tuple[int, ...]:
    """The tokens for `add_bos_token` or `add_eos_token`; `default` where the flag is not given."""
    flag = settings.get(f"add_{which}_token")
    if flag is None:
        return default
    if not flag:
        return ()
    content = token_text(settings.get(f"{which}_token"))
    number = None if content is None else vocabulary.token_id(content)
    if number is None:
        raise TokenizerError(
            "tokenizer_config.json",
            f"add_{which}_token is true, but {which}_token={content!r} is no token of the "
            f"tokenizer. Set {which}_token to one, or add_{which}_token to false.",
        )
    return (number,)
