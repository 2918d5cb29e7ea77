"""Checkpoints: Hugging Face safetensors straight to sharded arrays, one tensor at a time."""

from jax_mla_cp.checkpoint.huggingface import expected_shapes
from jax_mla_cp.checkpoint.load import load_params
from jax_mla_cp.checkpoint.source import ArraySource, CheckpointError, SafetensorsSource, TensorSource

__all__ = ["ArraySource", "CheckpointError", "SafetensorsSource", "TensorSource", "expected_shapes", "load_params"]
