"""Exports the trained parameters as a Hugging Face directory in DeepSeek-V3's FP8 format."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import NDArray
from safetensors.numpy import save_file

from default_model import corpus, network, vocabulary
from default_model.training import STAGES, State, optimizer, total_steps
from jax_mla_cp.config.model import ModelConfig

CONFIG = Path(__file__).parent / "config.json"
_SHARD_BYTES = 12 << 20

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
{{- '## Tools\\nCall a function by writing <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜><｜tool▁calls▁end｜>, with a JSON object as ARGUMENTS. The functions are:\\n' }}
{%- for tool in tools %}{{ tool.function | tojson + '\\n' }}{% endfor %}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' %}{{ '<｜Assistant｜>' + (message.content or '') }}
{%- if message.tool_calls %}
{{- '<｜tool▁calls▁begin｜>' }}
{%- for call in message.tool_calls %}{{ '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments + '<｜tool▁call▁end｜>' }}{% endfor %}
{{- '<｜tool▁calls▁end｜>' }}
{%- endif %}
{{- eos_token }}
{%- elif message.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
{%- else %}{{ message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}
"""


def export(work: Path) -> None:
    """Writes `work`/model, from the latest training checkpoint, and `work`/heldout.txt.xz."""
    raw = json.loads(CONFIG.read_text())
    out = work / "model"
    out.mkdir(exist_ok=True)
    write_weights(_load_parameters(work, ModelConfig.from_hf(raw)), out)
    (out / "config.json").write_text(json.dumps(raw | {"quantization_config": QUANTIZATION}, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}) + "\n")
    (out / "tokenizer.json").write_bytes((work / "tokenizer.json").read_bytes())
    tokenizer_config = {"bos_token": vocabulary.BOS, "eos_token": vocabulary.EOS, "chat_template": CHAT_TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n")
    held_out = "\n".join(d.text for d in corpus.load(work / "corpus.xz") if d.held_out)
    with lzma.open(work / "heldout.txt.xz", "wt", encoding="utf-8", preset=9) as file:
        file.write(held_out)


def write_weights(params: network.Params, out: Path) -> None:
    """Writes safetensors files and their index. Stacked experts become one tensor each."""
    tensors: dict[str, NDArray[Any]] = {}
    for name, w in params.items():
        if ".mlp.experts." in name:
            for expert, matrix in enumerate(w):
                tensors |= _stored(name.replace(".experts.", f".experts.{expert}."), matrix)
        else:
            tensors |= _stored(name, w)
    shards: list[dict[str, NDArray[Any]]] = [{}]
    for name, array in tensors.items():
        if sum(a.nbytes for a in shards[-1].values()) + array.nbytes > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = array
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def _stored(name: str, w: Any) -> dict[str, NDArray[Any]]:
    """A tensor as DeepSeek-V3 stores it: FP8 with scales, float32 for the router's bias, else bfloat16."""
    if network.is_quantized(name):
        quantized, scale = network.quantize(w)
        return {name: np.asarray(quantized), f"{name}_scale_inv": np.asarray(scale)}
    dtype = np.float32 if name.endswith("correction_bias") else ml_dtypes.bfloat16
    return {name: np.asarray(w).astype(dtype)}


def _load_parameters(work: Path, config: ModelConfig) -> network.Params:
    newest = max((work / "state").glob("[0-9]*"), key=lambda path: int(path.name))
    params = jax.eval_shape(lambda: network.initial(config, jax.random.key(0)))
    like = State(params, jax.eval_shape(optimizer(total_steps(STAGES)).init, params))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # not the GPU that it was saved on
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    restored: State = ocp.StandardCheckpointer().restore(newest.resolve(), like)
    return restored.params
