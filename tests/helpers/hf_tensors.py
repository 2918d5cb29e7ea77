"""Small random DeepSeek-V3 checkpoints as transformers writes them, and what the parameters must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from jax_mla_cp.config.model import ModelConfig

TINY: dict[str, Any] = dict(
    vocab_size=98,
    hidden_size=32,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=12,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    max_position_embeddings=128,
    num_nextn_predict_layers=0,
    tie_word_embeddings=False,
)


def write(directory: Path, *, shard: str = "20KB", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """save_pretrained of a random model."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**(TINY | changes))).to(dtype)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" not in name:
                tensor.copy_(torch.randn(tensor.shape))
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def as_transformers_4(directory: Path) -> None:
    """Rewrites config.json in the older style."""
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    path.write_text(json.dumps(raw))


def expected_params(directory: Path, c: ModelConfig, *, vocab: int, experts: int) -> dict[str, NDArray[Any]]:
    """The parameter tree, element by element from the formulas in the model's description."""
    from safetensors.torch import load_file

    t: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        t |= {name: tensor.float() for name, tensor in load_file(file).items()}
    h, r, v, N = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.num_heads
    deinterleave = [2 * i for i in range(r // 2)] + [2 * i + 1 for i in range(r // 2)]

    def padded(x: torch.Tensor, size: int) -> torch.Tensor:
        return torch.cat([x, torch.zeros(size - x.shape[0], *x.shape[1:])])

    def query(weight: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(N, h + r, weight.shape[1])
        for n in range(N):
            rows = weight[n * (h + r) : (n + 1) * (h + r)]
            out[n, :h] = rows[:h]
            out[n, h:] = rows[[h + i for i in deinterleave]]
        return out.reshape(N * (h + r), -1)

    def gate_up(prefix: str) -> torch.Tensor:
        return torch.stack([t[f"{prefix}.gate_proj.weight"], t[f"{prefix}.up_proj.weight"]])

    def layer(i: int) -> dict[str, torch.Tensor]:
        p, a, m = f"model.layers.{i}", f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        kv_a, kv_b = t[f"{a}.kv_a_proj_with_mqa.weight"], t[f"{a}.kv_b_proj.weight"]
        heads = [kv_b[n * (h + v) : (n + 1) * (h + v)] for n in range(N)]
        out = {
            "attn_norm": t[f"{p}.input_layernorm.weight"],
            "mlp_norm": t[f"{p}.post_attention_layernorm.weight"],
            "mla.kv_a": torch.cat([kv_a[:-r], kv_a[-r:][deinterleave]]),
            "mla.kv_norm": t[f"{a}.kv_a_layernorm.weight"],
            "mla.w_uk": torch.stack([head[:h] for head in heads]),
            "mla.w_uv": torch.stack([head[h:] for head in heads]),
            "mla.o": t[f"{a}.o_proj.weight"],
        }
        if c.q_lora_rank is None:
            out["mla.q"] = query(t[f"{a}.q_proj.weight"])
        else:
            out["mla.q_a"] = t[f"{a}.q_a_proj.weight"]
            out["mla.q_norm"] = t[f"{a}.q_a_layernorm.weight"]
            out["mla.q_b"] = query(t[f"{a}.q_b_proj.weight"])
        if i < c.num_dense_layers:
            return out | {"mlp.gate_up": gate_up(m), "mlp.down": t[f"{m}.down_proj.weight"]}
        each = [f"{m}.experts.{e}" for e in range(c.n_routed_experts)]
        out |= {
            "mlp.router": t[f"{m}.gate.weight"].T,
            "mlp.bias": t[f"{m}.gate.e_score_correction_bias"],
            "mlp.gate_up": padded(torch.stack([gate_up(e) for e in each]), experts),
            "mlp.down": padded(torch.stack([t[f"{e}.down_proj.weight"] for e in each]), experts),
        }
        if c.n_shared_experts:
            shared = f"{m}.shared_experts"
            out |= {"mlp.shared.gate_up": gate_up(shared), "mlp.shared.down": t[f"{shared}.down_proj.weight"]}
        return out

    embed = padded(t["model.embed_tokens.weight"], vocab)
    params = {"embed": embed, "final_norm": t["model.norm.weight"]}
    if not c.tie_word_embeddings:
        params["head"] = padded(t["lm_head.weight"], vocab).T
    for stack, layers in (("dense", range(c.num_dense_layers)), ("moe", range(c.num_dense_layers, c.num_layers))):
        made = [layer(i) for i in layers]
        params |= {f"{stack}.{path}": torch.stack([one[path] for one in made]) for path in (made[0] if made else {})}
    return {path: value.numpy() for path, value in params.items()}
