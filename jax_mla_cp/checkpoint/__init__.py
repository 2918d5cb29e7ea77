"""Loads checkpoints into sharded arrays: Hugging Face safetensors, or Orbax checkpoints that `python -m jax_mla_cp.checkpoint
convert` made of them. `huggingface` has the table from tensor names to parameters."""

from jax_mla_cp.checkpoint.errors import CheckpointError
from jax_mla_cp.checkpoint.huggingface import expected_shapes
from jax_mla_cp.checkpoint.loader import load_params
from jax_mla_cp.checkpoint.orbax import ConvertedCheckpoint, is_converted, open_converted
from jax_mla_cp.checkpoint.orbax_loader import load_converted
from jax_mla_cp.checkpoint.tensor_source import SafetensorsSource, TensorSource

__all__ = [
    "CheckpointError",
    "ConvertedCheckpoint",
    "SafetensorsSource",
    "TensorSource",
    "expected_shapes",
    "is_converted",
    "load_converted",
    "load_params",
    "open_converted",
]
