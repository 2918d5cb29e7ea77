"""Checkpoints to sharded arrays: Hugging Face safetensors, or what `python -m jax_mla_cp.checkpoint convert` made of them."""

from jax_mla_cp.checkpoint.huggingface import expected_shapes
from jax_mla_cp.checkpoint.loader import load_params
from jax_mla_cp.checkpoint.orbax import Converted, is_converted, open_converted
from jax_mla_cp.checkpoint.orbax_loader import load_converted
from jax_mla_cp.checkpoint.tensor_source import ArraySource, CheckpointError, SafetensorsSource, TensorSource

__all__ = [
    "ArraySource",
    "CheckpointError",
    "Converted",
    "SafetensorsSource",
    "TensorSource",
    "expected_shapes",
    "is_converted",
    "load_converted",
    "load_params",
    "open_converted",
]
