"""From a `ServeConfig` to a model that steps: what the server and the evaluation in process have in common."""

from __future__ import annotations

from jax_mla_cp import platform
from jax_mla_cp.launch import load
from jax_mla_cp.mesh import make_mesh
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.serve.options import ServeConfig
from jax_mla_cp.step.runner import Runner, create_runner
from jax_mla_cp.tokenizer import Tokenizer


def set_up_devices(config: ServeConfig) -> str:
    """The platform that is used, with as many devices as the mesh needs, and the compile cache. Before JAX's first use.

    Raises:
      ConfigError: as `platform.setup` and `platform.enable_compile_cache`.
    """
    used = platform.setup(config.platform, config.mesh.devices)
    if config.compile_cache != "off":
        auto = config.compile_cache == "auto"
        platform.enable_compile_cache(platform.default_compile_cache() if auto else config.compile_cache)
    return used


def load_model(config: ServeConfig) -> tuple[Model, Tokenizer | None]:
    """The weights on the mesh.

    Raises:
      ConfigError, CheckpointError: as `load`.
    """
    return load(
        config.model,
        mesh=make_mesh(config.mesh),
        dtype=config.dtype,
        weights=config.weights,
        ep_axes=config.ep_axes,
        attention=config.attention,
        mtp=config.speculative == "mtp",
    )


def make_runner(model: Model, config: ServeConfig) -> Runner:
    """Cache and programs for a model of `load_model`.

    Raises:
      ConfigError: as `create_runner`.
    """
    return create_runner(
        model,
        page_size=config.page_size,
        kv_pages=config.kv_pages,
        memory_fraction=config.memory_fraction,
        prefill_chunk=config.prefill_chunk,
        max_model_len=config.max_model_len,
        max_running=config.max_running,
        form=config.form,
        draft_tokens=config.draft_tokens or 0,
    )
