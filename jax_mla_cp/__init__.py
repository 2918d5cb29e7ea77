"""Prefill context parallelism for DeepSeek-style MLA models in JAX.

The public names, for notebooks; the server is `python -m jax_mla_cp.serve`. See README.md for a complete example.
"""

from jax_mla_cp.version import program_imports, starts_program

with program_imports(program=starts_program()):
    from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
    from jax_mla_cp.batch.zigzag import plan
    from jax_mla_cp.config.errors import ConfigError
    from jax_mla_cp.config.model import ModelConfig
    from jax_mla_cp.launch import load
    from jax_mla_cp.mesh import MeshShape, make_mesh
    from jax_mla_cp.model.loaded_model import Model
    from jax_mla_cp.step.forward import forward, forward_and_sample
    from jax_mla_cp.step.planner import Planner
    from jax_mla_cp.tokenizer import Tokenizer

__all__ = [
    "ConfigError",
    "MeshShape",
    "Model",
    "ModelConfig",
    "Planner",
    "SamplingParams",
    "StepRequest",
    "Tokenizer",
    "forward",
    "forward_and_sample",
    "load",
    "make_mesh",
    "plan",
]
