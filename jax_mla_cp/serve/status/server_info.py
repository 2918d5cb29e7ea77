"""Constant properties of a server: model, mesh, versions."""

from __future__ import annotations

import dataclasses

import jax

from jax_mla_cp.launch import Runner
from jax_mla_cp.mesh import MeshShape, mesh_shape
from jax_mla_cp.tokenizer import Tokenizer
from jax_mla_cp.version import package_version


@dataclasses.dataclass(frozen=True)
class ServerInfo:
    """Constant properties of a server."""

    model_name: str
    max_model_len: int
    chat: bool
    """The model has a chat template."""
    mesh: MeshShape
    facts: dict[str, str]
    """Versions, device, dtype, ... Keys are Prometheus label names: letters, digits and _."""


def server_info(model_name: str, runner: Runner, tokenizer: Tokenizer | None) -> ServerInfo:
    """Describes a server that serves `runner` as `model_name`."""
    model = runner.planner.model
    build = model.build
    return ServerInfo(
        model_name=model_name,
        max_model_len=runner.max_model_len,
        chat=tokenizer is not None and tokenizer.chat_template is not None,
        mesh=mesh_shape(model.mesh),
        facts={
            "version": package_version(),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "dtype": str(build.dtype),
            "weights": "fp8" if build.fp8 else str(build.dtype),
            "fp8_compute": build.fp8_compute if build.fp8 else "off",
            "attention": build.attention,
            "experts_over": build.ep_name,
            "page_size": str(runner.page_size),
            "prefill_chunk": str(runner.prefill_chunk),
        },
    )
