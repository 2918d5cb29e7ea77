"""The rope objects of config.json: what can mean one thing only is read, and the rest is refused by the keys' names."""

from __future__ import annotations

from typing import Any

import pytest

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.rope import RopeConfig
from tests.helpers.checkpoints import BASE

PLAIN = {"model_type": "deepseek_v3", **{key: value for key, value in BASE.items() if key != "rope_parameters"}}
YARN: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
FULL = YARN | {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}


def rope(**keys: Any) -> RopeConfig:
    return ModelConfig.from_hf({**PLAIN, **keys}).rope


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        # no type
        ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling has factor and no type. Add its type: \"rope_type\": \"yarn\""),
        ({"rope_scaling": FULL | {"type": None}}, "rope_scaling has beta_fast, .* and no type"),
        ({"rope_parameters": {"rope_theta": 5.0, "mscale": 1.0}}, "rope_parameters has mscale and no type"),
        # another type
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: the rope type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters: the rope type 'linear'"),
        ({"rope_scaling": YARN | {"type": ["yarn"]}}, r"the rope type \['yarn'\] is not"),
        ({"rope_scaling": YARN | {"type": "YARN"}}, "the rope type 'YARN' is not"),
        # keys that the type does not use
        ({"rope_scaling": {"type": "default", "factor": 4.0}}, "the rope type 'default' with factor=4.0 is not"),
        ({"rope_scaling": YARN | {"attention_factor": 1.2}}, "the rope type 'yarn' with attention_factor=1.2 is not"),
        ({"rope_scaling": YARN | {"low_freq_factor": 1.0}}, "with low_freq_factor=1.0"),
        ({"rope_scaling": YARN | {"llama_4_scaling_beta": 0.1}}, "with llama_4_scaling_beta=0.1"),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate=False is not supported"),
        ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.5}, "config.json: partial_rotary_factor=0.5"),
        # two types
        ({"rope_scaling": YARN | {"rope_type": "default"}}, "type='yarn' and rope_type='default', which differ"),
        ({"rope_scaling": {"rope_type": "linear", **YARN}}, "type='yarn' and rope_type='linear', which differ"),
        # an object for each kind of layer
        (
            {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}},
            r"rope_parameters has an object for each kind of layer \(full_attention, sliding_attention\)",
        ),
        # two objects, two values
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "rope_parameters and rope_scaling differ in rope_type"),
        ({"rope_scaling": YARN, "rope_parameters": FULL}, "differ in beta_fast, beta_slow, mscale"),
        ({"rope_scaling": FULL, "rope_parameters": YARN}, "differ in beta_fast, beta_slow, mscale"),
        (
            {"rope_theta": 10000, "rope_parameters": YARN | {"rope_theta": 50000}},
            "rope_theta=10000.0, rope_parameters.rope_theta=50000.0: these mean the same, but differ",
        ),
        ({"rope_theta": 10000, "rope_scaling": YARN | {"rope_theta": 50000}}, "rope_scaling.rope_theta=50000.0"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 128}, "original_max_position_embeddings=128: these mean"),
        # numbers that YaRN has no meaning for
        ({"rope_scaling": YARN | {"factor": 0}}, "rope_scaling.factor must be at least 1, got 0"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor must be at least 1"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "rope_scaling.factor must be a number"),
        ({"rope_scaling": YARN | {"beta_slow": 0}}, "beta_slow must be above 0 and at most beta_fast"),
        ({"rope_scaling": YARN | {"beta_slow": 33}}, "beta_slow=33, beta_fast=32"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": None}}, "YaRN needs rope_scaling.original_max"),
        ({"rope_theta": 0}, "rope_theta must be above 0"),
    ],
)  # fmt: skip
def test_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rope(**keys)


@pytest.mark.parametrize("order", [("type", "rope_type"), ("rope_type", "type")])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_the_order_of_keys_decides_nothing(name: str, order: tuple[str, str]) -> None:
    values = {"type": "yarn", "rope_type": "default"}
    rest = {key: value for key, value in YARN.items() if key != "type"}
    with pytest.raises(ConfigError, match=f"{name} has type='yarn' and rope_type='default'"):
        rope(**{name: {key: values[key] for key in order} | rest})
    assert rope(**{name: dict.fromkeys(order, "yarn") | rest}) == rope(rope_scaling=YARN)


PLAIN_ROPES: list[dict[str, Any]] = [
    {},
    {"rope_scaling": None},
    {"rope_scaling": {}},
    {"rope_scaling": {"type": None, "factor": None}},
    {"rope_scaling": {"type": "default"}},
    {"rope_parameters": {"rope_theta": 10000}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    {"rope_theta": 10000, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": None},
]


@pytest.mark.parametrize("keys", PLAIN_ROPES)
def test_plain(keys: dict[str, Any]) -> None:
    assert rope(**keys) == RopeConfig(theta=10000.0)


YARN_ROPES: list[dict[str, Any]] = [
    {"rope_scaling": YARN},
    {"rope_parameters": YARN},
    {"rope_scaling": YARN, "rope_parameters": YARN | {"type": None, "rope_type": "yarn", "rope_theta": 10000.0}},
    {"rope_scaling": YARN | {"factor": None}},  # 1024 positions, 256 of them original
    {"rope_scaling": YARN | {"attention_factor": None, "truncate": True, "beta_fast": None}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 256},
    {"rope_scaling": YARN, "original_max_position_embeddings": 256},
]


@pytest.mark.parametrize("keys", YARN_ROPES)
def test_yarn(keys: dict[str, Any]) -> None:
    assert rope(**keys) == RopeConfig(theta=10000.0, factor=4.0, original_max_position=256, yarn=True)


def test_same_angles_as_transformers() -> None:
    """Transformers and this package, where both read an object, agree on theta, type and factor."""
    from transformers import DeepseekV3Config

    read = 0
    for keys in PLAIN_ROPES + YARN_ROPES[:2]:
        keys = {key: dict(value) if isinstance(value, dict) else value for key, value in keys.items()}
        want = rope(**keys)
        found = DeepseekV3Config(max_position_embeddings=1024, **keys).rope_parameters
        assert (found["rope_theta"], found["rope_type"] == "yarn") == (want.theta, want.yarn)
        assert (found.get("factor") or 1.0) == want.factor
        read += 1
    assert read == len(PLAIN_ROPES) + 2
