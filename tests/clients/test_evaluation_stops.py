"""Evaluations of code send more stop strings than OpenAI's four: lm_eval's classes ask, the server stops at each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from tests.helpers.scripted_model import Script

PROMPT = 'def add(a, b):\n    """Sums."""\n'
BODY = "    return a + b\n"
EOS = "<|endoftext|>"


def humaneval_stops() -> list[str]:
    """Stop strings of lm_eval's own task."""
    text = (Path(lm_eval.__file__).parent / "tasks/humaneval/humaneval.yaml").read_text()
    settings = yaml.safe_load(text.replace("!function", ""))
    found: list[str] = settings["generation_kwargs"]["until"]
    return found


EIGHT = ["\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>"]
"""Stop strings of bigcode-evaluation-harness (bigcode_eval/tasks/humaneval.py)."""


def ask(lm: LocalCompletionsAPI, context: Any, until: list[str]) -> str:
    settings = {"until": until, "max_gen_toks": 200, "do_sample": False}
    request = Instance("generate_until", {}, (context, settings), 0)
    (text,) = lm.generate_until([request], disable_tqdm=True)
    return text


@pytest.mark.parametrize("until", [humaneval_stops(), EIGHT], ids=["lm_eval", "bigcode"])
@pytest.mark.parametrize("concurrent", [1, 2])
def test_every_stop_stops(model: Script, url: str, until: list[str], concurrent: int) -> None:
    lm = LocalCompletionsAPI(
        **{"base_url": f"{url}/v1/completions", "model": "tiny", "max_retries": 1, "num_concurrent": concurrent},
        **{"tokenizer_backend": None, "tokenized_requests": False, "eos_string": EOS},
    )
    for stop in (
        until if concurrent > 1 else [*until, EOS]
    ):  # with several at a time, it doesn't send the end token's text
        model.script = f"{BODY}{stop} more"
        assert ask(lm, f"{PROMPT}\x02", until) == BODY
    model.script = BODY
    assert ask(lm, f"{PROMPT}\x02", until) == BODY, "without any"


def test_chat(model: Script, url: str) -> None:
    """It sends four of them, and cuts at the others itself."""
    lm = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", model="tiny", max_retries=1, eos_string=EOS)
    chat = lm.apply_chat_template([{"role": "user", "content": PROMPT}])
    for stop in EIGHT[:4]:
        model.script = f"{BODY}{stop} more"
        assert ask(lm, chat, EIGHT) == BODY
