"""The built-in model's training: its network is the package's model, its data says what it means, and it can be resumed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import jax_mla_cp as mla
import train_default_model
from default_model import corpus, export, network, training, vocabulary
from default_model.sequences import Sequences
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.default_model import DIRECTORY
from tests.helpers.synthetic import Driver

TEXT = "The module provides functions to read and write files. It has 12 classes, and each of them has methods.\n"

SMALL = json.loads(export.CONFIG.read_text()) | {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 24,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return vocabulary.train([TEXT] * 3, 300)


@pytest.fixture(scope="module")
def sequences(tokenizer: tokenizers.Tokenizer) -> Sequences:
    return Sequences(tokenizer, np.array(tokenizer.encode(TEXT * 200).ids, np.uint16), seed=3)


def test_the_trained_network_is_the_model_that_serves(tmp_path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    config = ModelConfig.from_hf(SMALL)
    params = network.initial(config, jax.random.key(1))
    noise = iter(jax.random.split(jax.random.key(2), len(params)))
    params = {name: w + 0.2 * jax.random.normal(next(noise), w.shape) * (w.ndim == 1) for name, w in params.items()}
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"quantization_config": export.QUANTIZATION}))
    export.write_weights(params, tmp_path)
    model, _ = mla.load(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 300, 40).tolist()
    driver = Driver(model)
    served = driver.step([(driver.request(), tokens)])[0]
    stored = {
        name: w if network.is_quantized(name) or name.endswith("bias") else w.astype(jnp.bfloat16).astype(jnp.float32)
        for name, w in params.items()
    }
    ours = network.forward(network.fake_quantize(stored), jnp.array([tokens]), config, cudnn=False)[0][0, -1]
    np.testing.assert_allclose(served, ours, atol=1e-4 * np.abs(served).max(), rtol=0)
    unrounded = network.forward(stored, jnp.array([tokens]), config, cudnn=False)[0][0, -1]
    assert np.abs(served - unrounded).max() > 1e-3 * np.abs(served).max(), "FP8 must have been rounded to"


def test_a_sequence_says_what_is_asked(sequences: Sequences, tokenizer: tokenizers.Tokenizer) -> None:
    asked = chats = 0
    for step in range(20):
        batch = sequences.batch(step, 4, 400)
        assert batch.tokens.shape == (4, 401) and batch.kind.shape == (4, 400)
        for tokens, kind in zip(batch.tokens, batch.kind, strict=True):
            text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
            targets = tokenizer.decode(tokens[1:][kind == 2].tolist(), skip_special_tokens=False)
            learned = tokenizer.decode(tokens[1:][kind == 1].tolist(), skip_special_tokens=False)
            assert "pass key" not in learned, "facts are no targets"
            chat = vocabulary.USER in text
            for line in targets.split(vocabulary.EOS if chat else "\n"):
                if not line.strip():
                    continue
                asked, chats = asked + 1, chats + chat
                key = line.strip(" .").split(" ")[-1]
                assert f"is {key}. Remember it.\n" in text, "the answer stands in the text"
    assert asked > 60 and chats > 10
    assert sequences.batch(3, 4, 400).tokens.tolist() == sequences.batch(3, 4, 400).tokens.tolist()
    assert sequences.batch(4, 4, 400).tokens.tolist() != sequences.batch(3, 4, 400).tokens.tolist()


def test_blocks_of_fp8() -> None:
    w = jax.random.normal(jax.random.key(0), (2, 200, 130)) * jnp.linspace(0.1, 9, 200)[:, None]
    small, scale = network.quantize(w)
    assert small.shape == w.shape and scale.shape == (2, 2, 2)
    wide = np.asarray(small, np.float32) * np.asarray(scale).repeat(128, -2).repeat(128, -1)[:, :200, :130]
    assert np.abs(wide - w).max() <= np.abs(w).max() / 16
    np.testing.assert_array_equal(network.fake_quantize({"a_proj.weight": w})["a_proj.weight"], wide)


def test_learns_and_goes_on_after_an_interruption(
    tmp_path: Path, tokenizer: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [corpus.Document("perl-doc", f"{i}.pod", TEXT * 20) for i in range(60)]
    assert 0 < sum(d.held_out for d in documents) < 20
    corpus.save(documents, tmp_path / "corpus.xz")
    assert corpus.load(tmp_path / "corpus.xz") == documents
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    monkeypatch.setattr(train_default_model, "CONFIG", tmp_path / "config.json")
    monkeypatch.setattr(train_default_model, "_EVAL_SETS", ((64, 8),))
    monkeypatch.setattr(training, "STAGES", (training.Stage(64, 8, 20), training.Stage(96, 4, 4)))
    monkeypatch.setattr(training, "WARMUP", 2)

    class Interrupted(Exception):
        pass

    made = train_default_model.batches

    def some(*args: object) -> object:
        for i, batch in enumerate(made(*args)):  # type: ignore[arg-type]
            if i == 21:
                raise Interrupted
            yield batch

    monkeypatch.setattr(train_default_model, "batches", some)
    with pytest.raises(Interrupted):
        train_default_model.train(tmp_path, 1, 1.0)
    monkeypatch.setattr(train_default_model, "batches", made)
    train_default_model.train(tmp_path, 1, 1.0)
    said = capsys.readouterr().out
    assert "resuming after step 20" in said and "done: 24 steps" in said
    monkeypatch.setattr(export, "CONFIG", tmp_path / "config.json")
    export.export(tmp_path)
    config = ModelConfig.from_dir(tmp_path / "model")
    _, trained = mla.load(tmp_path / "model")
    assert trained is not None and config.vocab_size == 300
    start = float(said.split("eval at 64: ")[1].split("text loss ")[1].split()[0])
    assert start < np.log(300) - 0.3, "twenty steps teach it something"


def test_the_package_carries_what_the_script_exports() -> None:
    """Architecture, tokenizer_config.json and chat template are equal; the weights are the trained ones (tests/default_model/test_default_model.py)."""
    raw = json.loads((DIRECTORY / "config.json").read_text())
    assert raw == json.loads(export.CONFIG.read_text()) | {"quantization_config": export.QUANTIZATION}
    settings = json.loads((DIRECTORY / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == export.CHAT_TEMPLATE
    assert dataclasses.asdict(ModelConfig.from_dir(DIRECTORY))["vocab_size"] == train_default_model.VOCAB_SIZE
