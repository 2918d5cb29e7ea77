"""An OpenAI server: this project's, vLLM's, SGLang's. Prompts go as token ids."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from jax_mla_cp.bench.peer.work import TargetFailed
from jax_mla_cp.client.openai import ModelNotFound, OpenAIClient, RequestError
from jax_mla_cp.config.errors import ConfigError


class Server:
    """Implements `jax_mla_cp.bench.peer.work.Target`."""

    def __init__(self, base_url: str, *, model: str | None, timeout: float):
        """Asks the server for its models.

        Args:
          base_url: with its /v1.
          model: a model of the server; None: its only one.
          timeout: seconds for one answer.

        Raises:
          ConfigError: no such server or model.
        """
        self._client = OpenAIClient(base_url, timeout=timeout, trust_env=True)
        self._model, self._versions = asyncio.run(self._look(model))

    async def _look(self, model: str | None) -> tuple[str, dict[str, str]]:
        try:
            async with self._client:
                return await self._client.choose_model(model), await self._client.versions()
        except RequestError as error:
            raise ConfigError(
                "base_url",
                f"{self._client.url}: {error}. Give the address of an OpenAI server with its /v1, like http://127.0.0.1:8000/v1.",
            ) from error
        except ModelNotFound as error:
            raise ConfigError("served_model_name", str(error)) from error

    def metadata(self) -> dict[str, Any]:
        return {"engine": self._client.url, "model": self._model, "versions": self._versions}

    def run(self, prompts: Sequence[list[int]], output_tokens: int) -> float:
        return asyncio.run(self._run(prompts, output_tokens))

    async def _run(self, prompts: Sequence[list[int]], output_tokens: int) -> float:
        async with self._client:
            began = time.perf_counter()
            await asyncio.gather(*(self._complete(prompt, output_tokens) for prompt in prompts))
            return time.perf_counter() - began

    async def _complete(self, prompt: list[int], output_tokens: int) -> None:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        try:
            answer = await self._client.complete(body)
        except RequestError as error:
            raise TargetFailed(f"POST /completions: {error}") from error
        try:
            count = answer["usage"]["completion_tokens"]
        except (KeyError, TypeError):
            raise TargetFailed("the answer has no usage.completion_tokens: no OpenAI completions server") from None
        if count != output_tokens:
            raise TargetFailed(f"{output_tokens} tokens were asked for with ignore_eos, {count} came")
