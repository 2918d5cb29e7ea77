"""Tokenizers and chat templates, from the files of a model directory. No code from the directory is run."""

from jax_mla_cp.tokenizer.chat_template import ChatTemplate
from jax_mla_cp.tokenizer.detokenizer import Detokenizer
from jax_mla_cp.tokenizer.errors import TokenizerError
from jax_mla_cp.tokenizer.huggingface import JsonVocabulary
from jax_mla_cp.tokenizer.kimi import KimiVocabulary
from jax_mla_cp.tokenizer.tokenizer import Tokenizer, Vocabulary, require_tokenizer

__all__ = [
    "ChatTemplate",
    "Detokenizer",
    "JsonVocabulary",
    "KimiVocabulary",
    "Tokenizer",
    "TokenizerError",
    "Vocabulary",
    "require_tokenizer",
]
