"""The flags of `LaunchOptions`, which several programs have."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any, get_args

from jax_mla_cp.attention import Implementation
from jax_mla_cp.batch.form import Form
from jax_mla_cp.cli import choice, mesh, path, platform, real_number, whole_number
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.quantization import Fp8Compute, Weights
from jax_mla_cp.distributed.handshake import KEY_VARIABLE
from jax_mla_cp.launch.options import Dtype, EpAxes, LaunchOptions, Speculative
from jax_mla_cp.platform import Platform, default_compile_cache

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def _int_or_auto(text: str) -> int | None:
    return None if text == "auto" else whole_number(text)


def _devices(text: str) -> tuple[int, ...]:
    return tuple(whole_number(part) for part in text.split(","))


def take_launch_options(values: dict[str, Any], program: type[DataclassInstance]) -> LaunchOptions:
    """Takes out of a command line's values those that are no options of the program itself: they are of the model in process.

    Raises:
      ConfigError: there are such values beside a `base_url`; or as `LaunchOptions`.
    """
    own = {field.name for field in dataclasses.fields(program)}
    given = {name: values.pop(name) for name in list(values) if name not in own}
    if "base_url" in values and given:
        raise ConfigError(min(given), "can't be combined with `base_url`: the server sets it. Leave one of them out.")
    return LaunchOptions(**given)


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """Adds the flags of the model, the devices and the steps."""
    model = p.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="DIR",
        type=path,
        help="model directory in Hugging Face format (config.json, *.safetensors, tokenizer.json), or the "
        "output of `python -m jax_mla_cp.checkpoint convert` (default: the small built-in model)",
    )
    model.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="model name that clients send as `model` (default: the name of the model directory)",
    )
    model.add_argument(
        "--dtype",
        metavar="{auto,float32,bfloat16}",
        type=choice(*get_args(Dtype)),
        help="data type of weights, activations and KV cache; auto: float32 on CPU, bfloat16 on GPUs (default: auto)",
    )
    model.add_argument(
        "--weights",
        metavar="{auto,bf16,fp8}",
        type=choice(*get_args(Weights)),
        help="storage of a quantized checkpoint's weights; bf16: dequantize to --dtype while loading; fp8: "
        "keep FP8 in device memory, half the size and half of what decoding reads; auto: fp8 on GPUs, "
        "otherwise bf16 (default: auto)",
    )
    model.add_argument(
        "--fp8-compute",
        metavar="{auto,w8a16,w8a8}",
        type=choice("auto", *get_args(Fp8Compute)),
        help="what weights in FP8 are multiplied by; w8a16: activations in --dtype; w8a8: in prefill, activations quantized to FP8 "
        "too, about twice as fast and less exact; auto: w8a8 where the checkpoint was made for it, as DeepSeek-V3 was, and "
        "the GPU has the kernel, otherwise w8a16 (default: auto)",
    )
    devices = p.add_argument_group("devices")
    devices.add_argument(
        "--mesh",
        metavar="AXES",
        type=mesh,
        help="device mesh, such as tp=8,cp=4,dp=2: tp shards the heads, cp the tokens of a step, dp the "
        "requests; axes that are left out have size 1 (default: one device)",
    )
    devices.add_argument(
        "--platform",
        metavar="{auto,cpu,cuda,gpu}",
        type=platform(*get_args(Platform)),
        help="cuda or gpu: NVIDIA GPUs; cpu: virtual CPU devices, as many as the mesh needs; auto: GPUs if there "
        "are any, otherwise CPU (default: auto)",
    )
    devices.add_argument(
        "--ep-axes",
        metavar='{auto,none,tp,"tp,cp","tp,cp,dp"}',
        type=choice(*get_args(EpAxes)),
        help="mesh axes that shard the experts; none: each device has all of them, and tp shards their width; auto: the fewest axes "
        "whose shards fit into memory (default: auto)",
    )
    devices.add_argument(
        "--attention",
        metavar="{auto,fa3,xla}",
        type=choice(*get_args(Implementation)),
        help="attention kernel; auto: FlashAttention-3 on Hopper GPUs, otherwise XLA (default: auto)",
    )
    devices.add_argument(
        "--form",
        metavar="{auto,expanded,absorbed}",
        type=choice(*get_args(Form)),
        help="form of MLA attention; expanded: per-head keys and values; absorbed: latents; auto: chosen "
        "per request by its shape (default: auto)",
    )
    steps = p.add_argument_group("steps")
    steps.add_argument(
        "--page-size",
        metavar="N",
        type=whole_number,
        help="tokens per KV cache page; FlashAttention-3 needs a multiple of 64 (default: 64)",
    )
    steps.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=whole_number,
        help="maximum number of prompt tokens per step and dp group; longer prompts are prefilled in "
        "chunks, with decoding in between (default: 2048)",
    )
    steps.add_argument(
        "--compile-cache",
        metavar="{auto,off,DIR}",
        help=f"directory of the persistent compilation cache (default: {default_compile_cache()})",
    )


def add_cache_flags(p: argparse.ArgumentParser) -> None:
    """Adds the flags of the KV cache, the scheduler and speculative decoding."""
    memory = p.add_argument_group("memory and scheduling, per dp group")
    memory.add_argument(
        "--kv-pages",
        metavar="N",
        type=_int_or_auto,
        help="number of KV cache pages; auto: as many as --memory-fraction allows (default: auto)",
    )
    memory.add_argument(
        "--memory-fraction",
        metavar="F",
        type=real_number,
        help="fraction of device memory for weights, temporaries and KV cache; virtual CPU devices share the RAM that "
        "is free (default: 0.9 on GPUs; on CPU 0.5, and at most 4.5 GiB in all)",
    )
    memory.add_argument(
        "--max-model-len",
        metavar="N",
        type=_int_or_auto,
        help="maximum context length: prompt plus output tokens; auto: the model's, limited by what the KV "
        "cache holds (default: auto)",
    )
    memory.add_argument(
        "--max-running", metavar="N", type=whole_number, help="maximum number of running requests (default: 32)"
    )
    speculation = p.add_argument_group("speculative decoding: several tokens per step, same outputs")
    speculation.add_argument(
        "--speculative",
        metavar="{off,mtp}",
        type=choice(*get_args(Speculative)),
        help="mtp: the checkpoint's multi-token prediction layer drafts the next tokens, and the model "
        "verifies them in its next step (default: off)",
    )
    speculation.add_argument(
        "--draft-tokens",
        metavar="N",
        type=whole_number,
        help="draft tokens per request and step, 1 to 4; more than 1 pays off at high acceptance rates, "
        "which /health reports (default: 1)",
    )


def add_cluster_flags(p: argparse.ArgumentParser) -> None:
    """Adds the flags of a program that runs as several processes."""
    cluster = p.add_argument_group(
        "several hosts: one process per host, the same command on each (docs/several-hosts.md)"
    )
    cluster.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, where the processes find each other (default: this process is alone)",
    )
    cluster.add_argument("--num-processes", metavar="N", type=whole_number, help="number of processes")
    cluster.add_argument(
        "--process-id",
        metavar="K",
        type=whole_number,
        help="number of this process, 0 to N - 1; process 0 runs on the coordinator's host and leads",
    )
    cluster.add_argument(
        "--distributed",
        action="store_true",
        help="take these three from Slurm, Open MPI or Kubernetes, as JAX detects them",
    )
    cluster.add_argument(
        "--local-devices",
        metavar="N,N,...",
        type=_devices,
        help="GPUs of this host that this process uses, such as 0,1 (default: all)",
    )
    cluster.add_argument(
        "--cluster-key-file",
        metavar="FILE",
        type=path,
        help=f"file whose first line is a key that all processes share; also {KEY_VARIABLE} in the environment (default: "
        "process 0 makes one, and passes it through JAX's coordination service)",
    )
    cluster.add_argument(
        "--heartbeat-timeout",
        metavar="S",
        type=real_number,
        help="seconds of silence after which a process counts as lost, which ends all (default: 10)",
    )
    cluster.add_argument(
        "--allow-tp-across-hosts",
        action="store_true",
        help="accept a mesh whose tp axis crosses hosts: every layer's all-reduce then takes the network",
    )
