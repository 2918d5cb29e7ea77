"""The flags of `LaunchOptions`, which several programs have."""

from __future__ import annotations

import argparse
from typing import get_args

from jax_mla_cp.attention import Implementation
from jax_mla_cp.batch.form import Form
from jax_mla_cp.cli import choice, mesh, path, platform, real_number, whole_number
from jax_mla_cp.config.quantization import Weights
from jax_mla_cp.launch import Dtype, EpAxes, Speculative
from jax_mla_cp.platform import Platform, default_compile_cache


def _int_or_auto(text: str) -> int | None:
    return None if text == "auto" else whole_number(text)


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """Adds the flags of the model, the devices and the steps."""
    model = p.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="DIR",
        type=path,
        help="Hugging Face model directory (config.json, *.safetensors, tokenizer.json), or what `python -m "
        "jax_mla_cp.checkpoint convert` made of one; default: the small model that comes with the "
        "program",
    )
    model.add_argument(
        "--served-model-name", metavar="NAME", help="what clients send as `model`; default: the directory's name"
    )
    model.add_argument(
        "--dtype",
        metavar="{auto,float32,bfloat16}",
        type=choice(*get_args(Dtype)),
        help="of weights, activations and cache; auto: float32 on CPU, bfloat16 on GPUs",
    )
    model.add_argument(
        "--weights",
        metavar="{auto,bf16,fp8}",
        type=choice(*get_args(Weights)),
        help="of a quantized checkpoint; bf16: dequantized while loading, to --dtype (so also to float32); fp8: "
        "kept in FP8, half the memory, dequantized by every use; auto: fp8 on GPUs, else bf16",
    )
    devices = p.add_argument_group("devices")
    devices.add_argument(
        "--mesh",
        metavar="AXES",
        type=mesh,
        help="tp=8,cp=4[,dp=2] in any order; tp divides heads, cp the tokens of a step, dp the requests; an "
        "axis that is missing is 1 (default: one device)",
    )
    devices.add_argument(
        "--platform",
        metavar="{auto,cpu,cuda,gpu}",
        type=platform(*get_args(Platform)),
        help="cuda or gpu: NVIDIA GPUs; cpu: as many virtual devices as the mesh needs; auto: GPUs if there are any",
    )
    devices.add_argument(
        "--ep-axes",
        metavar='{auto,tp,"tp,cp","tp,cp,dp"}',
        type=choice(*get_args(EpAxes)),
        help="the axes that divide the experts; auto: the fewest whose weights fit",
    )
    devices.add_argument(
        "--attention",
        metavar="{auto,fa3,xla}",
        type=choice(*get_args(Implementation)),
        help="the kernel; auto: FlashAttention-3 on a Hopper GPU that can run it, else XLA",
    )
    devices.add_argument(
        "--form",
        metavar="{auto,expanded,absorbed}",
        type=choice(*get_args(Form)),
        help="of MLA attention: over per-head keys or over latents; auto: by each request's shape",
    )
    steps = p.add_argument_group("steps")
    steps.add_argument(
        "--page-size",
        metavar="N",
        type=whole_number,
        help="tokens of a cache page; FlashAttention-3 needs a multiple of 64 (default: 64)",
    )
    steps.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=whole_number,
        help="most prompt tokens of a dp group in a step; longer prompts take several, with decoding in between "
        "(default: 2048)",
    )
    steps.add_argument(
        "--compile-cache",
        metavar="{auto,off,DIR}",
        help=f"where compiled programs are kept (default: {default_compile_cache()})",
    )


def add_cache_flags(p: argparse.ArgumentParser) -> None:
    """Adds the flags of the cache, the schedule and speculation."""
    memory = p.add_argument_group("memory and schedule, each per dp group")
    memory.add_argument(
        "--kv-pages", metavar="N", type=_int_or_auto, help="pages of the cache; auto: what --memory-fraction allows"
    )
    memory.add_argument(
        "--memory-fraction",
        metavar="F",
        type=real_number,
        help="share of a device's memory for weights, temporaries and cache (default: 0.9 of a GPU's, half of "
        "the RAM that is free, which virtual CPU devices share)",
    )
    memory.add_argument(
        "--max-model-len",
        metavar="N",
        type=_int_or_auto,
        help="longest prompt and continuation; auto: the smaller of the model's and what the pages hold",
    )
    memory.add_argument("--max-running", metavar="N", type=whole_number, help="most requests at a time (default: 32)")
    speculation = p.add_argument_group("speculative decoding: the same answers, several tokens a step")
    speculation.add_argument(
        "--speculative",
        metavar="{off,mtp}",
        type=choice(*get_args(Speculative)),
        help="mtp: the checkpoint's layer for multi-token prediction guesses the next tokens, and the "
        "model's next step keeps those that it would have said (default: off)",
    )
    speculation.add_argument(
        "--draft-tokens",
        metavar="N",
        type=whole_number,
        help="guesses per request and step, 1 to 4; more than 1 pays if most of them are accepted, "
        "which /health tells (default: 1)",
    )
