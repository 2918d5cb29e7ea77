"""Small random checkpoints as transformers writes them, and transformers' own answers for them."""

from __future__ import annotations

import contextlib
import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    modeling_rope_utils,
)
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.kimi_k25 import Kimi_K25ForConditionalGeneration

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

BASE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": YARN,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "v3": {},
    "no_q_lora": {"q_lora_rank": None, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    # Kimi K2's choices: one group, a YaRN ramp that is a step, another theta; eps as in some public copies.
    "one_group": {
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 2.827,
        "rms_norm_eps": 1e-5,
        "rope_parameters": YARN | {"rope_theta": 50000.0, "beta_fast": 1.0},
    },
    "two_groups": {
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
    },
    "plain_rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "rope_halves": {"rope_interleave": False},
    # Odd, so that it is padded on every tp > 1; and so small that the tokenizer has a single merge.
    "odd_vocab": {"vocab_size": 259},
    "tied": {"tie_word_embeddings": True},
    "all_dense": {"first_k_dense_replace": 3},
    "no_dense": {"first_k_dense_replace": 0},
    "old_config": {"old_config": True},
    "sharded": {"max_shard_size": "100KB"},
    "v2": {
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "routed_scaling_factor": 16.0,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "v2_lite": {
        "model_type": "deepseek_v2",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": None,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "k25": {
        "model_type": "kimi_k25",
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 2.827,
        "rms_norm_eps": 1e-5,
        "rope_parameters": YARN | {"rope_theta": 50000.0},
    },
}
"""Arguments of `make_checkpoint`, by name."""


def make_checkpoint(
    directory: str | Path,
    *,
    seed: int = 0,
    max_shard_size: str = "1GB",
    old_config: bool = False,
    model_type: str = "deepseek_v3",
    **overrides: Any,
) -> tuple[dict[str, Any], Path]:
    """Writes a float32 checkpoint of about 0.3 M parameters with a byte-level tokenizer.

    Args:
      directory: made if it does not exist.
      seed: the weights follow from it and from the shapes alone.
      max_shard_size: as for `save_pretrained`; below the model's size, there are several files and an index.
      old_config: rewrite config.json in the style of transformers 4 and of DeepSeek's own files.
      model_type: deepseek_v2, deepseek_v3 or kimi_k25.
      overrides: keys of config.json that replace those of `BASE`.

    Returns:
      The contents of config.json and the directory.
    """
    path = Path(directory)
    model: PreTrainedModel
    if model_type == "deepseek_v2":
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**(BASE | overrides)))
    else:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**(BASE | overrides)))
    _randomize(model, seed)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    _write_tokenizer(path, model.config.vocab_size)
    raw: dict[str, Any] = json.loads((path / "config.json").read_text())
    if old_config:
        raw = old_style(raw)
        (path / "config.json").write_text(json.dumps(raw, indent=2))
    if model_type == "kimi_k25":
        raw = _wrap(path, raw, seed)
    return raw, path


def _wrap(path: Path, raw: dict[str, Any], seed: int) -> dict[str, Any]:
    """Makes a DeepSeek-V3 checkpoint one of Kimi K2.5, in the layout in which that is published.

    Not by transformers' own `save_pretrained`: its 5.23 renames the text model's `layers` to `blocks`, as if they were
    the image encoder's, and so writes names that no other program reads. The image encoder is left as small as it gets.
    """
    width, patch = 16, 14
    vision = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "patch_size": patch,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
    }
    shapes = {
        "vision_tower.patch_embed.proj.weight": (width, 3, patch, patch),
        "vision_tower.encoder.blocks.0.wqkv.weight": (3 * width, width),
        "mm_projector.pre_norm.weight": (width,),
        "mm_projector.proj.2.weight": (BASE["hidden_size"], 4 * width),
    }
    rng = np.random.default_rng(seed)
    tensors = {f"language_model.{name}": value for name, value in read_weights(path).items()}
    tensors |= {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    outer = {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "tie_word_embeddings": False,
        "projection_hidden_size": width,
        "text_config": old_style(raw) | {"model_type": "kimi_k2"},
        "vision_config": vision,
    }
    (path / "config.json").write_text(json.dumps(outer, indent=2))
    return outer


def make_variant(directory: str | Path, name: str) -> tuple[dict[str, Any], Path]:
    """`make_checkpoint` with the arguments of `VARIANTS[name]`."""
    return make_checkpoint(directory, **VARIANTS[name])


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by name."""
    return {name: value for file in sorted(Path(path).glob("*.safetensors")) for name, value in load_file(file).items()}


_CLASSES: dict[str, type[PreTrainedModel]] = {
    "deepseek_v2": DeepseekV2ForCausalLM,
    "deepseek_v3": DeepseekV3ForCausalLM,
    "kimi_k25": Kimi_K25ForConditionalGeneration,
}


def hf_model(path: str | Path, *, float64: bool = False) -> PreTrainedModel:
    """Loads a checkpoint for inference, in float32 or in float64 (see `in_float64`, which every `hf_*` applies)."""
    torch.set_num_threads(2)
    with in_float64() if float64 else contextlib.nullcontext():
        kind = _CLASSES[json.loads((Path(path) / "config.json").read_text())["model_type"]]
        model = kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        # The plain loop over experts: the default may pick a grouped kernel, which need not exist in float64.
        model.set_experts_implementation("eager")
    # No stop tokens: `hf_generate` gives as many tokens as it was asked for.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
    if float64:
        model.double()
    model.eval()  # type: ignore[no-untyped-call]
    return model


def hf_logits(model: PreTrainedModel, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """[S] token ids to [S, V] logits."""
    with _running(model):
        return cast(np.ndarray, model(_batch(tokens), use_cache=False).logits[0].numpy())


def hf_cache(model: PreTrainedModel, tokens: Sequence[int] | np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per layer what [S] tokens leave in the cache: the normed latents [S, R] and the rotated shared keys [S, r].

    The keys have the first components of all pairs first, as transformers' DeepSeek-V3 leaves them; its V2 does not.
    """
    with _running(model):
        layers = model(_batch(tokens), use_cache=True).past_key_values.layers
    pairs = [(layer.keys[0, 0].numpy(), layer.values[0, 0].numpy()) for layer in layers]
    if isinstance(model, DeepseekV2ForCausalLM):
        return [(latent, np.concatenate([key[:, 0::2], key[:, 1::2]], -1)) for latent, key in pairs]
    return pairs


def hf_generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """`count` greedy tokens for each prompt, the prompt not included; one prompt at a time, stop tokens don't stop."""
    out = []
    for prompt in prompts:
        ids = _batch(prompt)
        with _running(model):
            mask = torch.ones_like(ids)
            full = cast(Any, model).generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        out.append(full[0, len(prompt) :].tolist())
    return out


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Makes transformers' DeepSeek-V2 and V3 compute in float64 throughout.

    `model.double()` alone does not: norms, router, softmax and rotary angles are cast to `torch.float32` by name, or by
    `Tensor.float`. Here these mean float64, the name in the files that hold the models' arithmetic; the arithmetic
    itself stays theirs.
    """
    wide = types.ModuleType("torch")
    wide.__dict__.update(torch.__dict__, float32=torch.float64, float=torch.float64)
    with contextlib.ExitStack() as stack:
        for module in (modeling_deepseek_v2, modeling_deepseek_v3, modeling_rope_utils):
            stack.enter_context(mock.patch.object(module, "torch", wide))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


@contextlib.contextmanager
def _running(model: PreTrainedModel) -> Iterator[None]:
    wide = model.dtype == torch.float64
    with torch.no_grad(), in_float64() if wide else contextlib.nullcontext():
        yield


def _batch(tokens: Sequence[int] | np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.asarray(tokens, np.int64))[None]


def _randomize(model: PreTrainedModel, seed: int) -> None:
    # transformers' own start would hide errors: norms are 1, routing biases 0, and 0.02 keeps attention flat.
    rng = np.random.default_rng(seed)
    values = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith("correction_bias")}
    for name, value in sorted(values.items()):
        if name.endswith("correction_bias"):
            # Scores are within 0 and 1, so many biased scores are below 0, where a mask of 0 and one of -inf differ.
            new = rng.uniform(-0.7, 0.1, value.shape)
        elif value.ndim == 1:
            new = rng.normal(1.0, 0.2, value.shape)
        else:
            # Outputs as wide as inputs; wider from the router, so that every expert is used, and from the head.
            gain = 2.0 if name.endswith("gate.weight") else 3.0 if name == "lm_head.weight" else 1.0
            spread = 1.0 if "embed_tokens" in name else gain * max(value.shape[-1], 1) ** -0.5
            new = rng.normal(0.0, spread, value.shape)
        value.data.copy_(torch.from_numpy(new))


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < 2 + len(letters):
        raise ValueError(f"vocab_size={vocab_size} can't hold 256 bytes and 2 special tokens. Use at least 258.")
    lower = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = [(a, b) for a in lower for b in lower][: vocab_size - 2 - len(letters)]
    names = ["<|bos|>", "<|eos|>", *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:2])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": names[0], "eos_token": names[1], "add_bos_token": True, "add_eos_token": False}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def old_style(raw: dict[str, Any]) -> dict[str, Any]:
    raw = dict(raw)
    rope = dict(raw.pop("rope_parameters"))
    kind = rope.pop("rope_type")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
    raw["torch_dtype"] = raw.pop("dtype")
    return raw | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1}
