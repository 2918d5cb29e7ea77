"""The devices: chosen and set up before JAX starts, and how much memory each has."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal, get_args

from jax_mla_cp.config.errors import ConfigError, check_choice
from jax_mla_cp.version import package_version

Platform = Literal["auto", "cpu", "cuda"]

CPU_BUDGET = 9 << 29
"""4.5 GiB, for caches and temporaries of virtual CPU devices, which hold a copy each of what is replicated."""

_FLAGS: dict[str, dict[str, str]] = {
    # XLA:CPU kills the process when a device waits this long in a collective: 40 s by default, less than a long step takes.
    "cpu": {"--xla_cpu_collective_call_terminate_timeout_seconds": "3600"},
    # Starts the gather of the latents first and waits for it where it is needed, behind the query projections.
    # Kernels of a CUDA graph that don't need each other run beside each other: a decode step's are small (docs/benchmarks.md).
    "cuda": {
        "--xla_gpu_enable_latency_hiding_scheduler": "true",
        "--xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    },
}
"""Flags added to XLA_FLAGS, unless the user's value names them."""

_MEMORY_FRACTION = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
"""The two names of the part of a GPU's memory that JAX takes at its start. Its own default leaves a quarter unused."""


def setup(platform: Platform, devices: int) -> Literal["cpu", "cuda"]:
    """Chooses the platform, and starts it with as many devices as are needed. Call it before JAX's first use.

    Args:
      devices: virtual devices, on CPU. GPUs are all used.

    Raises:
      ConfigError: as `choose` and `start`.
    """
    used = choose(platform)
    start(used, devices)
    return used


def choose(platform: Platform) -> Literal["cpu", "cuda"]:
    """Chooses the platform, without starting it.

    Environment variables that the user has set win: flags that XLA_FLAGS names, JAX_PLATFORMS,
    the memory fraction. README.md lists what is set.

    Raises:
      ConfigError: another platform, or JAX has started already.
    """
    import jax
    from jax._src import xla_bridge

    check_choice("platform", platform, get_args(Platform))
    if xla_bridge.backends_are_initialized():
        raise ConfigError("platform", "JAX has started already; set up the platform before its first use.")
    if platform == "auto":
        asked = os.environ.get("JAX_PLATFORMS", "")
        platform = "cpu" if asked.startswith("cpu") or not _has_gpu() else "cuda"
    add_xla_flags(_FLAGS[platform])
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        return "cpu"
    if not any(name in os.environ for name in _MEMORY_FRACTION):
        os.environ[_MEMORY_FRACTION[0]] = "0.92"
    jax.config.update("jax_platforms", "cuda,cpu")
    return "cuda"


def start(platform: Literal["cpu", "cuda"], devices: int) -> None:
    """Starts a chosen platform; on CPU, with `devices` virtual devices.

    Raises:
      ConfigError: "cuda" on a machine without a GPU that JAX can use.
    """
    import jax

    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", devices)
        return
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        raise ConfigError(
            "platform",
            f"cuda needs a GPU, and JAX finds none ({str(error).splitlines()[0]}). "
            "Install jax-mla-cp[cuda13] or [cuda12], or use platform='cpu'.",
        ) from error


def add_xla_flags(flags: dict[str, str]) -> None:
    """Adds flags to XLA_FLAGS that it does not name yet. XLA reads it when JAX starts."""
    named = {part.partition("=")[0] for part in os.environ.get("XLA_FLAGS", "").split()}
    added = [f"{name}={value}" for name, value in flags.items() if name not in named]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *added]).strip()


def _has_gpu() -> bool:
    """An NVIDIA GPU and a JAX that could drive it, told without starting JAX."""
    import importlib.util

    driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    return driver and any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def device_memory() -> int:
    """Bytes that one device of this process may use: a GPU's own, or its share of the memory that is free now.

    Virtual CPU devices, also those of other processes, share the machine's RAM, and hold a copy each of what is replicated.
    """
    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return _available_ram() // jax.device_count()


def default_memory_budget() -> int:
    """Bytes that a server takes of one device by default: 0.9 of a GPU's memory, less on CPU devices.

    A machine's RAM is not the server's alone: on virtual CPU devices it takes at most half of what is free, and all of them
    together no more than `CPU_BUDGET`.
    """
    import jax

    if jax.local_devices()[0].platform != "cpu":
        return int(0.9 * device_memory())
    return min(device_memory() // 2, CPU_BUDGET // jax.device_count())


def _available_ram() -> int:
    import psutil

    available = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # a container may have less than its machine
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        available = min(available, max(int(text) - int(used.read_text()), 0))
    return int(available)


def enable_compile_cache(directory: str | Path) -> Path:
    """Keeps compiled programs on disk, so that the next start need not compile them. Returns the directory, which is made.

    Raises:
      ConfigError: the directory can't be written.
    """
    import jax

    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            "compile_cache",
            f"{path} can't be written ({error.strerror}). Use another directory, or compile_cache='off'.",
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return path


def versions() -> dict[str, str]:
    """Versions of JAX, of this package and of the device's runtime, for reports of measurements."""
    import jax

    runtime = " ".join(jax.local_devices()[0].client.platform_version.split()[-2:])
    return {"jax": jax.__version__, "jax_mla_cp": package_version(), "runtime": runtime}


def default_compile_cache() -> Path:
    """`jax_mla_cp/compiled` in the user's cache folder (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jax_mla_cp" / "compiled"
