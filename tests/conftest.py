"""One JAX setup for the whole session, and checkpoints that are written and loaded once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# A shell without a terminal starts background jobs with Ctrl-C ignored, and they hand that on; the tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# XLA's default ends the process when a rank is 40 s late, which a loaded machine with 32 virtual devices may be.
_TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds"
if _TIMEOUT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_TIMEOUT}=3600".strip()

import jax  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tests.helpers.live import Live

jax.config.update("jax_num_cpu_devices", 32)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax_mla_cp" / "tests"))
# Small programs too: JAX's default keeps only those that take a second to compile.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Each compiled program is a few dozen memory mappings, of which Linux allows a process 65530."""
    yield
    jax.clear_caches()


# torch and transformers take seconds to import, so only the fixtures that need them do.


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """Gives config.json's contents and the directory of a variant of `tests.helpers.checkpoints.VARIANTS`, for reading only."""
    from tests.helpers.checkpoints import make_variant

    made: dict[str, tuple[dict[str, Any], Path]] = {}

    def get(name: str) -> tuple[dict[str, Any], Path]:
        if name not in made:
            made[name] = make_variant(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def transformers_model(
    checkpoint: Callable[[str], tuple[dict[str, Any], Path]],
) -> Callable[[str], PreTrainedModel]:
    """Gives transformers' float32 model of a variant; for `hf_logits`, `hf_cache` and `hf_generate`."""
    from tests.helpers.checkpoints import hf_model

    loaded: dict[str, PreTrainedModel] = {}

    def get(name: str) -> PreTrainedModel:
        if name not in loaded:
            loaded[name] = hf_model(checkpoint(name)[1])
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One server process on 4 CPU devices for all tests that drive it from outside."""
    from tests.helpers.live import serving

    with serving(tmp_path_factory.mktemp("live") / "server.log") as server:
        yield server
