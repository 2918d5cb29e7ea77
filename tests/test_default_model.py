"""The built-in model: a fixed model whatever the mesh, with a byte-level tokenizer, that does not repeat one token."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_mla_cp.checkpoint import expected_shapes, load_params
from jax_mla_cp.config import ModelConfig
from jax_mla_cp.default_model import BOS, EOS, byte_tokenizer, default_model, random_weights
from jax_mla_cp.mesh import make_mesh, mesh_shape
from jax_mla_cp.model.context import Build
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.handle import Model
from tests.synthetic import Driver


def load(mesh: str | None = None, ep: tuple[str, ...] = ("tp",)) -> Model:
    config, source, _ = default_model()
    on = None if mesh is None else make_mesh(mesh)
    build = Build(config, None if on is None else mesh_shape(on), ep, jnp.dtype(jnp.float32))
    return Model(load_params(source, nnx.state(Decoder(build)), config, on), build, on)


def continuation(model: Model, text: str, length: int) -> tuple[list[int], np.ndarray]:
    driver = Driver(model)
    request = driver.request()
    logits = driver.step([(request, byte_tokenizer().encode(text))])
    first, tokens = logits[0], [int(logits[0].argmax())]
    while len(tokens) < length:
        tokens.append(int(driver.step([(request, tokens[-1:])])[0].argmax()))
    return tokens, first


def test_tokens_are_bytes() -> None:
    tokenizer = byte_tokenizer()
    for text in ("", "hello", "héllo wörld 你好 😀", "\x00\x7f\n "):
        assert tokenizer.encode(text) == [BOS, *text.encode()]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|eos|>") == [BOS, EOS]
    assert tokenizer.decode(range(258, 320)) == ""


def test_config_and_tokenizer_agree() -> None:
    config, _, tokenizer = default_model()
    assert (config.bos_token_id, config.eos_token_ids) == (BOS, (EOS,))
    assert max(tokenizer.encode("\xff<|eos|>")) < config.vocab_size


def test_weights_are_fixed_and_depend_on_their_name_alone() -> None:
    config, source, _ = default_model()
    again = random_weights(config, seed=20240607)
    assert again.keys() == expected_shapes(config).keys()
    for name, values in again.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, source.read(name))
    fewer = ModelConfig(**{**vars(config), "num_layers": config.num_layers - 1})
    for name, values in random_weights(fewer, seed=20240607).items():
        np.testing.assert_array_equal(values, again[name])


def test_greedy_text_moves_and_is_the_same_on_a_mesh() -> None:
    plain = load()
    tokens, logits = continuation(plain, "Once upon a time", 32)
    assert len(set(tokens)) > 8
    assert tokens != continuation(plain, "Once upon a tide", 32)[0]
    sharded, sharded_logits = continuation(load("cp=2,tp=4", ("cp", "tp")), "Once upon a time", 32)
    assert sharded == tokens
    np.testing.assert_allclose(sharded_logits, logits, atol=1e-5 * np.abs(logits).max(), rtol=0)
