"""`Tokenizer`: from text to token ids and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jax_mla_cp.tokenizer.chat_template import ChatTemplate
from jax_mla_cp.tokenizer.errors import TokenizerError
from jax_mla_cp.tokenizer.huggingface import JsonVocabulary
from jax_mla_cp.tokenizer.kimi import KimiVocabulary
from jax_mla_cp.tokenizer.tokenizer_config import read_bytes, read_tokenizer_config, special_tokens, token_text

_log = logging.getLogger(__name__)


class Vocabulary(Protocol):
    """The tokens of a tokenizer, independent of the file format."""

    affixes: tuple[tuple[int, ...], tuple[int, ...]]
    """Tokens that the file itself, without tokenizer_config.json, adds before and after a text."""

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text. Text that spells a special token becomes that token."""

    skipped_tokens: frozenset[int]
    """Ids of the special tokens that `skip_special_tokens` leaves out."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, special ones too: none for unknown ids, U+FFFD for invalid UTF-8."""

    def has_token(self, token: int) -> bool:
        """Returns True if there is a token with this id."""

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token, spelled as in the file; None if there is no such token."""

    def token_bytes(self, token: int) -> bytes | None:
        """Returns a token's UTF-8 bytes, often not whole code points; None for special tokens and unknown ids."""

    def last_token(self) -> tuple[str, int]:
        """Returns the token with the largest id, and the id."""


class Tokenizer:
    """A vocabulary, the special tokens around a text, and the chat template."""

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
          prefix, suffix: ids that `encode` adds before and after a text.
          special_tokens: the text of `bos_token`, `eos_token` and the other special tokens.
        """
        self._vocabulary = vocabulary
        self.prefix, self.suffix = tuple(prefix), tuple(suffix)
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens)

    @classmethod
    def from_dir(cls, directory: str | Path, vocab_size: int) -> Tokenizer | None:
        """Reads tokenizer.json, or else Kimi's tiktoken.model; tokenizer_config.json, with special_tokens_map.json and
        added_tokens.json; and chat_template.jinja.

        Returns None if there is neither of the first two. See docs/tokenizers.md for what is read and what is refused.

        Args:
          vocab_size: the model's. All ids must be below it.

        Raises:
          TokenizerError: a file can't be read or is a Git LFS pointer, an id is too large, the token of a flag or of the chat
            template does not exist, or the template is not valid Jinja.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        vocabulary: Vocabulary
        if path.is_file():
            config = read_tokenizer_config(directory)
            vocabulary = JsonVocabulary.parse(read_bytes(path), path, config)
        elif (path := directory / "tiktoken.model").is_file():
            config = read_tokenizer_config(directory)
            vocabulary = KimiVocabulary.read(path, config)
        else:
            return None
        return cls._configured(vocabulary, config, vocab_size, ChatTemplate.from_dir(directory, config), path)

    @classmethod
    def from_json(cls, contents: bytes, tokenizer_config: Mapping[str, Any], vocab_size: int) -> Tokenizer:
        """Makes a tokenizer from the contents of tokenizer.json and tokenizer_config.json, with its `chat_template` if any.

        Raises:
          TokenizerError: as for `from_dir`.
        """
        template = ChatTemplate.from_config(tokenizer_config)
        vocabulary = JsonVocabulary.parse(contents, tokenizer_config=tokenizer_config)
        return cls._configured(vocabulary, tokenizer_config, vocab_size, template, "tokenizer.json")

    @classmethod
    def _configured(
        cls,
        vocabulary: Vocabulary,
        tokenizer_config: Mapping[str, Any],
        vocab_size: int,
        template: ChatTemplate | None,
        source: str | Path,
    ) -> Tokenizer:
        """Applies tokenizer_config.json. Where it lacks `add_bos_token` or `add_eos_token`, the vocabulary's file decides."""
        token, largest = vocabulary.last_token()
        if largest >= vocab_size:
            raise TokenizerError(
                str(source),
                f"token {token!r} has id {largest}, but the model's vocab_size is {vocab_size}. "
                "Use the tokenizer that belongs to the model.",
            )
        tokens = special_tokens(tokenizer_config)
        prefix, suffix = (
            _affix(tokenizer_config, role, vocabulary, default)
            for role, default in zip(("bos", "eos"), vocabulary.affixes, strict=True)
        )
        _check_ends(tokens, vocabulary, template)
        return cls(
            vocabulary,
            prefix=prefix,
            suffix=suffix,
            chat_template=template,
            special_tokens=tokens,
        )

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`; None if the files name none."""
        text = self.special_tokens.get("eos_token")
        return None if text is None else self.token_id(text)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns token ids. With `add_special_tokens`, BOS and EOS are added as tokenizer_config.json asks.

        Text that spells a special token becomes that token, as in transformers and vLLM.

        Raises:
          TokenizerError: the text has an unpaired surrogate.
        """
        ids = self._encode(text)
        return [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], /, *, add_special_tokens: bool = False, **variables: Any
    ) -> list[int]:
        """Returns the token ids of a conversation, rendered by the chat template, which usually writes BOS itself.

        Text in a message that spells a special token becomes that token. A user who writes the tokens that end a turn and begin
        another one can therefore speak in another role. transformers (by default), vLLM and SGLang do the same; remove such text
        from untrusted messages first.

        Args:
          add_special_tokens: as for `encode`.
          variables: the other arguments of `ChatTemplate.render`.

        Raises:
          TokenizerError: there is no template, it fails, or the text has an unpaired surrogate.
          ValueError: a message does not have the form that `ChatTemplate.render` takes.
        """
        if self.chat_template is None:
            raise TokenizerError(
                "chat_template",
                "the model directory has no chat template, so messages can't be turned into a prompt. Send the prompt as text, "
                "or put the model's chat_template.jinja there.",
            )
        return self.encode(self.chat_template.render(messages, **variables), add_special_tokens=add_special_tokens)

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = True, shown: frozenset[int] = frozenset()
    ) -> str:
        """Returns text, without unknown ids. No space is put between special tokens.

        Args:
          skip_special_tokens: leave special tokens out, as the flag of that name in transformers and vLLM does.
          shown: ids of special tokens that have text nonetheless.
        """
        if skip_special_tokens and (skipped := self.skipped_tokens(shown)):
            ids = [token for token in ids if token not in skipped]
        return self._vocabulary.decode(ids)

    def skipped_tokens(self, shown: frozenset[int] = frozenset()) -> frozenset[int]:
        """Returns the ids of the tokens that `decode` leaves out."""
        return self._vocabulary.skipped_tokens - shown if shown else self._vocabulary.skipped_tokens

    def has_token(self, token: int) -> bool:
        """Returns True if there is a token with this id."""
        return self._vocabulary.has_token(token)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token, spelled as in the file; None if there is no such token."""
        return self._vocabulary.token_id(token)

    def token_bytes(self, token: int) -> bytes | None:
        """Returns a token's UTF-8 bytes, often not whole code points; None for special tokens and unknown ids."""
        return self._vocabulary.token_bytes(token)

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                "text",
                f"character {error.start} is {text[error.start]!r}, an unpaired surrogate, which can't be encoded in UTF-8.",
            ) from error
        return self._vocabulary.encode(text)


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """Returns the tokenizer.

    Raises:
      TokenizerError: it is None: the model has no tokenizer.
    """
    if tokenizer is None:
        raise TokenizerError(
            "tokenizer.json",
            "the model directory has no tokenizer.json (or Kimi's tiktoken.model), so text can't be tokenized. Send the "
            "prompt as token ids, or put a tokenizer.json there (transformers: "
            "AutoTokenizer.from_pretrained(..).save_pretrained(DIR)).",
        )
    return tokenizer


def _check_ends(tokens: Mapping[str, str], vocabulary: Vocabulary, template: ChatTemplate | None) -> None:
    """Refuses a chat template that would write a BOS or EOS that is no token, and warns of one that has none to write.

    A template may test whether there is one, which transformers leaves undefined too, so its absence is no error.
    """
    for role in ("bos_token", "eos_token"):
        text = tokens.get(role)
        if template is None or role not in template.variables:
            continue
        if text is None:
            _log.warning(
                "the chat template uses %s, which neither tokenizer_config.json nor special_tokens_map.json names: "
                "chat prompts have none",
                role,
            )
        elif vocabulary.token_id(text) is None:
            raise TokenizerError(
                "tokenizer_config.json",
                f"the chat template uses {role}={text!r} (of this file or special_tokens_map.json), which is not a token of the "
                "tokenizer. Take all files from one checkpoint.",
            )


def _affix(
    tokenizer_config: Mapping[str, Any], role: str, vocabulary: Vocabulary, default: tuple[int, ...]
) -> tuple[int, ...]:
    """The ids for `add_bos_token` or `add_eos_token` (`role` is "bos" or "eos"); `default` if the flag is not set."""
    flag = tokenizer_config.get(f"add_{role}_token")
    if flag is None:
        return default
    if not flag:
        return ()
    content = token_text(tokenizer_config.get(f"{role}_token"))
    token = None if content is None else vocabulary.token_id(content)
    if token is None:
        raise TokenizerError(
            "tokenizer_config.json",
            f"add_{role}_token is true, but {role}_token={content!r} is not a token of the "
            f"tokenizer. Set {role}_token to one, or add_{role}_token to false.",
        )
    return (token,)
