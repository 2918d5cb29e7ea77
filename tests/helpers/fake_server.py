"""An OpenAI completions server without a model: it finds the answer in the prompt, and fails as a test asks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from tests.helpers.in_process import listening

LOGPROB = -2.0
"""Log-probability of every token: the perplexity is exp(2)."""


def answer(prompt: str) -> str:
    """The key for the name in the prompt's question."""
    name = re.findall(r"The pass key for (\w+ \w+) is$", prompt)[0]
    return f" {re.findall(rf'The pass key for {name} is ([0-9]+)', prompt)[0]}.\n"


class FakeServer:
    """Answers passkey prompts, or others with `answer(prompt)`. `change(path, body, reply)` may replace any reply, or wait."""

    def __init__(
        self,
        change: Callable[[str, Any, dict[str, Any]], Any] = lambda path, body, reply: reply,
        answer: Callable[[Any], str] = answer,
    ):
        self.change = change
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.models = ["fake"]

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        def models() -> Any:
            return self.change("/models", None, {"data": [{"id": name} for name in self.models]})

        @app.post("/v1/completions")
        def completions(body: dict[str, Any], request: Request) -> Any:
            self.bodies.append(body)
            prompt = body["prompt"]
            tokens = len(prompt.split() if isinstance(prompt, str) else prompt)
            choice: dict[str, Any] = {
                "index": 0,
                "text": self.answer(prompt) if not body.get("echo") else prompt,
            }
            if body.get("echo"):
                choice["logprobs"] = {"token_logprobs": [None, *[LOGPROB] * (tokens - 1), -50.0]}
            return self.change(
                "/completions", body, {"choices": [choice], "usage": {"prompt_tokens": tokens, "completion_tokens": 1}}
            )

        return app


def refuse(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status)


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Runs a server for the app; yields its address, with the /v1."""
    with listening(app) as url:
        yield f"{url}/v1"
