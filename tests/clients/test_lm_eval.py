"""lm_eval as its users start it: `local-completions` against the server, tasks on local data, nothing downloaded."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.default_model.heldout import heldout_text
from jax_mla_cp.eval.passkey import Passkey
from tests.helpers.live import Live

TASKS = Path(__file__).parent / "tasks"


def write_tasks(folder: Path) -> None:
    """Passkeys hidden in a few lines, and the tasks that ask for them."""
    lines, rng, documents = heldout_text().splitlines(), random.Random(0), []
    for i in range(6):
        keys = [f"{rng.randrange(10000, 100000)}" for _ in range(4)]
        key = Passkey(f"amber {('otter', 'falcon', 'heron')[i % 3]}", keys[0])
        text = "\n".join([*lines[20 * i : 20 * i + 8], key.fact(), *lines[20 * i + 8 : 20 * i + 14], key.question()])
        documents.append({"question": text, "answer": keys[0], "choices": rng.sample(keys, 4)})
    data = folder / "facts.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for task in TASKS.glob("*.yaml"):
        (folder / task.name).write_text(task.read_text().replace("%DATA%", str(data)))


def evaluate(live: Live, folder: Path, more: str) -> dict[str, Any]:
    """One run of lm_eval over both tasks; its results by task."""
    arguments = f"model={live.model},base_url={live.url}/v1/completions,num_concurrent=4,max_length=4096,{more}"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "local-completions",
        "--model_args",
        arguments,
        "--tasks",
        "local_facts_generate,local_facts_choose",
        "--include_path",
        str(folder),
        "--output_path",
        str(folder / "out"),
    ]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (file,) = (folder / "out").rglob("results_*.json")
    results: dict[str, Any] = json.loads(file.read_text())["results"]
    return results


@pytest.mark.parametrize("tokenizer", [f"tokenizer={DIRECTORY}", "tokenizer_backend=remote"], ids=["local", "remote"])
def test_both_kinds_of_task(live: Live, tmp_path: Path, tokenizer: str) -> None:
    """A generation, and log-likelihoods told by echo and logprobs. With `remote`, lm_eval asks the server for tokens."""
    write_tasks(tmp_path)
    found = evaluate(live, tmp_path, tokenizer)
    assert found["local_facts_generate"]["exact_match,number"] >= 5 / 6, "the built-in model finds passkeys"
    assert found["local_facts_choose"]["acc,none"] == 1.0, "a hidden number is likelier than any other"
