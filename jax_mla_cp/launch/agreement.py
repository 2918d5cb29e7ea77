"""The facts that several processes agree on: before weights are read, and before the first step."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import jax
from jaxlib.version import __version__ as jaxlib_version

from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.distributed.agreement import agree
from jax_mla_cp.launch.devices import Devices
from jax_mla_cp.launch.model import read_config
from jax_mla_cp.launch.options import LaunchOptions
from jax_mla_cp.platform import versions
from jax_mla_cp.step.runner import Runner

_OWN_FLAGS = frozenset(
    {
        "model",
        "memory_fraction",
        "compile_cache",
        "coordinator",
        "process_id",
        "distributed",
        "local_devices",
        "cluster_key_file",
    }
)
"""Options that may differ between processes: paths, and what the processes exchange."""
_SAMPLE = 1 << 16


def agree_on_settings(options: LaunchOptions, devices: Devices, **more: object) -> None:
    """Compares versions, flags, the model's config and files. Does nothing for a process that is alone.

    Args:
      more: options of the program, beside those of `LaunchOptions`.

    Raises:
      ConfigError: a process differs.
      ConfigError, CheckpointError: as `read_config`.
    """
    if devices.member is None:
        return
    directory = DIRECTORY if options.model is None else options.model
    _, config = read_config(directory)
    shared = [field.name for field in dataclasses.fields(LaunchOptions) if field.name not in _OWN_FLAGS]
    agree(
        devices.member,
        "settings",
        {
            **versions(),
            "jaxlib": jaxlib_version,
            "device": jax.local_devices()[0].device_kind,
            **{name: getattr(options, name) for name in shared},
            "XLA_FLAGS": sorted(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "dump" not in flag),
            **more,
            **{f"config.json: {name}": value for name, value in dataclasses.asdict(config).items()},
            **_files(directory),
        },
    )


def agree_on_programs(runner: Runner, devices: Devices) -> None:
    """Compares what the steps' programs are made of. Each step compares its program's hash besides.

    Raises:
      ConfigError: a process differs.
    """
    if devices.member is None:
        return
    planner = runner.planner
    build = planner.model.build
    agree(
        devices.member,
        "programs",
        {
            **{field.name: getattr(build, field.name) for field in dataclasses.fields(build) if field.name != "config"},
            **{field.name: getattr(planner.shape, field.name) for field in dataclasses.fields(planner.shape)},
            "buckets": planner.buckets,
            "max_running": runner.max_running,
            "max_model_len": runner.max_model_len,
        },
    )


def _files(directory: Path) -> dict[str, str]:
    """A model directory's files: weights by their size and a sample, and the others by their content."""
    files = {path.name: _sample(path) for path in sorted(directory.glob("*.safetensors"))}
    for pattern in ("*.json", "*.jinja", "tiktoken.model"):
        for path in sorted(directory.glob(pattern)):
            files[path.name] = f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    return files


def _sample(path: Path) -> str:
    """A large file's size, and a hash of its beginning, middle and end: two fine-tunes of one model differ nowhere else."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for at in (0, size // 2, max(0, size - _SAMPLE)):
            file.seek(at)
            digest.update(file.read(_SAMPLE))
    return f"{size} bytes, sampled sha256 {digest.hexdigest()[:16]}"
