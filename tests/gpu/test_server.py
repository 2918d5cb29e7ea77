"""The server with its default flags on the GPUs that are here: the built-in model finds the passkeys."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import jax
import pytest

from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.default_model.heldout import heldout_text
from jax_mla_cp.eval.corpus import Corpus
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.tokenizer import Tokenizer, require_tokenizer
from tests.helpers.live import serving

LENGTHS = (100, 777, 2100, 5000)


@pytest.mark.parametrize("mesh", ["tp=1", "cp=2", "tp=2"])
def test_passkeys(mesh: str, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the server's packages are not installed")
    if MeshShape.parse(mesh).devices > jax.device_count():
        pytest.skip(f"{mesh} needs {MeshShape.parse(mesh).devices} GPUs, there are {jax.device_count()}")
    tokenizer = require_tokenizer(Tokenizer.from_dir(DIRECTORY, ModelConfig.from_dir(DIRECTORY).vocab_size))
    text = Corpus(tokenizer, heldout_text())
    prompts = [text.prompt(length, depth, seed=0) for length in LENGTHS for depth in (0.1, 0.9)]
    with serving(tmp_path / "server.log", ("--platform", "cuda", "--mesh", mesh, "--no-warmup")) as live:

        def ask(tokens: list[int]) -> str:
            body = {"model": live.model, "prompt": tokens, "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{live.url}/v1/completions", json=body, timeout=300)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])

        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(ask, [prompt.tokens for prompt in prompts]))
        assert "FlashAttention-3" in live.log()
        live.wait_until_idle()
    missed = [(p.length, p.depth, a) for p, a in zip(prompts, answers, strict=True) if not p.is_answered_by(a)]
    assert not missed
